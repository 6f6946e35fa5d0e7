"""What `vswitchctl` prints fits the terminal, and what others wrote does nothing to it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from tests.support.controlled import DEADLINE_S, Controlled
from tests.support.processes import environment
from vswitch.cli import layout
from vswitch.cli.layout import Facts, Indented, Layout, Line, Styled, Table


def plain(shown: Layout, width: int) -> list[str]:
    return [click.unstyle(line).rstrip() for line in shown.lines(width)]


@pytest.fixture
def table() -> Table:
    table = Table("NAME", ">FRAMES", "DROPPED FOR")
    table.add("vm1", 7, "runt 3, oversize 12")
    table.add(Styled("long-name", "red"), None, "")
    return table


def test_numbers_stand_right_and_the_last_column_is_folded(table: Table) -> None:
    assert table.row_count == 2
    assert plain(table, 80) == [
        "NAME       FRAMES  DROPPED FOR",
        "vm1             7  runt 3, oversize 12",
        "long-name       -  -",
    ]
    assert plain(table, 30) == [
        "NAME       FRAMES  DROPPED FOR",
        "vm1             7  runt 3,",
        "                   oversize 12",
        "long-name       -  -",
    ]


def test_a_row_that_does_not_fit_is_a_block(table: Table) -> None:
    assert plain(table, 26) == [
        "vm1",
        "  FRAMES 7",
        "  DROPPED FOR runt 3, oversize 12",
        "long-name",
        "  FRAMES -  DROPPED FOR -",
    ]


def test_facts_are_folded_beside_their_names() -> None:
    facts = Facts([("link", "up"), ("features", "MQ STATUS IN_ORDER")])
    assert plain(Indented(facts), 24) == [
        "  link      up",
        "  features  MQ STATUS",
        "            IN_ORDER",
    ]


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\nb", "a\rb", "a\x07b", "a\u202eb"])
def test_what_others_wrote_does_nothing_to_a_terminal(text: str) -> None:
    table = Table("NAME", "SOCKET")
    table.add("vm1", text)
    for shown in (table, Line(text), Facts([("error", Styled(text, "red"))])):
        for line in plain(shown, 80):
            assert line.isprintable()


def test_wide_and_combining_characters_are_counted() -> None:
    table = Table("SOCKET", ">ID")
    table.add("/tmp/交換", 1)
    table.add("/tmp/e\u0301", 2)
    table.add("/tmp/abcd", 3)
    assert [layout._len(line) for line in plain(table, 80)] == [9 + 2 + 2] * 4


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ends = pty.openpty()
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.mark.parametrize("variable", [None, "NO_COLOR"])
def test_rates_take_the_place_of_the_last_ones(
    controlled: Controlled, terminal: tuple[int, int], variable: str | None
) -> None:
    ours, theirs = terminal
    more = {"TERM": "xterm", "COLUMNS": "200", "LINES": "24"}
    if variable is not None:
        more[variable] = "1"
    words = ["-s", str(controlled.path), "stats", "--watch", "--interval", "0.1", "--count", "3"]
    subprocess.run(
        [sys.executable, "-m", "vswitch.cli.ctl", *words],
        env=environment() | more,
        stdout=theirs,
        check=True,
        timeout=DEADLINE_S,
    )
    said = os.read(ours, 65536).decode()
    assert said.count("IN FRAMES/S") == 3
    assert said.count("\x1b[1A\x1b[J") == 2, "there is a line of titles and no port"
    assert ("\x1b[1m" in said) == (variable is None)
