"""What the fast path has to tell the event loop, as it comes out of eventfds."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import NamedTuple

from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.mapping import watch_lost_memory

_EVENTS_A_TURN = 64


class WorkerEvent(NamedTuple):
    """A record of a worker's: `kind` is a word of `EVENT_NAMES`, `port` a number of the engine's.

    `value` is a vring's index, or for "mac-moved" the number of the port so far; `key` is an
    address and its VLAN, as the FDB has them.
    """

    kind: str
    port: int
    value: int
    key: int


class WorkerEvents:
    """Reads what workers say, a part of it a turn.

    `hear` gets each record. `memory_lost` is called when mapped memory is gone, whosever it was.
    """

    def __init__(
        self,
        engine: Engine,
        hear: Callable[[WorkerEvent], None],
        memory_lost: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._hear = hear
        self._memory_lost = memory_lost
        self._lost_fd = watch_lost_memory()
        self._is_open = False

    def open(self) -> None:
        self._is_open = True
        self._loop.add_reader(self._engine.event_fd, self._on_events)
        self._loop.add_reader(self._lost_fd, self._on_lost_memory)

    def close(self) -> None:
        self._is_open = False
        self._loop.remove_reader(self._engine.event_fd)
        self._loop.remove_reader(self._lost_fd)

    def _on_events(self) -> None:
        if not self._is_open:
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._engine.event_fd)
        for event in self._engine.take_events(_EVENTS_A_TURN):
            self._hear(WorkerEvent(*event))
        if self._engine.arm_events():
            # More have come: after everybody else's turn.
            self._loop.call_soon(self._on_events)

    def _on_lost_memory(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._lost_fd)
        self._memory_lost()
