"""What is done once a second, a part of it a turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

Round = Callable[[], Iterator[None] | None]
"""Does something at once, or goes through something and yields where it is others' turn."""

PERIOD_S = 1.0


class Ticker:
    """Begins each round once a second, in their order, unless it still goes on.

    In parts, so that whoever has a big switch waits no longer for an answer than others.
    """

    def __init__(self, *rounds: Round) -> None:
        self._loop = asyncio.get_running_loop()
        self._rounds = rounds
        self._going_on: dict[Round, Iterator[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, with a first part of each round."""
        self._timer = self._loop.call_later(PERIOD_S, self.start)
        for each in self._rounds:
            if each not in self._going_on and (parts := each()) is not None:
                self._go_on(each, parts)

    def stop(self) -> None:
        """End it, in the midst of rounds as well."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._going_on.clear()

    def _go_on(self, each: Round, parts: Iterator[None]) -> None:
        if self._timer is None:
            return  # stopped meanwhile
        self._going_on.pop(each, None)  # whatever comes out of the next part
        for _ in parts:
            self._going_on[each] = parts
            self._loop.call_soon(self._go_on, each, parts)
            break
