"""One ring of a guest's port: all that is known of it, and what may become of it.

Whether workers see a ring is decided here and nowhere else. `TRANSITIONS` is the whole of it:

                       start
      STOPPED ─────────────────────────────▶ RUNNING ──▶ PARKED        its driver disabled it
       ▲  │ │  hold           enable, kick   ▲  ▲ ▲ ◀──                enable, kick
       │  │ └─────────▶ QUIET ───────────────┘  │ │
       │  │                                     │ └────▶ UNTRANSLATED  its memory lost its addresses
       │  │    wait           its pages came    │   ◀──                they are known again
       │  └───────────▶ LATE ───────────────────┘ ──▶ FAULT            its driver did wrong
       │                                                               (so from where it is kept)
       │  settled                                ──▶ LOST              its memory is gone
      STOPPING ◀──────────────────────────────── any but STOPPED
                                    stop

Disconnect, reset and a new memory table are stops; set-link changes none of these, for what is
enabled is another question. A worker that waits for the translation of a buffer, or for a page,
stops at that buffer by itself: such a ring is RUNNING, and `fast.missed` says what it waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from enum import Enum

from vswitch.fastpath.main.mapping import DirtyLog
from vswitch.fastpath.main.port import Port
from vswitch.fastpath.main.ring import Ring
from vswitch.vhost_user.datapath import RingLog, RingSetup


class RingState(Enum):
    """Where a ring is on its way, as the main thread knows it."""

    STOPPED = "stopped"
    """Its frontend has not started it, or has stopped it."""
    QUIET = "quiet"
    """Started while its driver has it disabled: nobody touches it until it is wanted."""
    LATE = "late"
    """Started, and parts of its own memory are on another machine still (postcopy)."""
    RUNNING = "running"
    """Workers see it."""
    PARKED = "parked"
    """Its driver disabled it and may be gone: workers do not see it until it is wanted."""
    UNTRANSLATED = "untranslated"
    """Where it lies is not known at present (IOMMU): workers do not see it until it is."""
    FAULT = "fault"
    """A worker found that its driver did wrong, and does not touch it again."""
    LOST = "lost"
    """The frontend took its memory away."""
    STOPPING = "stopping"
    """Taken from the workers, which may not have noticed yet."""


TRANSITIONS: dict[RingState, frozenset[RingState]] = {
    start: frozenset(ends)
    for start, ends in {
        RingState.STOPPED: (RingState.RUNNING, RingState.QUIET, RingState.LATE),
        RingState.QUIET: (RingState.RUNNING, RingState.STOPPING),
        RingState.LATE: (RingState.RUNNING, RingState.STOPPING),
        RingState.RUNNING: (
            RingState.PARKED,
            RingState.UNTRANSLATED,
            RingState.FAULT,
            RingState.LOST,
            RingState.STOPPING,
        ),
        RingState.PARKED: (
            RingState.RUNNING,
            RingState.FAULT,
            RingState.LOST,
            RingState.STOPPING,
        ),
        RingState.UNTRANSLATED: (
            RingState.RUNNING,
            RingState.FAULT,
            RingState.LOST,
            RingState.STOPPING,
        ),
        RingState.FAULT: (RingState.LOST, RingState.STOPPING),
        RingState.LOST: (RingState.STOPPING,),
        # Again: whoever was cancelled while it waited for the workers has to stop it once more.
        RingState.STOPPING: (RingState.STOPPING, RingState.STOPPED),
    }.items()
}

KEPT = frozenset({RingState.QUIET, RingState.LATE, RingState.PARKED, RingState.UNTRANSLATED})
"""Started for the frontend, kept from the workers, and expected back."""
TRANSLATED = frozenset({RingState.RUNNING, RingState.UNTRANSLATED, RingState.FAULT, RingState.LOST})
"""Where a ring is somewhere, if there are addresses to translate."""


class GuestRing:
    """One virtqueue of a port, from the first start that its frontend wanted to its disconnect.

    `fast` is what workers see of it. Errors of start and restart are the caller's to turn into
    words; what is wrong with the ring otherwise is in `fault` and `astray`.
    """

    def __init__(self, port: Port, index: int) -> None:
        self.fast = Ring(port, index)
        self.state = RingState.STOPPED
        self.setup: RingSetup | None = None
        """As the frontend said it last; None before it was ever started."""
        self.place: RingSetup | None = None
        """The same with addresses of the frontend's process, where its own are I/O virtual."""
        self.translation: object | None = None
        """Whose tables its addresses go through; None: the memory table is enough."""
        self.unfit: RingSetup | None = None
        """The place where it was to go on and could not: not tried twice."""
        self.enabled = False
        """What the frontend says, whatever the link is."""
        self.logged: RingLog | None = None
        """What is to be logged of it, when there is a log."""
        self.fault: str | None = None
        """What its driver did wrong: until it starts again, for its frontend may stop it at once
        and its user wants to read it."""
        self.astray: str | None = None
        """Why it cannot run where its driver says that it is; None: it can, or has stopped."""
        self.missing: dict[int, int] = {}
        """LATE: its pages that have not come, guest addresses by those to be touched."""
        self.missing_asked = False
        """All of these were asked for."""
        self._watched = -1

    @property
    def index(self) -> int:
        return self.fast.index

    @property
    def name(self) -> str:
        """receiveq0, transmitq0, receiveq1 ... counted from 0 as in `ethtool`."""
        kind = "transmitq" if self.fast.is_transmitq else "receiveq"
        return f"{kind}{self.index // 2}"

    @property
    def known_setup(self) -> RingSetup:
        """`setup` of a ring that was started at some time."""
        assert self.setup is not None
        return self.setup

    @property
    def kick_fd(self) -> int:
        """What its driver kicks through, the backend's; -1: it is polled."""
        return -1 if self.setup is None else self.setup.kick_fd

    @property
    def is_started(self) -> bool:
        """Whether the frontend may take it for started: `show` says so."""
        return self.fast.started or self.state in KEPT - {RingState.LATE}

    # Transitions

    def may_become(self, state: RingState) -> bool:
        return state in TRANSITIONS[self.state]

    def become(self, state: RingState) -> None:
        """Go on to another state; what workers see of it follows."""
        assert self.may_become(state), f"{self.name} from {self.state} to {state}"
        self.state = state
        if state is RingState.RUNNING:
            self.fast.resume()
            self.astray = self.unfit = None
            self.missing = {}
            self.missing_asked = False
        elif state in (RingState.PARKED, RingState.UNTRANSLATED):
            self.fast.suspend()
        elif state in (RingState.STOPPING, RingState.LOST):
            self.unwatch()
            self.fast.unpublish()
        elif state is RingState.STOPPED:
            self.astray = self.unfit = None
            self.missing = {}
            self.missing_asked = False

    def stop(self) -> int:
        """STOPPING has ended: no worker uses it. Returns the avail index to go on from."""
        ran = self.fast.started
        base = self.fast.mark_stopped()
        if self.state is not RingState.STOPPED:
            self.become(RingState.STOPPED)
        return base if ran or self.setup is None else self.setup.base

    def suspend(self) -> None:
        """Keep it from the workers, for where it lies is not known any more."""
        if self.state is RingState.RUNNING:
            self.become(RingState.UNTRANSLATED)
        else:
            self.fast.suspend()

    def found_at_fault(self, text: str) -> None:
        """A worker does not touch it again, for this reason."""
        self.fault = text
        if self.may_become(RingState.FAULT):
            self.become(RingState.FAULT)

    # What belongs to it

    def carry(self, link_up: bool) -> None:
        """Carry frames if its driver enabled it and the port's link is up; discard them if not."""
        self.fast.enabled = self.enabled and link_up

    def set_dirty_log(self, dirty_log: DirtyLog | None, logged: RingLog | None) -> DirtyLog | None:
        """Log its writes there, if `logged` says so; returns the log that it had."""
        self.logged = logged
        old = self.fast.dirty_log
        if logged is None or dirty_log is None:
            self.fast.set_dirty_log(None, None)
        else:
            self.fast.set_dirty_log(dirty_log, logged.used_gpa)
        return old

    def watch(self, kicked: Callable[[GuestRing], None]) -> None:
        """Hear on the event loop, too, when its driver kicks."""
        self.unwatch()
        self._watched = self.kick_fd
        asyncio.get_running_loop().add_reader(self._watched, self._on_kick, kicked)

    def unwatch(self) -> None:
        """Leave its kicks to the workers."""
        fd, self._watched = self._watched, -1
        if fd >= 0:
            asyncio.get_running_loop().remove_reader(fd)

    def _on_kick(self, kicked: Callable[[GuestRing], None]) -> None:
        self.drain_kicks()
        kicked(self)

    def drain_kicks(self) -> None:
        """Take what was kicked so far: workers are woken by it and do not read it."""
        # Without waiting, whatever its frontend has made of the descriptor's flags.
        with contextlib.suppress(OSError):
            os.preadv(self.kick_fd, [bytearray(8)], -1, os.RWF_NOWAIT)
