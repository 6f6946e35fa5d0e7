"""The documents of the control plane say what the code does: commands, options, methods, events."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import pytest

from tests.support.controlled import DEADLINE_S, Controlled
from tests.support.processes import environment
from vswitch.api import (
    EventLoopInfo,
    EventName,
    FdbEntry,
    LinkInfo,
    LongestTurn,
    NetworkInfo,
    PortInfo,
    PortStats,
    RingInfo,
    TurnsInfo,
    WorkerInfo,
)
from vswitch.cli import common
from vswitch.cli.ctl import cli as ctl
from vswitch.cli.main import cli as main
from vswitch.config.keys import NetworkKeys, PortKeys, RuntimeKeys, UplinkKeys, rows
from vswitch.control import protocol, server, subscriptions
from vswitch.control.methods import METHODS, READ_ONLY

DOCS = Path(__file__).parents[3] / "docs"
CLI = (DOCS / "cli.md").read_text()
PROTOCOL = (DOCS / "control-protocol.md").read_text()


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for each in command.list_commands(context):
            sub = command.get_command(context, each)
            assert sub is not None
            yield from commands(sub, f"{name} {each}")


KEYS = {**rows(PortKeys), **rows(UplinkKeys), **rows(RuntimeKeys), **rows(NetworkKeys)}
WITH_KEYS = tuple(
    f"vswitchctl {name}" for name in ("add-port", "set-port", "uplink add", "network add")
)
EXPLAINED = "[config/ports.toml](../config/ports.toml)"
"""Where each of them is, as test_config.py sees to."""
ALL = [*commands(main, "vswitch"), *commands(ctl, "vswitchctl")]


def section(text: str, heading: str) -> str:
    """What stands under a heading, down to the next one of its level or above."""
    match = re.search(rf"^(#+) `{re.escape(heading)}`\n", text, re.M)
    assert match, f"no section for {heading}"
    rest = text[match.end() :]
    following = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.M)
    return rest[: following.start()] if following else rest


@pytest.mark.parametrize(("name", "command"), ALL, ids=[name for name, _ in ALL])
def test_every_command_has_a_section_an_example_and_its_options(
    name: str, command: click.Command
) -> None:
    text = section(CLI, name)
    if " " in name and not isinstance(command, click.Group):
        assert re.search(rf"^\$ (eval \"\$\()?{name}\b", text, re.M), f"no example of {name}"
    for parameter in command.params:
        if not isinstance(parameter, click.Option) or "--json" in parameter.opts:
            continue
        if name in WITH_KEYS and parameter.name in KEYS:
            assert EXPLAINED in text
            continue
        for option in parameter.opts:
            assert f"`{option}" in text or f" {option}" in text, f"{option} of {name}"


def test_no_section_is_about_a_command_that_is_not_there() -> None:
    headings = re.findall(r"^#+ `(vswitch.*)`$", CLI, re.M)
    assert sorted(headings) == sorted(name for name, _ in ALL)


def test_every_exit_code() -> None:
    for name, value in vars(common).items():
        if name.startswith("EXIT_"):
            assert re.search(rf"^\| {value} \|", CLI, re.M), name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_its_parameters(method: str) -> None:
    text = section(PROTOCOL, method)
    model, _ = METHODS[method]
    for parameter in model.model_fields:
        if issubclass(model, (RuntimeKeys, NetworkKeys)) and parameter in KEYS:
            assert EXPLAINED in text
        else:
            assert f"`{parameter}`" in text, parameter
    assert "Result: " in text


def test_every_event_and_every_key_of_a_result() -> None:
    events = PROTOCOL.partition("\n## Events\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", events, re.M)) == set(get_args(EventName))
    kinds = (PortInfo, RingInfo, PortStats, FdbEntry, WorkerInfo, EventLoopInfo, TurnsInfo)
    for kind in (*kinds, LongestTurn, NetworkInfo, LinkInfo):
        for key in kind.__annotations__:
            assert f"`{key}`" in PROTOCOL, key


def test_the_limits() -> None:
    kib, elements = protocol.REQUEST_LEN_MAX >> 10, protocol.REQUEST_ELEMENTS_MAX
    assert f"| a request | {kib} KiB, {elements} elements " in PROTOCOL
    assert f"that has begun | {server.REQUEST_PATIENCE_S:g} s |" in PROTOCOL
    assert f"| connections | {server.CLIENTS_MAX} |" in PROTOCOL
    assert f"closed; {server.CLIENTS_RESERVED} more " in PROTOCOL
    assert f"does not read | {subscriptions.EVENTS_QUEUED_MAX} |" in PROTOCOL
    assert f"while something waits | {server.READ_PATIENCE_S:g} s |" in PROTOCOL


def test_who_may_only_look() -> None:
    row = re.search(r"\| look: (.*) \|", PROTOCOL)
    assert row is not None
    assert set(re.findall(r"`(\w+)`", row[1])) == READ_ONLY


def test_the_example_runs(controlled: Controlled, tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", PROTOCOL, re.S)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1], str(controlled.path), str(tmp_path / "example")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] == "example ready"
