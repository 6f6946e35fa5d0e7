"""A guest's port: its socket, its present frontend and that frontend's rings in the fast path."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from vswitch import limits, offloads
from vswitch.control.api import MemoryRegion, PortInfo, PortState, RingInfo
from vswitch.errors import ProtocolError
from vswitch.fastpath.engine import Engine
from vswitch.fastpath.mapping import SLOTS, DirtyLog, Memory
from vswitch.fastpath.port import MAX_VRINGS, Port, Ring, RingError
from vswitch.fault_process import unavailable
from vswitch.journals import make_shared, open_shared
from vswitch.port_iotlb import PortIotlb
from vswitch.port_postcopy import PortPostcopy
from vswitch.settings import PortSettings
from vswitch.vhost_user.backend import Backend
from vswitch.vhost_user.connection import Connection
from vswitch.vhost_user.datapath import DatapathError, RingLog, RingSetup, TranslationPending
from vswitch.vhost_user.endpoint import Connector, Endpoint, Listener
from vswitch.vhost_user.protocol import Feature, LogArea, MemRegion, ProtocolFeature
from vswitch.vhost_user.sharing import is_private_copy

FEATURES = (
    Feature.VERSION_1
    | Feature.RING_INDIRECT_DESC
    | Feature.RING_EVENT_IDX
    | Feature.RING_PACKED
    | Feature.IN_ORDER
    | Feature.ANY_LAYOUT
    | Feature.MRG_RXBUF
    | Feature.MTU
    | Feature.STATUS
    | Feature.CTRL_VQ
    | Feature.CTRL_RX
    | Feature.CTRL_VLAN
    | Feature.CTRL_RX_EXTRA
    | Feature.CTRL_MAC_ADDR
    | Feature.GUEST_ANNOUNCE
    | Feature.MQ
    | Feature.ACCESS_PLATFORM
)
"""What a port offers besides offloads. CTRL_*, STATUS, ANNOUNCE and MQ are the frontend's to
implement; to offer them says that nothing here stands in their way. CTRL_GUEST_OFFLOADS does not
belong to them: a guest changes its offloads by it, and no message tells a backend."""

ETH_OVERHEAD = 14 + 4
"""Bytes of a frame beyond its MTU: Ethernet header and one VLAN tag."""

TIB = 1 << 40
MEMORY_LEN_MAX = TIB
"""Bytes of one guest's memory. The address space of a process has 128 TiB for all of them, and a
file without contents costs its owner nothing."""
LOG_LEN_MAX = 1 << 32
"""Bytes of a log of written pages, which are 128 TiB of guest addresses."""

BROADCAST = b"\xff" * 6

log = logging.getLogger("vswitch.port")

Notify = Callable[[str, str | None], None]
"""Called with an event's name and, for faults and disconnects, the reason."""


