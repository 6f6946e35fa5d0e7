"""The rings of one guest's port: how they start, go on, wait and stop."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

from vswitch.dataplane.handover import HandOver
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.parts import RingError
from vswitch.fastpath.main.port import Port
from vswitch.fastpath.main.ring import Ring
from vswitch.ports import offloads
from vswitch.ports.health import PortHealth
from vswitch.ports.iotlb import PortIotlb
from vswitch.ports.memory import GuestMemory
from vswitch.ports.parking import Parking, can_hold
from vswitch.ports.postcopy import PortPostcopy
from vswitch.ports.ring import GuestRing, RingState
from vswitch.vhost_user.datapath import DatapathError, RingLog, RingSetup, TranslationPending
from vswitch.vhost_user.descriptors import close_fd
from vswitch.vhost_user.frontend import Frontend
from vswitch.vhost_user.protocol import Feature


class GuestRings:
    """All rings that the present frontend has spoken of.

    `choose` names the worker for a ring; `hint` says what the fault of a ring of such a size may
    mean, "" if nothing is known; `changed` hears that a ring runs which the backend did not start
    just now.
    """

    def __init__(
        self,
        port: Port,
        engine: Engine,
        handover: HandOver,
        choose: Callable[[Ring], int],
        memory: GuestMemory,
        health: PortHealth,
        frontend: Callable[[], Frontend | None],
        hint: Callable[[int, str], str],
        changed: Callable[[], None],
    ) -> None:
        self.by_index: dict[int, GuestRing] = {}
        self.iotlb: PortIotlb | None = None
        """Of a frontend whose addresses are I/O virtual."""
        self.postcopy: PortPostcopy | None = None
        """Of a guest that came, or is about to come, before its memory."""
        self._port = port
        self._engine = engine
        self._handover = handover
        self._choose = choose
        self._memory = memory
        self._health = health
        self._frontend = frontend
        self._hint = hint
        self._changed = changed
        self._parking = Parking(handover, self._wanted)

    @property
    def all(self) -> Collection[GuestRing]:
        return self.by_index.values()

    @property
    def translation(self) -> PortIotlb | PortPostcopy | None:
        """What finds the buffers of rings that start now; None: the memory table alone."""
        if self.iotlb is None and self.postcopy is not None and self.postcopy.listening:
            return self.postcopy
        return self.iotlb

    def clear(self) -> None:
        """The frontend is gone; none runs any more."""
        self.by_index.clear()
        self._port.rings.clear()

    # What the frontend wants

    async def start(self, index: int, setup: RingSetup) -> int:
        """Run a ring; returns the avail index that it goes on from.

        Raises DatapathError, and TranslationPending.
        """
        if self._memory.table is None:
            raise DatapathError(f"vring {index} is to start and there is no memory table")
        self.check_memory()
        if self._memory.lost:
            raise DatapathError(f"vring {index}: the frontend truncated its memory file")
        if self.iotlb is not None and self.postcopy is not None and self.postcopy.listening:
            raise TranslationPending
        ring = self._ring(index)
        translation = self.translation
        place = setup if translation is None else translation.find(ring, setup)
        if (why := self._memory.unmapped.why_no_ring((place or setup).areas())) is not None:
            self.astray(ring, why)
            raise TranslationPending
        ring.setup, ring.place, ring.translation = setup, place, translation
        ring.enabled = setup.enabled
        ring.fast.set_call(setup.call_fd)
        if setup.quiet and translation is None and can_hold(ring, setup):
            ring.fast.enabled = False
            ring.logged = setup.logged
            self._parking.hold(ring)
            return setup.base
        self._memory.look_for_sharing(place or setup)
        ring.carry(not self._port.link_down)
        base = setup.base
        if place is None:
            ring.set_dirty_log(self._memory.dirty_log, setup.logged)
            ring.become(RingState.LATE)
        else:
            base = self._run(ring, place, setup.logged)
        ring.fault = ring.astray = None
        self._health.forgive(self.all)
        self._engine.attach(ring.fast, setup.kick_fd, self._choose(ring.fast))
        await self._handover.settle()
        if translation is not None and translation is self.translation:
            translation.started(ring)
            if not ring.fast.is_transmitq and setup.kick_fd >= 0:
                # New receive buffers: no worker waits for those.
                ring.watch(translation.scan)
        return base

    async def stop(self, indices: list[int]) -> list[int]:
        """Stop rings; returns the avail index of each to go on from later."""
        rings = [self.by_index[index] for index in indices]
        for ring in rings:
            # One whose start failed for a reason that nobody thought of has nothing to stop.
            if ring.state is not RingState.STOPPED:
                # Nor may it go on when what it waits for comes in the midst of this.
                ring.become(RingState.STOPPING)
            self._engine.detach(ring.fast)
        await self._handover.settle()
        bases = [ring.stop() for ring in rings]
        if self.iotlb is not None:
            self.iotlb.stopped()
        return bases

    def forget(self, index: int) -> None:
        """The frontend knows where this stopped ring is: what else is known of it is void."""
        ring = self.by_index.get(index)
        if ring is not None and ring.setup is not None:
            ring.fast.forget_journal()
            ring.astray = None
        if self.iotlb is not None:
            self.iotlb.stopped()

    async def enable(self, index: int, enabled: bool) -> None:
        """Let a ring carry frames, or have it discard them. Raises DatapathError."""
        ring = self.by_index[index]
        ring.enabled = enabled
        if enabled:
            self._wake(ring)
        ring.carry(not self._port.link_down)
        await self._handover.settle()
        if not enabled and self.translation is None and can_hold(ring, ring.known_setup):
            await self._parking.park(ring)

    async def set_link(self, up: bool) -> None:
        """The port's link, which the user sets, whatever rings are enabled."""
        for ring in self.all:
            ring.carry(up)
        await self._handover.settle()

    def set_call(self, index: int, fd: int, old: int) -> None:
        """Notify the driver through `fd` from now on, and close `old` when nobody signals it."""
        self.by_index[index].fast.set_call(fd)
        self._handover.retire(partial(close_fd, old))
        self._handover.publish()

    # Memory

    async def log_writes(self, logs: dict[int, RingLog | None]) -> None:
        """Begin or end to log the writes of running rings, which go on meanwhile."""
        for index, logged in logs.items():
            ring = self.by_index[index]
            self._handover.retire(ring.set_dirty_log(self._memory.dirty_log, logged))
        await self._handover.settle()

    @property
    def logged(self) -> dict[int, RingLog | None]:
        """What is logged of rings that run."""
        return {index: ring.logged for index, ring in self.by_index.items() if ring.fast.started}

    async def use_memory(self) -> None:
        """Go on with another table, in which all that run lie where they lay."""
        assert self._memory.table is not None
        for ring in self.all:
            if ring.fast.started:
                self._handover.retire(ring.fast.use_memory(self._memory.table))
        await self._handover.settle()

    def check_memory(self) -> None:
        """See whether the guest's memory was taken away; its rings are over then."""
        if not self._memory.found_lost():
            return
        for translation in (self.iotlb, self.postcopy):
            if translation is not None:
                translation.memory_lost()
        for ring in self.all:
            if ring.may_become(RingState.LOST):
                ring.become(RingState.LOST)
            self._engine.detach(ring.fast)
        self._handover.publish()
        self._health.fail("the frontend truncated its memory file: the guest's memory is gone")
        frontend = self._frontend()
        if frontend is not None:
            for ring in self.all:
                frontend.signal_error(ring.index)

    # What goes wrong

    def check(self) -> None:
        """Once a second: nobody may wait for an event of a worker's that was lost."""
        for ring in self.all:
            if ring.fast.started:
                self.look_for_fault(ring.index)
        if self.translation is not None:
            self.translation.check()

    def look_for_fault(self, index: int) -> None:
        """A worker may have stopped a ring for what its driver did."""
        ring = self.by_index.get(index)
        if ring is None or ring.fast.fault is None or ring.fault is not None:
            return
        name, text = ring.fast.fault
        if name == "bad-address":
            why = self._memory.unmapped.why_no_buffer(ring.fast.fault_value)
            text += f": {why}" if why else ""
        ring.found_at_fault(text)
        if not self._memory.lost:
            hint = self._hint(ring.fast.size, text)
            self._health.fail(f"{ring.name}: {text} ({name}){hint}")
        frontend = self._frontend()
        if frontend is not None:
            frontend.signal_error(index)

    def missed(self, index: int) -> None:
        """A worker stopped at a buffer without a translation, or whose page has not come."""
        ring = self.by_index.get(index)
        if ring is not None and self.translation is not None:
            self.translation.scan(ring)

    def astray(self, ring: GuestRing, reason: str) -> None:
        """A ring cannot be where its driver says it is."""
        text = f"{ring.name}: {reason}"
        if ring.astray != text:
            ring.astray = text
            self._health.fail(text)

    # Those that did not run

    def _wanted(self, ring: GuestRing) -> None:
        """The driver of a ring that is disabled kicks."""
        try:
            self._wake(ring)
        except DatapathError as exc:
            ring.unwatch()
            self._health.fail(str(exc))
            return
        self._handover.publish()

    def _wake(self, ring: GuestRing) -> None:
        """Have a kept ring run when the engine is published next. Raises DatapathError."""
        if ring.state is RingState.QUIET:
            setup = ring.known_setup
            self.check_memory()
            if self._memory.table is None or self._memory.lost:
                raise DatapathError(f"vring {ring.index}: its memory is gone")
            self._memory.look_for_sharing(setup)
            self._run(ring, setup, ring.logged)
            ring.fault = None
            self._health.forgive(self.all)
            self._engine.attach(ring.fast, setup.kick_fd, self._choose(ring.fast))
            self._call(ring)
        elif ring.state is RingState.PARKED:
            ring.become(RingState.RUNNING)
        ring.unwatch()

    def go_on(self, ring: GuestRing, place: RingSetup) -> bool:
        """Let an UNTRANSLATED ring run again, there; no worker has seen it yet.

        False if it cannot: then it stays as it is.
        """
        if place == ring.place and ring.fast.memory is self._memory.table:
            ring.become(RingState.RUNNING)
        else:
            base = ring.fast.mark_stopped()
            try:
                self._run(ring, replace(place, base=base), ring.logged)
            except DatapathError as exc:
                ring.astray = str(exc)
                self._health.fail(str(exc))
                return False
            ring.place = place
        self._health.forgive(self.all)
        return True

    def run_late(self, ring: GuestRing) -> bool:
        """Run a LATE ring whose own memory has come, if it can; no worker has seen it yet."""
        setup = ring.known_setup
        try:
            self._run(ring, setup, ring.logged)
        except DatapathError as exc:
            self._health.fail(str(exc))
            return False
        ring.place = setup
        self._call(ring)
        self._changed()
        return True

    def _call(self, ring: GuestRing) -> None:
        # The driver may wait for what happened before.
        if ring.fast.call_fd >= 0:
            self._engine.signal(ring.fast.call_fd)

    def _run(self, ring: GuestRing, setup: RingSetup, logged: RingLog | None) -> int:
        """Point a stopped ring to its memory, whose addresses are the frontend's; it is RUNNING.

        Returns where it goes on. Raises DatapathError.
        """
        assert self._memory.table is not None
        ring.set_dirty_log(self._memory.dirty_log, logged)
        features = setup.features
        modern = bool(features & (Feature.VERSION_1 | Feature.MRG_RXBUF))
        tables = None if self.translation is None else self.translation.tables
        takes = offloads.asked_for if ring.fast.is_transmitq else offloads.taken
        try:
            base = ring.fast.start(
                self._memory.table,
                setup.size,
                setup.desc_uva,
                setup.used_uva,
                setup.avail_uva,
                hdr_len=12 if modern else 10,
                event_idx=Feature.RING_EVENT_IDX in features,
                indirect=Feature.RING_INDIRECT_DESC in features,
                mergeable=Feature.MRG_RXBUF in features,
                base=setup.base,
                poll_only=setup.kick_fd < 0,
                packed=Feature.RING_PACKED in features,
                identity=self._memory.identity(setup),
                offloads=takes(features),
                iotlb=tables,
                pieces=setup.pieces,
            )
        except RingError as exc:
            raise DatapathError(f"vring {ring.index}: {exc}") from exc
        ring.become(RingState.RUNNING)
        return base

    def _ring(self, index: int) -> GuestRing:
        if index not in self.by_index:
            self.by_index[index] = GuestRing(self._port, index)
        return self.by_index[index]
