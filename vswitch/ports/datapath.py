"""The rings of one port: what its backend has the fast path do."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from vswitch import ethertypes
from vswitch.bounds import MTU_MAX
from vswitch.config.settings import PortSettings
from vswitch.dataplane.handover import HandOver
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.journal import Journal
from vswitch.fastpath.main.port import MAX_VRINGS, Port, Ring, RingError
from vswitch.ports import features, offloads
from vswitch.ports.fault_process import unavailable
from vswitch.ports.features import FEATURES as FEATURES
from vswitch.ports.iotlb import PortIotlb
from vswitch.ports.journals import make_shared, open_shared
from vswitch.ports.memory import PortMemory
from vswitch.ports.parking import LOOKS, Parking
from vswitch.ports.postcopy import PortPostcopy
from vswitch.relay.wire import Kind
from vswitch.vhost_user.datapath import DatapathError, RingSetup, TranslationPending
from vswitch.vhost_user.descriptors import close_fd, found_of
from vswitch.vhost_user.protocol import Feature, MemRegion

ETH_OVERHEAD = 14 + 4
"""Bytes of a frame beyond its MTU: Ethernet header and one VLAN tag."""

BROADCAST = b"\xff" * 6

log = logging.getLogger("vswitch.port")


class PortDatapath(PortMemory):
    """Implements `vhost_user.datapath.Datapath` for a port's backend.

    `place` names the worker for a ring; the others are PortMemory's.
    """

    def __init__(
        self,
        settings: PortSettings,
        engine: Engine,
        port: Port,
        handover: HandOver,
        place: Callable[[Ring], int],
    ) -> None:
        super().__init__(settings, engine, port, handover)
        self._place = place
        self._enabled: dict[int, bool] = {}
        self._kicks: dict[int, int] = {}
        self._parking = Parking(port, self._unpark)
        self._fault: str | None = None
        self._faulted: set[int] = set()
        self._astray: dict[int, str] = {}
        """Rings that cannot run where their driver says they are, and why."""
        self._inflight: Journal | None = None
        """The journal that the frontend keeps for us, if it does."""
        self._limit_mtu(None)

    @abc.abstractmethod
    def _hint(self, size: int, text: str) -> str:
        """What the fault of a ring of that size may mean; "" if nothing is known."""

    @abc.abstractmethod
    def _rings_changed(self) -> None:
        """Rings have started or stopped."""

    # Rings

    @property
    def queue_pairs(self) -> int:
        return self.settings.queues

    @property
    def features(self) -> Feature:
        return features.offered(self.settings)

    async def start_ring(self, index: int, setup: RingSetup) -> int:
        if self._memory is None:
            raise DatapathError(f"vring {index} is to start and there is no memory table")
        self.check_memory()
        if self._memory_lost:
            raise DatapathError(f"vring {index}: the frontend truncated its memory file")
        translation, place, runs = self._translation, setup, True
        if isinstance(translation, PortIotlb):
            if self._postcopy is not None and self._postcopy.listening:
                raise TranslationPending
            place = translation.place(index, setup)
        elif translation is not None:
            runs = translation.place(index, setup)
        if (reason := self._unmapped.why_no_ring(place.areas())) is not None:
            self._ring_lost(index, reason)
            raise TranslationPending
        ring = self.fast.rings.get(index) or Ring(self.fast, index)
        self._enabled[index] = setup.enabled
        if setup.quiet and translation is None and (setup.kick_fd >= 0 or not ring.is_transmitq):
            ring.enabled = False
            ring.set_call(setup.call_fd)
            self._logs[index] = setup.log
            self._parking.hold(ring, setup)
            return setup.base
        self._look_for_sharing(place)
        ring.enabled = setup.enabled and not self.fast.link_down
        ring.set_call(setup.call_fd)
        self._set_ring_log(index, setup.log)
        base = self._run_ring(ring, place) if runs else setup.base
        self._faulted.discard(index)
        self._astray.pop(index, None)
        self._forgive()
        self._engine.attach(ring, setup.kick_fd, self._place(ring))
        self._parking.started(index, setup.kick_fd)
        await self._handover.settle()
        if translation is not None and translation is self._translation:
            if isinstance(translation, PortIotlb):
                translation.started(index, setup, place)
            else:
                translation.started(index, setup)
            if not ring.is_transmitq and setup.kick_fd >= 0:
                # New receive buffers: no worker waits for those.
                self._kicks[index] = setup.kick_fd
                asyncio.get_running_loop().add_reader(setup.kick_fd, self._on_posted, index)
        return base

    def _run_ring(self, ring: Ring, setup: RingSetup) -> int:
        """Point a stopped ring to its memory, whose addresses are the frontend's."""
        assert self._memory is not None
        modern = bool(setup.features & (Feature.VERSION_1 | Feature.MRG_RXBUF))
        try:
            return ring.start(
                self._memory,
                setup.size,
                setup.desc_uva,
                setup.used_uva,
                setup.avail_uva,
                hdr_len=12 if modern else 10,
                event_idx=Feature.RING_EVENT_IDX in setup.features,
                indirect=Feature.RING_INDIRECT_DESC in setup.features,
                mergeable=Feature.MRG_RXBUF in setup.features,
                base=setup.base,
                poll_only=setup.kick_fd < 0,
                packed=Feature.RING_PACKED in setup.features,
                identity=self._identity(setup),
                offloads=_offloads(ring, setup.features),
                iotlb=None if self._translation is None else self._translation.tables,
                pieces=setup.pieces,
            )
        except RingError as exc:
            raise DatapathError(f"vring {ring.index}: {exc}") from exc

    async def stop_rings(self, indices: list[int]) -> list[int]:
        rings = [self.fast.rings[index] for index in indices]
        unstarted = {index: self._parking.held(index) for index in indices}
        for ring in rings:
            self._parking.release(ring.index)
            # Nor may it go on when what it waits for comes in the midst of this.
            for translation in (self._iotlb, self._postcopy):
                if translation is not None:
                    translation.stopping(ring.index)
            ring.unpublish()
            self._engine.detach(ring)
            self._forget_kicks(ring.index)
        await self._handover.settle()
        bases = [ring.mark_stopped() for ring in rings]
        for at, setup in enumerate(unstarted.values()):
            if setup is not None:
                bases[at] = setup.base
        for index in indices:
            self._forget_place(index)
        if self._postcopy is not None:
            bases = [self._postcopy.stopped(*one) for one in zip(indices, bases, strict=True)]
        return bases

    def make_inflight(self) -> tuple[int, int]:
        try:
            return make_shared(MAX_VRINGS)
        except OSError as exc:
            raise DatapathError(f"no memory to be had: {exc.strerror}") from exc

    def use_inflight(self, fd: int, size: int, offset: int) -> None:
        found = found_of(fd)
        if found is not None and found.kind is not Kind.MEMORY:
            raise DatapathError(f"the file is not the one from GET_INFLIGHT_FD but {found.text}")
        try:
            journal = open_shared(fd, size, offset, MAX_VRINGS)
        except OSError as exc:
            raise DatapathError(exc.strerror or str(exc)) from exc
        self._use_journal(journal)
        self._inflight = journal

    def _use_journal(self, journal: Journal) -> None:
        """Have the port's rings make their notes there, no longer in one of the frontend's."""
        self.fast.use_journal(journal)
        if self._inflight is not None:
            self._inflight.release()
            self._inflight = None

    def forget_ring(self, index: int) -> None:
        ring = self.fast.rings.get(index)
        if ring is not None:
            ring.forget_journal()
        self._forget_place(index)

    def _forget_place(self, index: int) -> None:
        """A ring has stopped, or is not to start any more."""
        self._astray.pop(index, None)
        if self._iotlb is not None:
            self._iotlb.stopped(index)

    async def enable_ring(self, index: int, enabled: bool) -> None:
        ring = self.fast.rings[index]
        self._enabled[index] = enabled
        if enabled:
            self._wake(ring)
        ring.enabled = enabled and not self.fast.link_down
        await self._handover.settle()
        if not enabled and self._translation is None and self._parking.can_park(ring):
            await self._park(ring)

    async def _park(self, ring: Ring) -> None:
        """Take a ring away from the workers when they have discarded what it had to offer."""
        for _ in range(LOOKS):
            if not ring.started or self._parking.holds(ring.index):
                return
            self._parking.suspend(ring)
            await self._handover.settle()
            if not self._parking.has_more(ring):
                return
            self._parking.release(ring.index)
            await self._handover.settle()

    def _unpark(self, index: int) -> None:
        """The driver of a ring that is disabled kicks."""
        try:
            self._wake(self.fast.rings[index])
        except DatapathError as exc:
            self._parking.ignore(index)
            self._fail(str(exc))
            return
        self._handover.publish()

    def _wake(self, ring: Ring) -> None:
        """Have a parked ring run when the engine is published next. Raises DatapathError."""
        setup = self._parking.held(ring.index)
        if setup is not None:
            self.check_memory()
            if self._memory is None or self._memory_lost:
                raise DatapathError(f"vring {ring.index}: its memory is gone")
            self._look_for_sharing(setup)
            self._set_ring_log(ring.index, self._logs[ring.index])
            self._run_ring(ring, setup)
            self._forgive()
            self._engine.attach(ring, setup.kick_fd, self._place(ring))
            # The driver may wait for what happened before.
            if ring.call_fd >= 0:
                self._engine.signal(ring.call_fd)
        self._parking.release(ring.index)
        if self._memory_lost:
            ring.unpublish()

    def set_call(self, index: int, fd: int, old: int) -> None:
        self.fast.rings[index].set_call(fd)
        self._handover.retire(partial(close_fd, old))
        self._handover.publish()

    def signal(self, fd: int) -> None:
        self._engine.signal(fd)

    def set_mtu(self, mtu: int) -> None:
        if self.settings.mtu is not None and mtu > self.settings.mtu:
            raise DatapathError(f"MTU {mtu} is more than the port's mtu, {self.settings.mtu}")
        self._limit_mtu(mtu)

    def announce(self, mac: bytes) -> None:
        if self.fast.link_down:
            return
        log.info("port %s: announcing %s (RARP)", self.name, mac.hex(":"))
        self._engine.inject(self.fast, rarp_frame(mac))

    def _limit_mtu(self, negotiated: int | None) -> None:
        mtu = negotiated or self.settings.mtu
        self.fast.max_len = (MTU_MAX if mtu is None else mtu) + ETH_OVERHEAD

    def ring_fault(self, index: int) -> None:
        """A worker stopped a ring for what its driver did; the port is at fault until a reset."""
        ring = self.fast.rings.get(index)
        if ring is None or ring.fault is None or index in self._faulted:
            return
        self._faulted.add(index)
        name, text = ring.fault
        if name == "bad-address" and (why := self._unmapped.why_no_buffer(ring.fault_value)):
            text = f"{text}: {why}"
        if not self._memory_lost:
            self._fail(f"{_ring_name(index)}: {text} ({name}){self._hint(ring.size, text)}")
        if self._backend is not None:
            self._backend.signal_error(index)

    def _forgive(self) -> None:
        """A ring runs again: what is wrong now is what is wrong with others."""
        if not self._faulted:
            self._fault = next(iter(self._astray.values()), None)

    # Postcopy

    @property
    def has_postcopy(self) -> bool:
        return unavailable() is None

    async def advise_postcopy(self) -> int:
        postcopy = PortPostcopy(
            self.fast, self._engine, self._handover, self._start_late, self._fail
        )
        uffd = await postcopy.advise()
        self._postcopy = postcopy
        return uffd

    def listen_postcopy(self) -> None:
        assert self._postcopy is not None
        log.info("port %s: postcopy migration: the guest's memory comes while it runs", self.name)
        self._postcopy.listening = True

    async def fault_base(self, region: MemRegion, fd: int) -> int:
        assert self._postcopy is not None
        found = found_of(fd)
        if found is not None and found.kind is not Kind.MEMORY:
            raise DatapathError(
                f"the region with guest address {region.gpa:#x} is {found.text}: postcopy takes "
                "memfd, /dev/shm or hugetlbfs"
            )
        return await self._postcopy.map(region, fd)

    def allow_faults(self, allowed: bool) -> None:
        assert self._postcopy is not None
        self._postcopy.allow_faults(allowed)

    async def end_postcopy(self) -> None:
        postcopy, self._postcopy = self._postcopy, None
        if postcopy is not None:
            if postcopy.listening:
                log.info(
                    "port %s: postcopy migration has ended, %d pages were asked for",
                    self.name, postcopy.touched,
                )  # fmt: skip
            await postcopy.close()

    def _start_late(self, index: int, setup: RingSetup) -> None:
        """Run a ring whose own memory was missing; no worker has seen it yet."""
        ring = self.fast.rings[index]
        try:
            self._run_ring(ring, setup)
        except DatapathError as exc:
            self._fail(str(exc))
            return
        # The driver may wait for what happened before.
        if ring.call_fd >= 0:
            self._engine.signal(ring.call_fd)
        self._rings_changed()

    # The IOTLB

    def use_iotlb(self, on: bool) -> None:
        if not on:
            if self._iotlb is not None and not self._iotlb.serves_rings:
                self._iotlb = None
        elif self._iotlb is None and self._memory is not None:
            self._iotlb = PortIotlb(
                self.fast,
                self._engine,
                self._memory,
                lambda: self._backend,
                self._handover,
                self._restart_ring,
                self._ring_lost,
            )

    def iotlb_update(self, iova: int, size: int, uva: int, access: int) -> None:
        if self._iotlb is None:
            raise DatapathError("update: there is no memory table")
        self._iotlb.update(iova, size, uva, access)

    async def iotlb_invalidate(self, iova: int, size: int) -> None:
        if self._iotlb is not None:
            await self._iotlb.invalidate(iova, size)

    def ask_again(self) -> None:
        if self._iotlb is not None:
            self._iotlb.ask_again()

    def _restart_ring(self, index: int, setup: RingSetup) -> bool:
        """Let a suspended ring go on in another place, which no worker has seen yet.

        False if it cannot: then it stays stopped.
        """
        ring = self.fast.rings[index]
        base = ring.mark_stopped()
        self._set_ring_log(index, self._logs[index])
        try:
            self._run_ring(ring, replace(setup, base=base))
        except DatapathError as exc:
            self._astray[index] = str(exc)
            self._fail(str(exc))
            return False
        if self._astray.pop(index, None):
            self._forgive()
        return True

    def _ring_lost(self, index: int, reason: str | None) -> None:
        """A ring cannot be where its driver says it is; None: now it can."""
        if reason is not None:
            text = f"{_ring_name(index)}: {reason}"
            if self._astray.get(index) != text:
                self._astray[index] = text
                self._fail(text)
        else:
            self._astray.pop(index, None)
            self._forgive()

    def iotlb_missed(self, index: int) -> None:
        """A worker stopped at a buffer whose address is not translated."""
        if self._translation is not None:
            self._translation.scan(index)

    def _on_posted(self, index: int) -> None:
        # Without waiting, whatever its frontend has made of the descriptor's flags.
        with contextlib.suppress(OSError):
            os.preadv(self._kicks[index], [bytearray(8)], -1, os.RWF_NOWAIT)
        self.iotlb_missed(index)

    def _forget_kicks(self, index: int) -> None:
        fd = self._kicks.pop(index, -1)
        if fd >= 0:
            asyncio.get_running_loop().remove_reader(fd)


def _ring_name(index: int) -> str:
    """receiveq0, transmitq0, receiveq1 ... counted from 0 as in `ethtool`."""
    return f"{'transmitq' if index & 1 else 'receiveq'}{index // 2}"


def _offloads(ring: Ring, features: Feature) -> int:
    if ring.is_transmitq:
        return offloads.asked_for(features)
    return offloads.taken(features)


def rarp_frame(mac: bytes) -> bytes:
    """The broadcast a host sends on behalf of a guest that moved (RFC 903), 60 bytes."""
    body = b"\x00\x01\x08\x00\x06\x04\x00\x03" + mac + b"\0" * 4 + mac + b"\0" * 4
    return (BROADCAST + mac + ethertypes.wire(ethertypes.RARP) + body).ljust(60, b"\0")
