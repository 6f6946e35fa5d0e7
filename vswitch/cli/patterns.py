"""Names that stand for many: `r[1-12]-eth[0-3]`, as in a shell's brace expansion and in Ansible."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from vswitch.errors import ConfigError

NAMES_MAX = 4096
"""As many as there can be ports."""

_RANGE = re.compile(r"\[(\d{1,9})-(\d{1,9})\]")


def expanded(patterns: Iterable[str]) -> list[str]:
    """All names that patterns stand for, in their order, each once.

    `[1-12]` is a number from 1 to 12, `[01-12]` one with two digits. Raises ConfigError for a range
    that runs backwards, for brackets that are none, and for too many names.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        for name in _expand(pattern):
            names[name] = None
            if len(names) > NAMES_MAX:
                raise ConfigError(
                    f"{pattern}: stands for more than {NAMES_MAX} names",
                    hint="a switch has no more ports than that",
                )
    return list(names)


def _expand(pattern: str) -> Iterator[str]:
    found = _RANGE.search(pattern)
    if found is None:
        if "[" in pattern or "]" in pattern:
            raise ConfigError(
                f"{pattern}: a range is two numbers in brackets", hint="for example r[1-12]-eth0"
            )
        yield pattern
        return
    first, last = found[1], found[2]
    if int(first) > int(last):
        raise ConfigError(f"{pattern}: {found[0]} runs backwards", hint=f"write [{last}-{first}]")
    width = len(first) if first.startswith("0") else 0
    before, after = pattern[: found.start()], pattern[found.end() :]
    for number in range(int(first), int(last) + 1):
        for rest in _expand(after):
            yield f"{before}{number:0{width}d}{rest}"
