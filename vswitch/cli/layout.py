"""Text in columns that can be read in narrow terminals, too: there a row is a block."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import click

_PIPE_WIDTH = 240
_GAP = 2
_INDENT = "  "
_STYLES: dict[str, dict[str, Any]] = {
    "": {},
    "bold": {"bold": True},
    "dim": {"dim": True},
    "green": {"fg": "green"},
    "yellow": {"fg": "yellow"},
    "red": {"fg": "red"},
}


class Styled(NamedTuple):
    """A piece of a line, and how it looks where there are colours: a key of _STYLES."""

    text: str
    style: str = ""

    def __str__(self) -> str:
        return click.style(self.text, **_STYLES[self.style]) if self.style else self.text


class Layout(Protocol):
    """Something to be printed."""

    def lines(self, width: int) -> Iterator[str]:
        """Its lines, if possible no longer than `width`."""
        ...


def output_width() -> int:
    """Columns of standard output; many where it is no terminal: a script gets a line a row."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return _terminal_size().columns
    return _PIPE_WIDTH


def _terminal_size() -> os.terminal_size:
    """As COLUMNS and LINES say, or else the terminal; from shutil it would take long to import."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        size = os.terminal_size((0, 0))
    said = [os.environ.get(name, "") for name in ("COLUMNS", "LINES")]
    columns, rows = (int(text) if text.isdecimal() else 0 for text in said)
    return os.terminal_size((columns or size.columns or 80, rows or size.lines or 24))


def show(layouts: Iterable[Layout]) -> None:
    """Print layouts one below the other."""
    width = output_width()
    _echo(line for layout in layouts for line in layout.lines(width))


def show_again(layouts: Iterable[Layout], n_before: int) -> int:
    """The same in a terminal, in place of the `n_before` lines of the last time; returns how many.

    As many as fit are shown.
    """
    columns, rows = _terminal_size()
    lines = [line for layout in layouts for line in layout.lines(columns)][: rows - 1]
    # Up to the first line of the last one, and nothing is left from there on.
    sys.stdout.write(f"\r\x1b[{n_before}A\x1b[J" if n_before else "")
    _echo(lines)
    return len(lines)


def _echo(lines: Iterable[str]) -> None:
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    # None: click looks whether it is a terminal.
    click.echo("\n".join(line.rstrip() for line in lines), color=False if plain else None)


def _cell(value: object) -> Styled:
    cell = value if isinstance(value, Styled) else Styled(str(value))
    text = cell.text
    return cell if text.isprintable() else cell._replace(text=repr(text)[1:-1])


def _len(text: str) -> int:
    """How many columns a text takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) != 0 for char in text)


def _padded(cell: Styled, width: int, *, right: bool) -> str:
    space = " " * (width - _len(cell.text))
    return space + str(cell) if right else str(cell) + space


def _wrapped(cell: Styled, width: int) -> list[Styled]:
    """A text in lines of `width`; a word that is longer has a line of its own."""
    lines = [""]
    for word in cell.text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and _len(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [cell._replace(text=line) for line in lines]


class Line:
    """One line of pieces; without any, an empty one."""

    def __init__(self, *pieces: object) -> None:
        self._pieces = [_cell(piece) for piece in pieces]

    def lines(self, width: int) -> Iterator[str]:  # noqa: ARG002 - a terminal breaks it
        """The line as it is."""
        yield "".join(map(str, self._pieces))


class Indented:
    """A layout a little to the right."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def lines(self, width: int) -> Iterator[str]:
        """Those of the layout, behind two blanks."""
        for line in self._layout.lines(width - len(_INDENT)):
            yield _INDENT + line


class Facts:
    """Names and what there is to say to each of them, side by side."""

    def __init__(self, facts: Iterable[tuple[str, object]]) -> None:
        self._facts = [(name, _cell(value)) for name, value in facts]

    def lines(self, width: int) -> Iterator[str]:
        """A line each, or more where it is long."""
        left = max((_len(name) for name, _ in self._facts), default=0) + _GAP
        for name, value in self._facts:
            for text in _wrapped(value, max(width - left, 1)):
                yield name.ljust(left) + str(text)
                name = ""


class Table:
    """A table without lines; a column whose title starts with `>` is of numbers.

    The last column may be folded. Where the others do not fit beside it, each row becomes a block:
    its first cell, then titles and values of the others. No value is cut or broken.
    """

    def __init__(self, *columns: str) -> None:
        self._titles = [column.lstrip(">") for column in columns]
        self._right = [column.startswith(">") for column in columns]
        self._rows: list[list[Styled]] = []

    @property
    def row_count(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def add(self, *values: object) -> None:
        """Add a row, a value for each column; `-` stands for None and for empty text."""
        self._rows.append([_cell("-" if value in (None, "") else value) for value in values])

    def lines(self, width: int) -> Iterator[str]:
        """A line a row, or a block a row."""
        rows = [[Styled(title, "bold") for title in self._titles], *self._rows]
        columns = list(zip(*rows, strict=True))
        widths = [max(_len(cell.text) for cell in column) for column in columns]
        room = width - sum(each + _GAP for each in widths[:-1])
        if room >= max(_len(word) for cell in columns[-1] for word in cell.text.split(" ")):
            yield from self._table(rows, [*widths[:-1], min(widths[-1], room)])
        else:
            yield from self._blocks(width)

    def _table(self, rows: list[list[Styled]], widths: list[int]) -> Iterator[str]:
        right = self._right
        for *cells, last in rows:
            line = "".join(
                _padded(cell, width, right=is_right) + " " * _GAP
                for cell, width, is_right in zip(cells, widths[:-1], right[:-1], strict=True)
            )
            for text in _wrapped(last, widths[-1]):
                yield line + _padded(text, widths[-1], right=right[-1])
                line = " " * (sum(widths[:-1]) + _GAP * len(cells))

    def _blocks(self, width: int) -> Iterator[str]:
        for head, *cells in self._rows:
            yield str(Styled(head.text, "bold"))
            line, n_columns = _INDENT, len(_INDENT)
            for title, cell in zip(self._titles[1:], cells, strict=True):
                pair_len = _len(title) + 1 + _len(cell.text)
                if n_columns > len(_INDENT):
                    if n_columns + _GAP + pair_len > width:
                        yield line
                        line, n_columns = _INDENT, len(_INDENT)
                    else:
                        line, n_columns = line + " " * _GAP, n_columns + _GAP
                line += f"{Styled(f'{title} ', 'dim')}{cell}"
                n_columns += pair_len
            yield line
