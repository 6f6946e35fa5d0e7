"""The FDB as the event loop goes through it: a part of the table, then everybody else's turn."""

from __future__ import annotations

import asyncio

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
