"""How workers get to see a change, and when what they saw before can be freed.

Workers take no lock and count no references. They read one pointer at the top of their loop, to a
view of all ports and rings, and hold nothing from before at that point: a quiescent point, as sleep
is one. What was taken out of use is freed when each worker has passed one. In the literature this
is quiescent-state-based reclamation (QSBR), a form of read-copy-update (RCU); see Hart, McKenney,
Brown and Walpole, "Performance of memory reclamation for lockless synchronization" (2007), and
docs/architecture.md, "Changing what workers see".
"""

from __future__ import annotations

import asyncio

from vswitch.fastpath.main.engine import Engine

_STEP_S = 0.0002
"""Between two looks at workers that are in the midst of a turn, which takes microseconds."""


class HandOver:
    """Changes of an engine, as its workers get to see them.

    A change is made first, then what it took out of use is retired, then it is published: by its
    author or by anybody who publishes next.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def retire(self, *things: object) -> None:
        """Keep what was just taken out of use for as long as a worker may use it.

        That is until each has passed a quiescent point after the next publish. What is callable is
        called then, on the event loop's thread; of everything else a reference is dropped. None is
        nothing.
        """
        for thing in things:
            if thing is not None:
                self._engine.retire(thing)

    def publish(self) -> None:
        """Show workers what is there now, without waiting for them. Wakes those that sleep."""
        self._engine.publish()
        self.collect()

    async def settle(self) -> None:
        """Publish, and return when no worker uses anything older.

        Whoever is cancelled meanwhile has published all the same, and what it had retired is kept.
        """
        ticket = self._engine.publish()
        while not self._engine.wait(ticket):  # noqa: ASYNC110 - workers set no events
            await asyncio.sleep(_STEP_S)

    def collect(self) -> None:
        """Free what no worker can be using any more."""
        self._engine.collect()
