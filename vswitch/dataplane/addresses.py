"""The FDB as the event loop goes through it: a part of the table, then everybody else's turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from vswitch.fastpath.main.fdb import Fdb


async def flush(fdb: Fdb, port: int | None, statics: bool = False) -> int:
    """Remove the dynamic entries of a port or of all, with `statics` the others too; how many.

    What the port learns meanwhile may stay.
    """
    removed = 0
    some, start = fdb.flush_on(0, port, statics)
    while start is not None:
        removed += some
        await asyncio.sleep(0)
        some, start = fdb.flush_on(start, port, statics)
    return removed + some


class Aging:
    """The FDB's clock, and addresses that have been silent for longer than `after_s`; 0: none.

    `gone` gets the key of each that is forgotten, and the number of the port that it was behind.
    """

    def __init__(self, fdb: Fdb, after_s: int, gone: Callable[[int, int], None]) -> None:
        self._fdb = fdb
        self._after_s = after_s
        self._gone = gone
        self._started = time.monotonic()

    def clock(self) -> None:
        """Once a second."""
        # From 1: 0 in an entry's stamp would look like one that was never set.
        self._fdb.tick = 1 + int(time.monotonic() - self._started)

    def round(self) -> Iterator[None]:
        """Once a second: a round through the table."""
        if not self._after_s or not len(self._fdb):
            return
        start: int | None = 0
        while start is not None:
            gone, start = self._fdb.age_on(start, self._after_s)
            for key, port in gone:
                self._gone(key, port)
            if start is not None:
                yield
