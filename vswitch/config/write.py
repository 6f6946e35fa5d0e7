"""Writes settings as TOML: into an existing file with its comments kept, or into a new one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT

from vswitch.config.read import parse
from vswitch.config.settings import (
    LinkSettings,
    NetworkSettings,
    PortSettings,
    Settings,
    SwitchSettings,
    UplinkSettings,
)
from vswitch.errors import ConfigError

_HEADER = "Ports and uplinks of a vswitch; config/ports.toml of the source explains every key."
_DIFFERENCES_TOLD = 8
_EDITED = ("was added", "was changed", "was taken out")
_NOT_RUNNING = (
    "is in the file and does not run",
    "runs with other settings",
    "runs and is not in the file",
)
Named = NetworkSettings | PortSettings | UplinkSettings | LinkSettings
_ALWAYS = {
    SwitchSettings: (),
    NetworkSettings: ("name",),
    PortSettings: ("name", "socket", "mode"),
    UplinkSettings: ("type", "name"),
    LinkSettings: ("name", "ports"),
}
"""Keys written even where they have their default, because a reader looks for them."""


def save(settings: Settings, path: Path | str, *, known: Sequence[Settings] | None = None) -> Path:
    """Write `settings` to `path` in one step: a reader finds the old file or the new, whole.

    An existing file keeps its comments, its permissions and, if it is a link, its place. Returns
    the path written. Raises ConfigError if the file cannot be written, if one is there that is
    no configuration of a switch, or, with code `changed`, that means neither what is in `known` nor
    what is to be written. None: whatever it means.
    """
    target = Path(os.path.realpath(path))
    existing: str | None = None
    mode: int | None = None
    try:
        with contextlib.suppress(FileNotFoundError):
            if not target.is_file() and target.exists():
                raise ConfigError(
                    f"{target}: cannot be written: is not a regular file",
                    hint="name a TOML file",
                )
            existing = target.read_bytes().decode()
            mode = target.stat().st_mode & 0o777
        if known is not None and existing is not None and existing.strip():
            _check_known(parse(existing, file=path), settings, known, path)
        text = render(settings, existing, file=target)
        _replace(target, text, mode)
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"{target}: is not a TOML file and is left alone",
            hint="choose another name to save to",
        ) from exc
    except OSError as exc:
        raise ConfigError(
            f"{target}: cannot be written: {exc.strerror}",
            hint="choose a file in a directory that the switch may write to",
        ) from exc
    return target


def _kinds(settings: Settings) -> tuple[tuple[str, Sequence[Named]], ...]:
    """The tables of which there may be several, in the order in which they are written."""
    return (
        ("network", settings.networks),
        ("port", settings.ports),
        ("uplink", settings.uplinks),
        ("link", settings.links),
    )


def _key(model: Named) -> str:
    """What tells a table from others of its kind."""
    return model.title if isinstance(model, LinkSettings) else model.name


def _check_known(
    there: Settings, now: Settings, known: Sequence[Settings], path: Path | str
) -> None:
    if there == now or there in known:
        return
    # What an editor has done, or, where nobody knows what was there, what would become of it.
    before, words = (known[0], _EDITED) if known else (now, _NOT_RUNNING)
    differences = [
        f'{kind} "{name}" {what}'
        for (kind, in_file), (_, of_before) in zip(_kinds(there), _kinds(before), strict=True)
        for name, what in _differences(in_file, of_before, words)
    ]
    if there.switch != before.switch:
        differences.append(f"the [switch] table {words[1]}")
    more = len(differences) - _DIFFERENCES_TOLD
    text = "; ".join(differences[:_DIFFERENCES_TOLD]) + (f"; and {more} more" if more > 0 else "")
    raise ConfigError(
        f"{path}: says what this switch has neither read nor written there, and is left alone: "
        f"{text or 'the order of the tables was changed'}",
        hint="save to another file and compare, or overwrite it: vswitchctl save --force",
        code="changed",
    )


def _differences(
    there: Sequence[Named],
    before: Sequence[Named],
    words: tuple[str, str, str],
) -> Iterator[tuple[str, str]]:
    """Names of tables that are only there, different, or only before, and the word for each."""
    earlier = {_key(model): model for model in before}
    for model in there:
        if _key(model) not in earlier:
            yield _key(model), words[0]
        elif earlier.pop(_key(model)) != model:
            yield _key(model), words[1]
    for name in earlier:
        yield name, words[2]


def render(settings: Settings, existing: str | None = None, *, file: Path | str = "/") -> str:
    """Settings as TOML text.

    With `existing`, the text of a configuration that stands in `file`, only what differs changes:
    comments, order and relative paths stay. Raises ConfigError if `existing` is no configuration.
    """
    if existing is not None and existing.strip():
        try:
            before = parse(existing, file=file)
            if before == settings:
                return existing
            text = _update(existing, before, settings)
            if parse(text, file=file) == settings:
                return text
        except TOMLKitError:
            pass  # an unusual spelling, e.g. ports as inline tables: written anew
    return _fresh(settings)


def _fresh(settings: Settings) -> str:
    document = tomlkit.document()
    document.add(tomlkit.comment(_HEADER))
    document.add(tomlkit.nl())
    switch = tomlkit.table()
    _set_keys(switch, None, settings.switch)
    if switch:
        document.add("switch", switch)
    for key, models in _kinds(settings):
        if models:
            document.add(key, _tables(models, {}, {}))
    return tomlkit.dumps(document)


def _update(existing: str, before: Settings, settings: Settings) -> str:
    document = tomlkit.parse(existing)
    if before.switch != settings.switch:
        if "switch" not in document:
            document.add("switch", tomlkit.table())
        _set_keys(document["switch"], before.switch, settings.switch)
    for (key, old), (_, new) in zip(_kinds(before), _kinds(settings), strict=True):
        _update_tables(document, key, old, new)
    return tomlkit.dumps(document)


def _update_tables(
    document: tomlkit.TOMLDocument,
    key: str,
    old: Sequence[Named],
    new: Sequence[Named],
) -> None:
    if list(old) == list(new):
        return
    if not new:
        document.remove(key)
        return
    if key not in document:
        document.add(key, _tables(new, {}, {}))
        return
    held: Any = document[key]
    if isinstance(held, AoT):
        # As many as in `old`, and in its order: they were read from these.
        tables = {_key(model): table for model, table in zip(old, held, strict=True)}
        document[key] = _tables(new, tables, {_key(model): model for model in old})
    elif len(old) == 1 and [_key(model) for model in new] == [_key(old[0])]:
        _set_keys(held, old[0], new[0])
    else:
        document.remove(key)
        document.add(key, _tables(new, {}, {}))


def _tables(
    models: Sequence[Named],
    tables: dict[str, Any],
    old: dict[str, Any],
) -> AoT:
    array = tomlkit.aot()
    for model in models:
        table = tables.get(_key(model))
        if table is None:
            table = tomlkit.table()
            table.trivia.indent = "\n"
            _set_keys(table, None, model)
        else:
            _set_keys(table, old[_key(model)], model)
        array.append(table)
    return array


def _set_keys(
    table: MutableMapping[str, Any], old: BaseModel | None, new: SwitchSettings | BaseModel
) -> None:
    """Bring the keys of `table`, which means `old`, to mean `new`."""
    always = _ALWAYS[type(new)]
    for key, field in type(new).model_fields.items():
        value = getattr(new, key)
        if key in table:
            if old is not None and getattr(old, key) == value:
                continue
            if value is None:
                del table[key]
                continue
        elif value is None or (value == field.default and key not in always):
            continue
        table[key] = str(value) if isinstance(value, Path) else value


def _replace(target: Path, text: str, mode: int | None) -> None:
    fd, temporary = tempfile.mkstemp(prefix=f".{target.name[:64]}.", dir=target.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode())
            if mode is None:
                umask = os.umask(0o077)
                os.umask(umask)
                mode = 0o666 & ~umask
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).rename(target)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
