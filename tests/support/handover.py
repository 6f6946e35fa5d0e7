"""A hand-over that waits for workers without an event loop."""

from __future__ import annotations

from collections.abc import Callable

from vswitch.dataplane.handover import HandOver
from vswitch.fastpath.main.engine import Engine


class AtOnce(HandOver):
    """`settle` blocks the thread in place of the coroutine; `seen` is called before it does."""

    def __init__(self, engine: Engine, seen: Callable[[], None] = lambda: None) -> None:
        super().__init__(engine)
        self._seen = seen

    async def settle(self) -> None:
        self._seen()
        assert self._engine.wait(self._engine.publish(), 60_000_000_000), "no quiescence"
