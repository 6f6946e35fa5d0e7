"""What a guest's port does for its backend: each request goes to memory, to rings, or to both."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vswitch.bounds import MTU_MAX
from vswitch.config.settings import PortSettings
from vswitch.dataplane.departing import forget_pages
from vswitch.dataplane.handover import HandOver
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.journal import Journal
from vswitch.fastpath.main.mapping import SLOTS, Memory
from vswitch.fastpath.main.port import MAX_VRINGS, Port
from vswitch.fastpath.main.ring import Ring
from vswitch.ports import features
from vswitch.ports.ethernet import ETH_OVERHEAD, rarp_frame
from vswitch.ports.fault_process import unavailable
from vswitch.ports.health import PortHealth
from vswitch.ports.iotlb import PortIotlb
from vswitch.ports.journals import make_shared, open_shared
from vswitch.ports.memory import Change, GuestMemory
from vswitch.ports.postcopy import PortPostcopy
from vswitch.ports.rings import GuestRings
from vswitch.relay.wire import Kind
from vswitch.vhost_user.datapath import DatapathError, RingLog, RingSetup
from vswitch.vhost_user.descriptors import found_of
from vswitch.vhost_user.frontend import Frontend
from vswitch.vhost_user.protocol import Feature, LogArea, MemRegion

log = logging.getLogger("vswitch.port")


class PortDatapath:
    """Implements `vhost_user.datapath.Datapath`: has a guest's memory and its rings.

    `choose` names the worker for a ring, `frontend` who is connected; `hint` and `changed` are
    those of GuestRings.
    """

    def __init__(
        self,
        settings: PortSettings,
        engine: Engine,
        port: Port,
        handover: HandOver,
        choose: Callable[[Ring], int],
        health: PortHealth,
        frontend: Callable[[], Frontend | None],
        hint: Callable[[int, str], str],
        changed: Callable[[], None],
    ) -> None:
        self.settings = settings
        self._engine = engine
        self._port = port
        self._handover = handover
        self._health = health
        self._frontend = frontend
        self.memory = GuestMemory(health, frontend)
        self.rings = GuestRings(
            port, engine, handover, choose, self.memory, health, frontend, hint, changed
        )
        self._own_journal = port.journal
        self._inflight: Journal | None = None
        """The journal that the frontend keeps for us, if it does."""
        self._limit_mtu(None)

    def connected(self) -> None:
        """A frontend came, which has said nothing yet."""
        self._own_journal = self._port.journal
        self._limit_mtu(None)

    def disconnected(self) -> None:
        """It went; its rings have stopped and its memory is unmapped."""
        self.rings.clear()
        self._use_journal(self._own_journal)

    # Its name and what it has

    @property
    def queue_pairs(self) -> int:
        return self.settings.queues

    @property
    def features(self) -> Feature:
        return features.offered(self.settings)

    @property
    def memory_slots(self) -> int:
        return SLOTS

    @property
    def has_postcopy(self) -> bool:
        return unavailable() is None

    # Memory

    async def set_memory(self, regions: list[MemRegion], fds: list[int]) -> None:
        postcopy = self.rings.postcopy
        self.rings.iotlb = None
        if postcopy is not None:
            await postcopy.use_memory(Memory([], []))
        await self.memory.clear(log=not regions)
        if regions:
            table = self.memory.map(regions, fds)
            if postcopy is not None:
                await postcopy.use_memory(table)

    async def add_memory(self, region: MemRegion, fd: int) -> None:
        await self._go_on_with(self.memory.with_region(region, fd))

    async def remove_memory(self, region: MemRegion) -> None:
        await self._go_on_with(self.memory.without_region(region))

    async def _go_on_with(self, change: Change | None) -> None:
        """Have rings use another table; what only the old one had is unmapped."""
        if change is None:
            return
        old = self.memory.adopt(change)  # each ring retires it when it lets it go
        # Rings that lie elsewhere now start again in the midst of this.
        rings, memory = self.rings, change[0]
        if rings.postcopy is not None and rings.postcopy.listening:
            await rings.postcopy.use_memory(memory)
        if rings.iotlb is not None:
            await rings.iotlb.use_memory(memory)
        elif rings.translation is None:
            await rings.use_memory()
        if old is not None:
            await forget_pages(old.parts(memory))

    async def set_dirty_log(self, fd: int, area: LogArea) -> None:
        old = self.memory.use_log(fd, area)
        await self.rings.log_writes(self.rings.logged)
        if old is not None:
            await forget_pages([old])

    async def log_rings(self, logs: dict[int, RingLog | None]) -> None:
        await self.rings.log_writes(logs)

    # Rings

    async def start_ring(self, index: int, setup: RingSetup) -> int:
        return await self.rings.start(index, setup)

    async def stop_rings(self, indices: list[int]) -> list[int]:
        return await self.rings.stop(indices)

    def forget_ring(self, index: int) -> None:
        self.rings.forget(index)

    async def enable_ring(self, index: int, enabled: bool) -> None:
        await self.rings.enable(index, enabled)

    def set_call(self, index: int, fd: int, old: int) -> None:
        self.rings.set_call(index, fd, old)

    def signal(self, fd: int) -> None:
        self._engine.signal(fd)

    # What is in flight

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
        self._port.use_journal(journal)
        if self._inflight is not None:
            self._inflight.release()
            self._inflight = None

    # The network card

    def set_mtu(self, mtu: int) -> None:
        most = self.settings.mtu
        if most is not None and mtu > most:
            raise DatapathError(f"MTU {mtu} is more than the port's mtu, {most}")
        self._limit_mtu(mtu)

    def announce(self, mac: bytes) -> None:
        if self._port.link_down:
            return
        log.info("port %s: announcing %s (RARP)", self.settings.name, mac.hex(":"))
        self._engine.inject(self._port, rarp_frame(mac))

    def _limit_mtu(self, negotiated: int | None) -> None:
        mtu = negotiated or self.settings.mtu
        self._port.max_len = (MTU_MAX if mtu is None else mtu) + ETH_OVERHEAD

    # Postcopy

    async def advise_postcopy(self) -> int:
        rings = self.rings
        postcopy = PortPostcopy(rings.by_index, self._handover, rings.run_late, self._health.fail)
        uffd = await postcopy.advise()
        rings.postcopy = postcopy
        return uffd

    def listen_postcopy(self) -> None:
        name = self.settings.name
        log.info("port %s: postcopy migration: the guest's memory comes while it runs", name)
        self._postcopy.listening = True

    async def fault_base(self, region: MemRegion, fd: int) -> int:
        found = found_of(fd)
        if found is not None and found.kind is not Kind.MEMORY:
            raise DatapathError(
                f"the region with guest address {region.gpa:#x} is {found.text}: postcopy takes "
                "memfd, /dev/shm or hugetlbfs"
            )
        return await self._postcopy.map(region, fd)

    def allow_faults(self, allowed: bool) -> None:
        self._postcopy.allow_faults(allowed)

    async def end_postcopy(self) -> None:
        postcopy, self.rings.postcopy = self.rings.postcopy, None
        if postcopy is not None:
            if postcopy.listening:
                log.info(
                    "port %s: postcopy migration has ended, %d pages were asked for",
                    self.settings.name, postcopy.touched,
                )  # fmt: skip
            await postcopy.close()

    @property
    def _postcopy(self) -> PortPostcopy:
        """After advise_postcopy and before the end."""
        assert self.rings.postcopy is not None
        return self.rings.postcopy

    # The IOTLB

    def use_iotlb(self, on: bool) -> None:
        rings = self.rings
        if not on:
            if rings.iotlb is not None and not rings.iotlb.serves_rings:
                rings.iotlb = None
        elif rings.iotlb is None and self.memory.table is not None:
            rings.iotlb = PortIotlb(
                rings.by_index,
                self._handover,
                self.memory.table,
                self._frontend,
                rings.go_on,
                rings.astray,
            )

    def iotlb_update(self, iova: int, size: int, uva: int, access: int) -> None:
        if self.rings.iotlb is None:
            raise DatapathError("update: there is no memory table")
        self.rings.iotlb.update(iova, size, uva, access)

    async def iotlb_invalidate(self, iova: int, size: int) -> None:
        if self.rings.iotlb is not None:
            await self.rings.iotlb.invalidate(iova, size)

    def ask_again(self) -> None:
        if self.rings.iotlb is not None:
            self.rings.iotlb.ask_again()
