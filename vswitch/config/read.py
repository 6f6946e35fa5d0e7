"""Reads `ports.toml`: all mistakes of a file in one go, a line each with file, key and reason."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from vswitch.config.relations import Kind, Tables, find_clashes
from vswitch.config.settings import (
    LinkSettings,
    NetworkSettings,
    PortSettings,
    Settings,
    SwitchSettings,
    UplinkSettings,
)
from vswitch.errors import ConfigError, shorten

__all__ = [
    "ConfigFileError",
    "LinkSettings",
    "NetworkSettings",
    "PortSettings",
    "Problem",
    "Settings",
    "SwitchSettings",
    "UplinkSettings",
    "link_settings",
    "load",
    "network_settings",
    "parse",
    "port_settings",
    "problems_of",
    "switch_settings",
    "uplink_settings",
]

_FILE_LEN_MAX = 16 << 20
_KEY_LEN_MAX = 64  # of an unknown key, to guess what was meant
_MODELS: dict[Kind, type[BaseModel]] = {
    "network": NetworkSettings,
    "port": PortSettings,
    "uplink": UplinkSettings,
    "link": LinkSettings,
}
_TABLES = ("switch", *_MODELS)
_RELATED = ("name", "socket", "worker", "network", "ports", "static_macs")
"""Keys that have to do with other tables."""
_NEEDED = {"name": "x", "socket": "/x", "ports": ["x", "y"]}
_NAMED: tuple[Kind, ...] = ("port", "uplink", "network")
_AT_LINE = re.compile(r" \(at (line (\d+), column \d+|end of document)\)$")
_M = TypeVar("_M", bound=BaseModel)


class Problem(NamedTuple):
    """One mistake: the key as a person would name it, and why its value will not do."""

    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class ConfigFileError(ConfigError):
    """All mistakes of one file; the message has a line `FILE: KEY: reason` for each."""

    def __init__(self, file: Path | str, problems: list[Problem], *, hint: str = "") -> None:
        super().__init__("\n".join(f"{file}: {p}" for p in problems), hint=hint)
        self.file = file
        self.problems = problems


def load(path: Path | str) -> Settings:
    """Read and validate a configuration file.

    Relative socket paths are resolved against the directory of the file. Raises ConfigFileError
    with all mistakes, or ConfigError if the file cannot be read at all.
    """
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size > _FILE_LEN_MAX:
            raise ConfigError(
                f"{path}: is {path.stat().st_size} bytes long, which no configuration is",
                hint="name a TOML file; config/ports.toml is an example",
            )
        raw = path.read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"{path}: cannot be read: {exc.strerror}",
            hint="name a readable TOML file with --config; config/ports.toml is an example",
        ) from exc
    try:
        text = raw.decode()
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        bad = raw[exc.start : exc.start + 1].hex()
        problem = Problem(f"line {line}", f"is not UTF-8 text (byte 0x{bad})")
        raise ConfigFileError(path, [problem], hint="save the file as UTF-8") from exc
    return parse(text, file=path)


def parse(text: str, *, file: Path | str = "ports.toml") -> Settings:
    """Validate the text of a configuration; `file` names it in errors and anchors its paths."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigFileError(file, [_syntax_problem(str(exc), text)]) from exc
    except RecursionError as exc:
        raise ConfigFileError(file, [Problem("TOML", "is nested too deeply")]) from exc
    return _settings(document, file, Path(file).absolute().parent)


def switch_settings(values: Mapping[str, Any]) -> SwitchSettings:
    """Validate the switch's own values from anywhere; ConfigError with all mistakes, one a line."""
    return _one(SwitchSettings, "switch", values, None)


def port_settings(values: Mapping[str, Any], *, base: Path | None = None) -> PortSettings:
    """Validate one port's values from anywhere; ConfigError with all mistakes, one a line.

    Without `base`, a relative socket path is a mistake.
    """
    return _one(PortSettings, "port", values, base)


def network_settings(values: Mapping[str, Any]) -> NetworkSettings:
    """Validate one network's values from anywhere; ConfigError with all mistakes, one a line."""
    return _one(NetworkSettings, "network", values, None)


def link_settings(values: Mapping[str, Any]) -> LinkSettings:
    """Validate one cable's values from anywhere; ConfigError with all mistakes, one a line."""
    return _one(LinkSettings, "link", values, None)


def uplink_settings(values: Mapping[str, Any]) -> UplinkSettings:
    """Validate one uplink's values from anywhere; ConfigError with all mistakes, one a line."""
    return _one(UplinkSettings, "uplink", values, None)


def _one(model: type[_M], kind: str, values: Mapping[str, Any], base: Path | None) -> _M:
    problems: list[Problem] = []
    result = _validate(
        model, dict(values), kind if kind == "switch" else _label(kind, 0, values), base, problems
    )
    if result is None:
        raise ConfigError("\n".join(map(str, problems)))
    return result


