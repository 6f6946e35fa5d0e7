"""The FDB as the event loop goes through it: a part of the table, then everybody else's turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from vswitch.fastpath.main.fdb import Fdb
from vswitch.fastpath.main.port import Port


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


async def flush_port(port: Port, statics: bool = False) -> int:
    """The same for a port in the network that it is in; none at the end of a cable."""
    return 0 if port.network is None else await flush(port.network.fdb, port.id, statics)


def age(fdb: Fdb, after_s: int, gone: Callable[[int, int], None]) -> Iterator[None]:
    """Forget addresses that have been silent for so long: a round, with others' turns in it.

    `gone` gets the key of each, and the number of the port that it was behind.
    """
    start: int | None = 0 if len(fdb) else None
    while start is not None:
        some, start = fdb.age_on(start, after_s)
        for key, port in some:
            gone(key, port)
        if start is not None:
            yield
