"""The guest's memory of one port: its table, its log of written pages, whose files it is."""

from __future__ import annotations

import abc
import asyncio
import hashlib
import logging
import os
from collections.abc import Iterable

from vswitch.config.settings import PortSettings
from vswitch.dataplane.departing import forget_pages
from vswitch.dataplane.handover import HandOver
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.mapping import SLOTS, DirtyLog, Memory, SharedFile
from vswitch.fastpath.main.port import Port
from vswitch.ports.iotlb import PortIotlb
from vswitch.ports.postcopy import PortPostcopy
from vswitch.ports.unmapped import Unmapped
from vswitch.relay.link import Link
from vswitch.relay.wire import Kind
from vswitch.vhost_user.backend import Backend
from vswitch.vhost_user.datapath import DatapathError, RingLog, RingSetup
from vswitch.vhost_user.descriptors import found_of
from vswitch.vhost_user.protocol import Feature, LogArea, MemRegion

TIB = 1 << 40
MEMORY_LEN_MAX = TIB
"""Bytes of one guest's memory. The address space of a process has 128 TiB for all of them, and a
file without contents costs its owner nothing."""
LOG_LEN_MAX = 1 << 32
"""Bytes of a log of written pages, which are 128 TiB of guest addresses."""

log = logging.getLogger("vswitch.port")