def _settings(document: dict[str, Any], file: Path | str, base: Path) -> Settings:
    problems: list[Problem] = []
    for key in document:
        if key not in _TABLES:
            problems.append(Problem(key, unknown_key_reason(key, _TABLES)))

    switch: SwitchSettings | None = SwitchSettings()
    if "switch" in document:
        table = document["switch"]
        if isinstance(table, dict):
            switch = _validate(SwitchSettings, table, "switch", base, problems)
        else:
            problems.append(Problem("switch", f"must be one table, [switch] (got {_show(table)})"))

    tables = {kind: _tables(document, kind, problems) for kind in _MODELS}
    found: dict[Kind, list[Any]] = {
        kind: [
            _validate(model, table, _label(kind, i, table, tables[kind]), base, problems)
            for i, table in enumerate(tables[kind], 1)
        ]
        for kind, model in _MODELS.items()
    }
    usable = {
        kind: [_usable(model, table, base) for table in tables[kind]]
        for kind, model in _MODELS.items()
    }
    clashes = find_clashes(
        None if switch is None else switch.control,
        None if switch is None else switch.workers,
        Tables(usable["port"], usable["uplink"], usable["network"], usable["link"]),
        # A name that is not there may be the one that could not be read.
        complete=all("name" in one for kind in _NAMED for one in usable[kind]),
    )
    for kind, i, key, reason in clashes:
        table = tables[kind][i - 1]
        label = _label(kind, i, table, tables[kind])
        problems.append(Problem(f"{label}.{key}", f"{reason} (got {_show(table[key])})"))

    if problems or switch is None:
        raise ConfigFileError(file, problems)
    return Settings(
        switch=switch,
        networks=found["network"],
        ports=found["port"],
        uplinks=found["uplink"],
        links=found["link"],
    )


def _tables(document: dict[str, Any], key: str, problems: list[Problem]) -> list[dict[str, Any]]:
    """The tables under `key`; a single table is a list of one, as `[uplink]` is meant."""
    value = document.get(key, [])
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list) and all(isinstance(table, dict) for table in value):
        return value
    problems.append(Problem(key, f"must be tables, [[{key}]] (got {_show(value)})"))
    return []


def _label(
    kind: str,
    i: int,
    table: Mapping[str, Any],
    among: list[dict[str, Any]] | None = None,
) -> str:
    """`port "vm1"` where that says which one, else `port[2]`, counted from 1."""
    name = table.get("name")
    usable = isinstance(name, str) and 0 < len(name) <= 64 and name.isprintable()
    if usable and (among is None or [t.get("name") for t in among].count(name) == 1):
        return f'{kind} "{name}"'
    return f"{kind}[{i}]" if i else kind


def _validate(
    model: type[_M],
    table: dict[str, Any],
    label: str,
    base: Path | None,
    problems: list[Problem],
) -> _M | None:
    try:
        return model.model_validate(table, context={"base": base})
    except ValidationError as exc:
        problems += problems_of(exc, model, label)
        return None


def _usable(model: type[BaseModel], table: dict[str, Any], base: Path) -> dict[str, Any]:
    """The values of keys that have to do with other tables, as far as they are valid alone."""
    known = {key for key in _RELATED if key in model.model_fields}
    values = {key: table[key] for key in known if key in table}
    needed = {key: value for key, value in _NEEDED.items() if key in model.model_fields}
    try:
        whole = model.model_validate(needed | values, context={"base": base})
    except ValidationError as exc:
        wrong = {error["loc"][0] for error in exc.errors(include_url=False) if error["loc"]}
        good = {key: value for key, value in values.items() if key not in wrong}
        return {} if len(good) == len(values) else _usable(model, good, base)
    return {key: getattr(whole, key) for key in values}


def problems_of(
    exc: ValidationError, model: type[BaseModel], label: str, most: int | None = None
) -> list[Problem]:
    """What pydantic found, in words for people; `label` names the table (may be empty).

    All of it, or the first `most`.
    """
    problems = []
    for error in exc.errors(include_url=False)[:most]:
        loc = error["loc"]
        key = ".".join(filter(None, [label, _spell(loc)]))
        reason = _reason(error, model, loc)
        if error["type"] not in ("missing",) and not reason.startswith("unknown key"):
            reason += f" (got {_show(error['input'])})"
        problems.append(Problem(key or "parameters", reason))
    return problems


def _spell(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{_printable(part)}"
    return text.lstrip(".")


def _reason(error: Any, model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return unknown_key_reason(str(loc[-1])[:_KEY_LEN_MAX], model.model_fields)
        case "literal_error":
            return f"must be {context['expected']}".replace("'", '"')
        case "string_type":
            return "must be text in quotes"
        case "int_type" | "int_from_float":
            return "must be a whole number without quotes"
        case "bool_type":
            return "must be true or false"
        case "list_type":
            return "must be a list"
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case _:
            return str(error["msg"])


def unknown_key_reason(key: str, known: Any) -> str:
    """`unknown key`, with the known one that was probably meant or else all of them."""
    close = difflib.get_close_matches(key.lower(), list(known), n=1, cutoff=0.6)
    if close:
        return f'unknown key (did you mean "{close[0]}"?)'
    return f"unknown key (known are {', '.join(known)})" if known else "unknown key (none is known)"


def _syntax_problem(message: str, text: str) -> Problem:
    match = _AT_LINE.search(message)
    if match is None:
        return Problem("TOML", message)
    reason = _AT_LINE.sub("", message)
    lines = text.splitlines()
    if match[2] is None:
        return Problem(f"line {max(len(lines), 1)}", f"{reason} at the end of the file")
    line = lines[int(match[2]) - 1] if int(match[2]) <= len(lines) else ""
    return Problem(match[1], f"{reason} (got {_printable(line.strip()[:80])!r})")


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]


def _show(value: object) -> str:
    """A value as TOML would have it, short enough for a line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f'"{_printable(value)}"' if isinstance(value, str) else shorten(value)
    return text if len(text) <= 160 else f"{text[:150]}... of {len(text)} characters"
