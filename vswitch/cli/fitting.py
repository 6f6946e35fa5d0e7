"""Tables that are read in narrow terminals too: as a block a row where the lines do not fit."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_INDENT = "  "


class FittingTable:
    """A table without lines; a column whose name starts with `>` is of numbers.

    The last column may be folded. Where the others do not fit beside it, each row becomes a block:
    its first cell, then the names and values of the others. No value is cut or broken.
    """

    def __init__(self, *columns: str) -> None:
        self._names = [column.lstrip(">") for column in columns]
        self._right = [column.startswith(">") for column in columns]
        self._rows: list[list[Text]] = []

    @property
    def row_count(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def add(self, *cells: Text) -> None:
        """Add a row, a cell for each column."""
        self._rows.append(list(cells))

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name, right in zip(self._names, self._right, strict=True):
            last = name == self._names[-1]
            justify = "right" if right else "left"
            table.add_column(Text(name), justify=justify, no_wrap=not last)  # type: ignore[arg-type]
        for row in self._rows:
            table.add_row(*row)
        return table

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._table())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table()
        # What it takes at least: measured with all the room there could be.
        if Measurement.get(console, options.update(width=1 << 16), table).minimum <= (
            options.max_width
        ):
            yield table
        else:
            yield from self._blocks(options.max_width)

    def _blocks(self, width: int) -> Iterator[Text]:
        for title, *cells in self._rows:
            yield Text.assemble((title.plain, "bold"))
            line = Text(_INDENT)
            for name, cell in zip(self._names[1:], cells, strict=True):
                pair = Text.assemble((f"{name} ", "dim"), cell)
                if len(line) > len(_INDENT) and len(line) + 2 + len(pair) > width:
                    yield line
                    line = Text(_INDENT)
                line.append(_INDENT if len(line) > len(_INDENT) else "").append_text(pair)
            yield line