class PortMemory(abc.ABC):
    """What of `vhost_user.datapath.Datapath` is about memory."""

    def __init__(
        self,
        settings: PortSettings,
        engine: Engine,
        port: Port,
        handover: HandOver,
    ) -> None:
        self.settings = settings
        self.fast = port
        self._engine = engine
        self._handover = handover
        self._backend: Backend | None = None
        self._memory: Memory | None = None
        self._memory_lost = False
        self._iotlb: PortIotlb | None = None
        self._postcopy: PortPostcopy | None = None
        self._dirty_log: DirtyLog | None = None
        self._logs: dict[int, RingLog | None] = {}
        self._file_ids: list[tuple[int, int]] = []
        self._unmapped = Unmapped()
        self._sharing_looked_for = False
        self._sharing_task: asyncio.Task[None] | None = None
        self._warning: str | None = None

    @property
    def name(self) -> str:
        return self.settings.name

    @abc.abstractmethod
    def _fail(self, reason: str) -> None:
        """The port is at fault."""

    @property
    def memory_slots(self) -> int:
        return SLOTS

    @property
    def _translation(self) -> PortIotlb | PortPostcopy | None:
        """What finds buffers, where that is not the memory table alone."""
        if self._iotlb is None and self._postcopy is not None and self._postcopy.listening:
            return self._postcopy
        return self._iotlb

    async def set_memory(self, regions: list[MemRegion], fds: list[int]) -> None:
        self._iotlb = None
        if self._postcopy is not None:
            await self._postcopy.use_memory(Memory([], []))
        leaving: list[SharedFile] = []
        if self._memory is not None:
            leaving += self._memory.parts()
            self._memory.close()
            self._memory = None
        self._memory_lost = False
        self._file_ids = []
        self._unmapped.clear()
        self._sharing_looked_for = False
        if not regions and self._dirty_log is not None:
            leaving.append(self._dirty_log)
            self._dirty_log = None
        await forget_pages(leaving)
        leaving.clear()
        if not regions:
            return
        _check_memory_len(regions)
        mapped, kept = [], []
        try:
            for i, (region, fd) in enumerate(zip(regions, fds, strict=True)):
                found = found_of(fd)
                if not self._unmapped.takes(region, found, i):
                    mapped.append((region, fd))
                    kept.append(found)
            self._memory = Memory([r for r, _ in mapped], [fd for _, fd in mapped], kept)
        except DatapathError:
            self._unmapped.clear()
            raise
        except ValueError as exc:
            self._unmapped.clear()
            raise DatapathError(str(exc)) from exc
        except OSError as exc:
            self._unmapped.clear()
            raise DatapathError(exc.strerror or str(exc)) from exc
        self._file_ids = [_file_id(fd) for _, fd in mapped]
        if self._postcopy is not None:
            await self._postcopy.use_memory(self._memory)

    async def add_memory(self, region: MemRegion, fd: int) -> None:
        _check_memory_len([region, *(self._memory.regions if self._memory else ())])
        found = found_of(fd)
        before = self._memory or Memory([], [])
        if self._unmapped.takes(region, found, len(before.regions) + len(self._unmapped)):
            self._memory = before
            return
        try:
            memory = before.with_region(region, fd, found)
        except ValueError as exc:
            raise DatapathError(str(exc)) from exc
        except OSError as exc:
            raise DatapathError(exc.strerror or str(exc)) from exc
        await self._replace_memory(memory, [*self._file_ids, _file_id(fd)])

    async def remove_memory(self, region: MemRegion) -> None:
        assert self._memory is not None
        if self._unmapped.remove(region):
            return
        at = self._memory.regions.index(region)
        memory = self._memory.without_region(region.gpa, region.size, region.uva)
        await self._replace_memory(memory, self._file_ids[:at] + self._file_ids[at + 1 :])

    async def _replace_memory(self, memory: Memory, file_ids: list[tuple[int, int]]) -> None:
        """Go on with another memory; what only the old one had is unmapped."""
        old, self._memory = self._memory, memory  # each ring retires it when it lets it go
        # Rings that lie elsewhere now start again in the midst of this.
        self._file_ids = file_ids
        if self._postcopy is not None and self._postcopy.listening:
            await self._postcopy.use_memory(memory)
        if self._iotlb is not None:
            await self._iotlb.use_memory(memory)
        elif self._translation is None:
            for ring in self.fast.rings.values():
                if ring.started:
                    self._handover.retire(ring.use_memory(memory))
            await self._handover.settle()
        if old is not None:
            await forget_pages(old.parts(memory))

    async def set_log(self, fd: int, area: LogArea) -> None:
        if area.size > LOG_LEN_MAX:
            raise DatapathError(f"the log has {area.size} bytes, more than {LOG_LEN_MAX}")
        old = self._dirty_log
        found = found_of(fd)
        if found is not None and found.kind is not Kind.MEMORY:
            raise DatapathError(
                f"the log's file descriptor is not a file of shared memory but {found.text}"
            )
        try:
            self._dirty_log = DirtyLog(fd, area.size, area.offset, found)
        except ValueError as exc:
            raise DatapathError(str(exc)) from exc
        except OSError as exc:
            raise DatapathError(exc.strerror or str(exc)) from exc
        await self.log_rings({i: self._logs[i] for i, r in self.fast.rings.items() if r.started})
        if old is not None:
            await forget_pages([old])

    async def log_rings(self, logs: dict[int, RingLog | None]) -> None:
        for index, log_ in logs.items():
            self._handover.retire(self._set_ring_log(index, log_))
        await self._handover.settle()

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
        self._handover.publish()
        self._fail("the frontend truncated its memory file: the guest's memory is gone")
        if self._backend is not None:
            for index in self.fast.rings:
                self._backend.signal_error(index)

    def _identity(self, setup: RingSetup) -> int:
        """A number that is the same for the same ring in the same memory, whoever looks at it.

        Only the files that hold the ring count: others come and go by hot-plug.
        """
        assert self._memory is not None
        places = [
            (file_id, uva, offset + uva - region_uva)
            for uva in (
                setup.desc_uva,
                setup.used_uva,
                setup.avail_uva,
                *(piece for part in setup.pieces for piece, _ in part[1:]),
            )
            for file_id, (_, size, region_uva, offset) in zip(
                self._file_ids, self._memory.regions, strict=True
            )
            if 0 <= uva - region_uva < size
        ]
        told = (places, setup.size, Feature.RING_PACKED in setup.features)
        digest = hashlib.blake2b(repr(told).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") | 1

    def _look_for_sharing(self, setup: RingSetup) -> None:
        """Warn, some time later, when the driver's rings are not in the memory that we were given.

        QEMU without share=on hands over the file all the same, and keeps a private copy of it. The
        relay looks, once a memory table: that takes as long as the frontend makes it.
        """
        assert self._memory is not None
        if self._sharing_looked_for or self._warning is not None or self._backend is None:
            return
        connection = self._backend.connection
        if connection.peer_pid is None:
            return
        for (dev, ino), (_, size, uva, _) in zip(self._file_ids, self._memory.regions, strict=True):
            if 0 <= setup.desc_uva - uva < size:
                self._sharing_looked_for = True
                self._sharing_task = asyncio.create_task(
                    self._warn_of_private_copy(connection.link, setup.desc_uva, dev, ino)
                )
                return

    async def _warn_of_private_copy(self, link: Link, uva: int, dev: int, ino: int) -> None:
        if not await link.is_private_copy(uva, dev, ino):
            return
        if self._backend is not None and self._backend.connection.link is link:
            self._warning = (
                "the guest's memory is not shared with the switch: its process has it mapped "
                "privately. Start QEMU with share=on, for example: -object "
                "memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem"
            )
            log.warning("port %s: %s", self.name, self._warning)


def _file_id(fd: int) -> tuple[int, int]:
    """st_dev and st_ino of a file."""
    found = found_of(fd)
    if found is not None:
        return found.dev, found.ino
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _check_memory_len(regions: Iterable[tuple[int, int, int, int]]) -> None:
    length = sum(size for _, size, _, _ in regions)
    if length > MEMORY_LEN_MAX:
        raise DatapathError(
            f"the guest's memory is {length / TIB:.1f} TiB in all, "
            f"more than the {MEMORY_LEN_MAX / TIB:.1f} TiB of a port"
        )
