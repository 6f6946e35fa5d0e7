"""Whose turn it is on the event loop: what control clients cost everybody else, and each other.

All that is done for a client is cut into steps of about a millisecond at most: a request, a page of
a long answer, some events, a new connection. A step has to wait for its turn. In one turn of the
event loop there is one step of those who may change something, one of those who may only look and
one at the door, so that whatever else waits (frontends, workers, signals) waits for three of them
and not for 64. Within a queue it goes round: who has had a step is last.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from types import TracebackType
from typing import Self

SHARE = 0.5
"""Of the event loop's time, for all together who may only look and those at the door."""
CREDIT_S = 0.02
"""What of that share can be saved up: so much work begins at once."""
_PAUSE_S_MIN = 0.001  # finer than a timer of uvloop


class Queue(enum.IntEnum):
    """Where a step waits."""

    CHANGING = 0
    DOOR = 1
    LOOKING = 2


class Turns:
    """Hands out the turns of one event loop; `steps` counts those that were had, a queue each."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Queue, deque[asyncio.Future[None]]] = {
            queue: deque() for queue in Queue
        }
        self._next: asyncio.Handle | None = None
        self._pausing = False
        self._credit_s = CREDIT_S
        self._credited_at = time.perf_counter()
        self.steps = dict.fromkeys(Queue, 0)

    async def wait(self, queue: Queue) -> None:
        """Return when a step of that queue may be done."""
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting[queue].append(turn)
        if self._pausing and queue is Queue.CHANGING and self._next is not None:
            self._next.cancel()  # a pause is for the others
            self._next = None
        if self._next is None:
            self._pausing = False
            self._next = self._loop.call_soon(self._hand_out)
        await turn

    def account(self, queue: Queue, spent_s: float) -> None:
        """A step took so long."""
        self.steps[queue] += 1
        if queue is not Queue.CHANGING:
            self._credit_s -= spent_s

    def _hand_out(self) -> None:
        self._next = None
        self._pausing = False
        self._let_one(Queue.CHANGING)
        pause_s = self._pause_s()
        if not pause_s:
            self._let_one(Queue.DOOR)
            self._let_one(Queue.LOOKING)
        # Who was let on runs in the next turn of the loop, before this is called again.
        if self._waiting[Queue.CHANGING] or (not pause_s and any(self._waiting.values())):
            self._next = self._loop.call_soon(self._hand_out)
        elif any(self._waiting.values()):
            self._pausing = True
            self._next = self._loop.call_later(pause_s, self._hand_out)

    def _let_one(self, queue: Queue) -> None:
        waiting = self._waiting[queue]
        while waiting:
            turn = waiting.popleft()
            if not turn.done():  # not cancelled
                turn.set_result(None)
                return

    def _pause_s(self) -> float:
        """How long there is no turn for what has used up its share."""
        now = time.perf_counter()
        self._credit_s = min(CREDIT_S, self._credit_s + SHARE * (now - self._credited_at))
        self._credited_at = now
        return max(_PAUSE_S_MIN, -self._credit_s / SHARE) if self._credit_s < 0 else 0.0


class Turn:
    """The turns that one task has, one after the other: `async with` around its steps.

    What is done inside must not wait for anything but `again`, unless its queue is CHANGING: the
    time is on the account of everybody in the queue.
    """

    def __init__(self, turns: Turns, queue: Queue) -> None:
        self._turns = turns
        self._queue = queue
        self._began = 0.0

    async def again(self) -> None:
        """End a step in the midst of something, and return when the next one may be done."""
        self._turns.account(self._queue, time.perf_counter() - self._began)
        await self._turns.wait(self._queue)
        self._began = time.perf_counter()

    async def __aenter__(self) -> Self:
        await self._turns.wait(self._queue)
        self._began = time.perf_counter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._turns.account(self._queue, time.perf_counter() - self._began)
