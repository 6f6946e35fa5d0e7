"""Options of `vswitchctl` that are keys of ports and uplinks (`vswitch.config.keys`)."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click

from vswitch.cli.state import complete_networks
from vswitch.config.feature_names import OF_OFFLOADS, OFFERED
from vswitch.config.keys import (
    RUNTIME_KEYS,
    NetworkKeys,
    PortKeys,
    Row,
    RuntimeKeys,
    UplinkKeys,
    rows,
)

_Keys = type[PortKeys] | type[UplinkKeys] | type[RuntimeKeys] | type[NetworkKeys]


def _words(_ctx: click.Context, _: click.Parameter, value: str | None) -> list[str] | None:
    """Words with commas between them; which there are, the switch knows."""
    return value if value is None else value.split(",") if value else []


def _switch(_ctx: click.Context, _: click.Parameter, value: str | None) -> bool | None:
    return None if value is None else value == "on"


def _switch_or_words(
    ctx: click.Context, parameter: click.Parameter, value: str | None
) -> bool | list[str] | None:
    """`on`, `off`, or words."""
    return (
        {"on": True, "off": False}[value]
        if value in ("on", "off")
        else (_words(ctx, parameter, value))
    )


def _complete_features(_ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The word behind the last comma. A first one with `-` is an option to click, and not asked."""
    before, comma, last = incomplete.rpartition(",")
    names = [f"-{name}" for name in OFFERED] + [n for n in OFFERED if n not in OF_OFFLOADS]
    return [before + comma + name for name in names if name.startswith(last)]


_COMPLETIONS = {"features": _complete_features, "network": complete_networks}


def _spelling(row: Row) -> dict[str, Any]:
    """How a value of a key is written on the command line."""
    kinds = [kind for kind in get_args(row.type) if kind is not NoneType] or [row.type]
    if row.type == list[str]:
        return {"callback": _words, "metavar": "LIST"}
    if list[str] in kinds:
        return {"callback": _switch_or_words, "metavar": "LIST"}
    if kinds == [bool]:
        return {"type": click.Choice(["on", "off"]), "callback": _switch}
    if get_origin(kinds[0]) is Literal:
        return {"type": click.Choice(get_args(kinds[0]))}
    # Which numbers there are, the switch knows.
    return {"type": kinds[0], "metavar": row.key.metavar or ("N" if kinds[0] is int else None)}


def _help(row: Row) -> str:
    text = f"{row.key.text[0].upper()}{row.key.text[1:]}."
    if not row.default:
        return text
    return f"{text}  [default: {'on' if row.default is True else row.default}]"


def keys(*tables: _Keys, without: Container[str] = ()) -> Callable[..., Any]:
    """An option for each key of the tables. Their values are None for those that are not given."""
    found = [row for table in tables for row in rows(table).values() if row.name not in without]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for row in reversed(found):
            option = f"--{row.name.replace('_', '-')}"
            shell_complete = _COMPLETIONS.get(row.name)
            function = click.option(
                option, help=_help(row), shell_complete=shell_complete, **_spelling(row)
            )(function)
        return function

    return decorate


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were given, as the switch wants them; 0 takes away what can be while it runs."""
    told = {name: value for name, value in options.items() if value is not None}
    for name in RUNTIME_KEYS:
        if name in told:
            # In the order of the table. "" as well, of a network.
            told[name] = told.pop(name) or None
    return told
