"""Events on their way to the clients that asked for them: packed once, held for each, bounded."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from vswitch.api import Event, SwitchApi
from vswitch.control.protocol import pack_notification

EVENTS_QUEUED_MAX = 1024
"""Events held for a subscriber that does not read; further ones are dropped and counted."""
EVENTS_A_TURN = 64
"""Events that a subscriber is sent before it is somebody else's turn."""


class EventQueue:
    """What waits for one subscriber; `names` are the events it wants, None: all."""

    def __init__(self, on_lost: Callable[[], None]) -> None:
        """`on_lost` is called for the first event that is dropped after some were not."""
        self.names: frozenset[str] | None = None
        self._on_lost = on_lost
        self._events: deque[bytes] = deque()
        self._lost = 0
        self._filled = asyncio.Event()

    async def filled(self) -> None:
        """Return when there is something to take."""
        await self._filled.wait()

    def put(self, packed: bytes) -> None:
        """Add an event, or count it as lost."""
        if len(self._events) >= EVENTS_QUEUED_MAX:
            if not self._lost:
                self._on_lost()
            self._lost += 1
            return
        self._events.append(packed)
        self._filled.set()

    def take(self) -> bytes:
        """Up to EVENTS_A_TURN of them as they are sent, and how many were lost behind them."""
        some = [self._events.popleft() for _ in range(min(EVENTS_A_TURN, len(self._events)))]
        if not self._events:
            self._filled.clear()
            if self._lost:
                some.append(pack_notification("lost", {"count": self._lost}))
                self._lost = 0
        return b"".join(some)

    def clear(self) -> None:
        """Forget what waits."""
        self._events.clear()
        self._lost = 0
        self._filled.clear()


class Subscriptions:
    """The queues of all subscribers; listens to the switch while there are some."""

    def __init__(self, switch: SwitchApi) -> None:
        self._switch = switch
        self._queues: dict[EventQueue, None] = {}
        self._end: Callable[[], None] | None = None

    def add(self, queue: EventQueue) -> None:
        """Put events into `queue` from now on; once is enough."""
        self._queues[queue] = None
        if self._end is None:
            self._end = self._switch.subscribe(self._on_event)

    def remove(self, queue: EventQueue) -> None:
        """No more of them; may be called for a queue that is not there."""
        self._queues.pop(queue, None)
        if not self._queues and self._end is not None:
            self._end()
            self._end = None

    def _on_event(self, event: Event) -> None:
        packed: bytes | None = None
        for queue in self._queues:
            if queue.names is None or event["event"] in queue.names:
                if packed is None:
                    packed = pack_notification("event", event)
                queue.put(packed)