class VhostPort:
    """One `[[port]]`. Implements `vhost_user.datapath.Datapath` for its backend.

    `settle` publishes the engine's state and returns when no worker uses an older one, `place`
    names the worker for a ring, `notify` hears of the port's events.
    """

    def __init__(
        self,
        settings: PortSettings,
        engine: Engine,
        port: Port,
        settle: Callable[[], Awaitable[None]],
        place: Callable[[Ring], int],
        notify: Notify,
    ) -> None:
        self.settings = settings
        self.fast = port
        self._engine = engine
        self._settle = settle
        self._place = place
        self._enabled: dict[int, bool] = {}
        self._kicks: dict[int, int] = {}
        self._notify = notify
        self._endpoint: Endpoint
        if settings.mode == "server":
            self._endpoint = Listener(
                settings.socket,
                mode=settings.permission_bits,
                owner=settings.owner,
                group=settings.group,
            )
        else:
            self._endpoint = Connector(settings.socket)
        self._task: asyncio.Task[None] | None = None
        self._backend: Backend | None = None
        self._memory: Memory | None = None
        self._memory_lost = False
        self._old_memory: list[Memory] = []
        self._iotlb: PortIotlb | None = None
        self._postcopy: PortPostcopy | None = None
        self._dirty_log: DirtyLog | None = None
        self._old_logs: list[DirtyLog | None] = []
        self._logs: dict[int, RingLog | None] = {}
        self._file_ids: list[tuple[int, int]] = []
        self._connects = 0
        self._connected_at: float | None = None
        self._was_ready = False
        self._fault: str | None = None
        self._last_error: str | None = None
        self._warning: str | None = None
        self._faulted: set[int] = set()
        self._astray: dict[int, str] = {}
        """Rings that cannot run where their driver says they are, and why."""
        self._problem_logged: str | None = None
        self._limit_mtu(None)
        limits.apply(settings, port, engine.fdb)

    @property
    def name(self) -> str:
        return self.settings.name

    # Life

    def open(self) -> None:
        """Listen, or begin to connect. Raises SocketError."""
        self._endpoint.open()
        self._task = asyncio.create_task(self._serve_for_ever(), name=f"port {self.name}")

    async def close(self) -> None:
        """Disconnect the frontend, free its memory and close the socket."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._endpoint.close()

    def check(self) -> None:
        """Once a second: notice what happens to the socket and say it once.

        And find rings that are at fault although their worker's event was lost.
        """
        for index, ring in self.fast.rings.items():
            if ring.started and ring.fault is not None:
                self.ring_fault(index)
        if self._translation is not None:
            self._translation.check()
        if self._backend is None:
            self._endpoint.check()
            problem = self._endpoint.problem
            if problem != self._problem_logged and problem is not None:
                log.warning("port %s: %s", self.name, problem)
            self._problem_logged = problem

    async def _serve_for_ever(self) -> None:
        while True:
            sock = await self._endpoint.next()
            connection = Connection(sock)
            try:
                await self._serve(connection)
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("port %s: internal error, frontend disconnected", self.name)
            finally:
                connection.close()

    async def _serve(self, connection: Connection) -> None:
        """One frontend, from its connection to its end."""
        pid = connection.peer_pid
        backend = Backend(self.name, connection, self, self._rings_changed)
        journal = self.fast.journal
        self._backend = backend
        self._connects += 1
        self._connected_at = time.time()
        self._fault = self._last_error = self._warning = None
        self._limit_mtu(None)
        log.info("port %s: frontend connected (pid %s)", self.name, pid or "unknown")
        self._notify("port-connected", None)
        guard = asyncio.create_task(self._endpoint.guard(connection, self._refused))
        reason = "closed by the frontend"
        try:
            await backend.run()
        except ProtocolError as exc:
            reason = self._last_error = exc.message
            log.error("port %s: frontend disconnected: %s", self.name, exc.message)
        except asyncio.CancelledError:
            reason = "closed by the switch"
            raise
        finally:
            guard.cancel()
            # Its last act is to stop watching the listening socket, which `next` is to watch then.
            await asyncio.gather(guard, return_exceptions=True)
            self._backend = None
            self._connected_at = None
            self._was_ready = False
            self._warning = None
            self._faulted.clear()
            self._astray.clear()
            self.fast.rings.clear()
            self.fast.use_journal(journal)
            self._engine.fdb.flush(self.fast.id)
            log.info("port %s: disconnected: %s", self.name, reason)
            self._notify("port-disconnected", reason)

    def _refused(self, pid: int | None) -> None:
        log.warning(
            "port %s: refused a second frontend (pid %s): one is connected already",
            self.name, pid or "unknown",
        )  # fmt: skip

    # Datapath

    @property
    def queue_pairs(self) -> int:
        return self.settings.queues

    @property
    def features(self) -> Feature:
        return FEATURES | offloads.offered(self.settings.offloads)

    @property
    def memory_slots(self) -> int:
        return SLOTS

    async def set_memory(self, regions: list[MemRegion], fds: list[int]) -> None:
        self._iotlb = None
        if self._postcopy is not None:
            await self._postcopy.use_memory(Memory([], []))
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self._memory_lost = False
        self._old_memory.clear()
        self._file_ids = []
        self._old_logs.clear()
        if not regions:
            self._dirty_log = None
        if not regions:
            return
        _check_memory_len(regions)
        try:
            self._memory = Memory(regions, fds)
        except ValueError as exc:
            raise DatapathError(str(exc)) from exc
        except OSError as exc:
            raise DatapathError(exc.strerror or str(exc)) from exc
        self._file_ids = [(status.st_dev, status.st_ino) for status in map(os.fstat, fds)]
        if self._postcopy is not None:
            await self._postcopy.use_memory(self._memory)

    async def add_memory(self, region: MemRegion, fd: int) -> None:
        _check_memory_len([region, *(self._memory.regions if self._memory else ())])
        try:
            memory = (self._memory or Memory([], [])).with_region(region, fd)
        except ValueError as exc:
            raise DatapathError(str(exc)) from exc
        except OSError as exc:
            raise DatapathError(exc.strerror or str(exc)) from exc
        status = os.fstat(fd)
        await self._replace_memory(memory, [*self._file_ids, (status.st_dev, status.st_ino)])

    async def remove_memory(self, region: MemRegion) -> None:
        assert self._memory is not None
        at = self._memory.regions.index(region)
        memory = self._memory.without_region(region.gpa, region.size, region.uva)
        await self._replace_memory(memory, self._file_ids[:at] + self._file_ids[at + 1 :])

    async def _replace_memory(self, memory: Memory, file_ids: list[tuple[int, int]]) -> None:
        """Go on with another memory; what only the old one had is unmapped."""
        if self._memory is not None:
            # Kept here: workers use it until they are told, whatever happens to this coroutine.
            self._old_memory.append(self._memory)
        self._memory = memory
        # Rings that lie elsewhere now start again in the midst of this.
        self._file_ids = file_ids
        if self._postcopy is not None and self._postcopy.listening:
            await self._postcopy.use_memory(memory)
        if self._iotlb is not None:
            await self._iotlb.use_memory(memory)
        elif self._translation is None:
            for ring in self.fast.rings.values():
                if ring.started:
                    ring.use_memory(memory)
            await self._settle()
        self._old_memory.clear()

    async def set_log(self, fd: int, area: LogArea) -> None:
        if area.size > LOG_LEN_MAX:
            raise DatapathError(f"the log has {area.size} bytes, more than {LOG_LEN_MAX}")
        try:
            self._dirty_log = DirtyLog(fd, area.size, area.offset)
        except ValueError as exc:
            raise DatapathError(str(exc)) from exc
        except OSError as exc:
            raise DatapathError(exc.strerror or str(exc)) from exc
        await self.log_rings({i: self._logs[i] for i, r in self.fast.rings.items() if r.started})

    async def log_rings(self, logs: dict[int, RingLog | None]) -> None:
        # Kept, as old memory is, until no worker writes there any more.
        self._old_logs += [self._set_ring_log(index, log_) for index, log_ in logs.items()]
        await self._settle()
        self._old_logs.clear()

    def _set_ring_log(self, index: int, log_: RingLog | None) -> DirtyLog | None:
        """Tell a ring what to log; returns the log it had."""
        self._logs[index] = log_
        ring = self.fast.rings[index]
        old = ring.log
        if log_ is None or self._dirty_log is None:
            ring.set_log(None, None)
        else:
            ring.set_log(self._dirty_log, log_.used_gpa)
        return old

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
        ring = self.fast.rings.get(index) or Ring(self.fast, index)
        self._look_for_sharing(place)
        self._enabled[index] = setup.enabled
        ring.enabled = setup.enabled and not self.fast.link_down
        ring.set_call(setup.call_fd)
        self._set_ring_log(index, setup.log)
        base = self._run_ring(ring, place) if runs else setup.base
        self._faulted.discard(index)
        self._astray.pop(index, None)
        self._forgive()
        self._engine.attach(ring, setup.kick_fd, self._place(ring))
        await self._settle()
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
            )
        except RingError as exc:
            raise DatapathError(f"vring {ring.index}: {exc}") from exc

    async def stop_rings(self, indices: list[int]) -> list[int]:
        rings = [self.fast.rings[index] for index in indices]
        for ring in rings:
            ring.unpublish()
            self._engine.detach(ring)
            self._forget_kicks(ring.index)
        await self._settle()
        bases = [ring.mark_stopped() for ring in rings]
        for index in indices:
            self._forget_place(index)
        if self._postcopy is not None:
            bases = [self._postcopy.stopped(*one) for one in zip(indices, bases, strict=True)]
        return bases

    @property
    def _translation(self) -> PortIotlb | PortPostcopy | None:
        """What finds buffers, where that is not the memory table alone."""
        if self._iotlb is None and self._postcopy is not None and self._postcopy.listening:
            return self._postcopy
        return self._iotlb

    # Datapath: postcopy

    @property
    def has_postcopy(self) -> bool:
        return unavailable() is None

    async def advise_postcopy(self) -> int:
        postcopy = PortPostcopy(self.fast, self._engine, self._settle, self._start_late, self._fail)
        uffd = await postcopy.advise()
        self._postcopy = postcopy
        return uffd

    def listen_postcopy(self) -> None:
        assert self._postcopy is not None
        log.info("port %s: postcopy migration: the guest's memory comes while it runs", self.name)
        self._postcopy.listening = True

    async def fault_base(self, region: MemRegion, fd: int) -> int:
        assert self._postcopy is not None
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

    # Datapath: the IOTLB

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
                self._settle,
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
            self._astray[index] = f"{_ring_name(index)}: {reason}"
            self._fail(self._astray[index])
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

    def make_inflight(self) -> tuple[int, int]:
        try:
            return make_shared(MAX_VRINGS)
        except OSError as exc:
            raise DatapathError(f"no memory to be had: {exc.strerror}") from exc

    def use_inflight(self, fd: int, size: int, offset: int) -> None:
        try:
            self.fast.use_journal(open_shared(fd, size, offset, MAX_VRINGS))
        except OSError as exc:
            raise DatapathError(exc.strerror or str(exc)) from exc

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
        self._enabled[index] = enabled
        self.fast.rings[index].enabled = enabled and not self.fast.link_down
        await self._settle()

    async def set_call(self, index: int, fd: int) -> None:
        self.fast.rings[index].set_call(fd)
        await self._settle()

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
        self.fast.max_len = 65535 + ETH_OVERHEAD if mtu is None else mtu + ETH_OVERHEAD

    def change(self, changes: dict[str, int | None]) -> None:
        """Go on with other limits."""
        self.settings = self.settings.model_copy(update=changes)
        limits.apply(self.settings, self.fast, self._engine.fdb)

    async def set_link(self, up: bool) -> None:
        """Let frames through, or drop all in both directions, whatever frontends say."""
        self.fast.link_down = not up
        for index, ring in self.fast.rings.items():
            ring.enabled = self._enabled.get(index, False) and up
        if not up:
            self._engine.fdb.flush(self.fast.id)
        await self._settle()
        self._rings_changed()

    # State

    def ring_fault(self, index: int) -> None:
        """A worker stopped a ring for what its driver did; the port is at fault until a reset."""
        ring = self.fast.rings.get(index)
        if ring is None or ring.fault is None or index in self._faulted:
            return
        self._faulted.add(index)
        name, text = ring.fault
        if not self._memory_lost:
            self._fail(f"{_ring_name(index)}: {text} ({name})")
        if self._backend is not None:
            self._backend.signal_error(index)

    def check_memory(self) -> None:
        """See whether the guest's memory was taken away; its rings are over then."""
        if self._memory is None or not self._memory.lost or self._memory_lost:
            return
        self._memory_lost = True
        for translation in (self._iotlb, self._postcopy):
            if translation is not None:
                translation.memory_lost()
        for ring in self.fast.rings.values():
            ring.unpublish()
            self._engine.detach(ring)
        self._engine.publish()
        self._fail("the frontend truncated its memory file: the guest's memory is gone")
        if self._backend is not None:
            for index in self.fast.rings:
                self._backend.signal_error(index)

    def _forgive(self) -> None:
        """A ring runs again: what is wrong now is what is wrong with others."""
        if not self._faulted:
            self._fault = next(iter(self._astray.values()), None)

    def _fail(self, reason: str) -> None:
        self._fault = reason
        log.error("port %s: fault: %s", self.name, reason)
        self._notify("port-fault", reason)

    @property
    def state(self) -> PortState:
        if self._backend is None:
            return self._endpoint.waiting_state
        if self._fault is not None:
            return "fault"
        return "ready" if self._is_ready() else "connected"

    def info(self) -> PortInfo:
        backend = self._backend
        features = backend.features if backend else Feature(0)
        protocol_features = backend.protocol_features if backend else ProtocolFeature(0)
        return PortInfo(
            name=self.name,
            id=self.fast.id,
            kind="vhost-user",
            state=self.state,
            link="down" if self.fast.link_down else "up",
            socket=str(self.settings.socket),
            mode=self.settings.mode,
            queues=self.settings.queues,
            mtu=self.settings.mtu,
            features=int(features),
            feature_names=[str(f.name) for f in features],
            protocol_features=int(protocol_features),
            protocol_feature_names=[str(f.name) for f in protocol_features],
            peer_pid=backend.connection.peer_pid if backend else None,
            connects=self._connects,
            connected_since=self._connected_at,
            error=self._error(),
            warning=self._warning or self._postcopy_note(),
            macs=self._engine.fdb.learned(self.fast.id),
            max_macs=limits.max_macs(self.settings, self._engine.fdb),
            storm=limits.storm_info(self.settings),
            memory=self._memory_info(),
            rings=[self._ring_info(i, ring) for i, ring in sorted(self.fast.rings.items())],
        )

    def _postcopy_note(self) -> str | None:
        if self._postcopy is None or not self._postcopy.listening:
            return None
        if isinstance(self._translation, PortIotlb):
            return "the guest is in postcopy migration: behind an IOMMU its rings wait for the end"
        return (
            "the guest is in postcopy migration: "
            f"{self._postcopy.waited_for} pages of its memory are waited for"
        )

    def _error(self) -> str | None:
        if self._backend is not None:
            return self._fault
        return self._endpoint.problem or self._last_error

    def _memory_info(self) -> list[MemoryRegion]:
        if self._memory is None:
            return []
        return [
            MemoryRegion(gpa=gpa, size=size, uva=uva, mmap_offset=offset)
            for gpa, size, uva, offset in self._memory.regions
        ]

    def _ring_info(self, index: int, ring: Ring) -> RingInfo:
        fault = ring.fault if ring.started else None
        return RingInfo(
            index=index,
            type="transmitq" if ring.is_transmitq else "receiveq",
            size=ring.size,
            started=ring.started,
            enabled=ring.enabled,
            avail_idx=ring.base & 0xFFFF,
            used_idx=ring.used_idx,
            fault=fault[1] if fault else None,
        )

    def _is_ready(self) -> bool:
        return any(ring.started and ring.enabled for ring in self.fast.rings.values())

    def _rings_changed(self) -> None:
        ready = self._is_ready()
        if ready and not self._was_ready:
            log.info("port %s: ready", self.name)
            self._notify("port-ready", None)
        self._was_ready = ready

    def _identity(self, setup: RingSetup) -> int:
        """A number that is the same for the same ring in the same memory, whoever looks at it.

        Only the files that hold the ring count: others come and go by hot-plug.
        """
        assert self._memory is not None
        places = [
            (file_id, uva, offset + uva - region_uva)
            for uva in (setup.desc_uva, setup.used_uva, setup.avail_uva)
            for file_id, (_, size, region_uva, offset) in zip(
                self._file_ids, self._memory.regions, strict=True
            )
            if 0 <= uva - region_uva < size
        ]
        told = (places, setup.size, Feature.RING_PACKED in setup.features)
        digest = hashlib.blake2b(repr(told).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") | 1

    def _look_for_sharing(self, setup: RingSetup) -> None:
        """Warn when the driver's rings are not in the memory that we were given.

        QEMU without share=on hands over the file all the same, and keeps a private copy of it.
        """
        assert self._memory is not None
        if self._warning is not None or self._backend is None:
            return
        pid = self._backend.connection.peer_pid
        for file_id, (_, size, uva, _) in zip(self._file_ids, self._memory.regions, strict=True):
            if 0 <= setup.desc_uva - uva < size and is_private_copy(pid, setup.desc_uva, file_id):
                self._warning = (
                    "the guest's memory is not shared with the switch: its process has it mapped "
                    "privately. Start QEMU with share=on, for example: -object "
                    "memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem"
                )
                log.warning("port %s: %s", self.name, self._warning)


def _check_memory_len(regions: Iterable[tuple[int, int, int, int]]) -> None:
    length = sum(size for _, size, _, _ in regions)
    if length > MEMORY_LEN_MAX:
        raise DatapathError(
            f"the guest's memory is {length / TIB:.1f} TiB in all, "
            f"more than the {MEMORY_LEN_MAX / TIB:.1f} TiB of a port"
        )


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
    return (BROADCAST + mac + b"\x80\x35" + body).ljust(60, b"\0")
