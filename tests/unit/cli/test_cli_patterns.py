"""Names that stand for many."""

from __future__ import annotations

import pytest

from vswitch.cli.patterns import expanded
from vswitch.errors import ConfigError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("vm1", ["vm1"]),
        ("vm[1-3]", ["vm1", "vm2", "vm3"]),
        ("r[1-2]-eth[0-1]", ["r1-eth0", "r1-eth1", "r2-eth0", "r2-eth1"]),
        ("vm[08-10]", ["vm08", "vm09", "vm10"]),
        ("vm[9-10]", ["vm9", "vm10"]),
        ("vm[7-7]x", ["vm7x"]),
    ],
)
def test_patterns(pattern: str, names: list[str]) -> None:
    assert expanded([pattern]) == names


def test_several_and_each_once() -> None:
    assert expanded(["b", "a[1-2]", "a2", "b"]) == ["b", "a1", "a2"]


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("vm[3-1]", r"vm\[3-1\]: \[3-1\] runs backwards"),
        ("vm[1]", "a range is two numbers in brackets"),
        ("vm[a-c]", "a range is two numbers in brackets"),
        ("vm[1-2", "a range is two numbers in brackets"),
        ("vm[0-4096]", "stands for more than 4096 names"),
        ("a[0-99999999]b[0-99999999]", "stands for more than 4096 names"),
    ],
)
def test_what_is_no_pattern(pattern: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        expanded([pattern])
