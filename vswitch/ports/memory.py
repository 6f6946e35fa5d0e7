"""The guest's memory of one port: its table, its log of written pages, whose files it is."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Iterable

from vswitch.dataplane.departing import forget_pages
from vswitch.fastpath.main.mapping import DirtyLog, Memory, SharedFile
from vswitch.ports.health import PortHealth
from vswitch.ports.unmapped import Unmapped
from vswitch.relay.link import Link
from vswitch.relay.wire import Kind
from vswitch.vhost_user.datapath import DatapathError, RingSetup
from vswitch.vhost_user.descriptors import found_of
from vswitch.vhost_user.frontend import Frontend
from vswitch.vhost_user.protocol import Feature, LogArea, MemRegion

TIB = 1 << 40
MEMORY_LEN_MAX = TIB
"""Bytes of one guest's memory. The address space of a process has 128 TiB for all of them, and a
file without contents costs its owner nothing."""
LOG_LEN_MAX = 1 << 32
"""Bytes of a log of written pages, which are 128 TiB of guest addresses."""

Change = tuple[Memory, list[tuple[int, int]]]
"""Another memory table, and st_dev and st_ino of the file of each of its regions."""


class GuestMemory:
    """What the present frontend handed over, mapped.

    It knows no rings: who changes it has them stopped, or goes on with them afterwards.
    """

    def __init__(self, health: PortHealth, frontend: Callable[[], Frontend | None]) -> None:
        self._health = health
        self._frontend = frontend
        self.table: Memory | None = None
        self.unmapped = Unmapped()
        self.dirty_log: DirtyLog | None = None
        self._lost = False
        self._file_ids: list[tuple[int, int]] = []
        self._sharing_looked_for = False
        self._sharing_task: asyncio.Task[None] | None = None

    @property
    def mapped(self) -> Memory:
        """The table, or one without any region."""
        return self.table or Memory([], [])

    # The table

    async def clear(self, *, log: bool) -> None:
        """Unmap all of it, and with `log` the log as well; no ring may be running."""
        leaving: list[SharedFile] = []
        if self.table is not None:
            leaving += self.table.parts()
            self.table.close()
            self.table = None
        self._lost = False
        self._file_ids = []
        self.unmapped.clear()
        self._sharing_looked_for = False
        if log and self.dirty_log is not None:
            leaving.append(self.dirty_log)
            self.dirty_log = None
        await forget_pages(leaving)

    def map(self, regions: list[MemRegion], fds: list[int]) -> Memory:
        """Map a table where there is none. Raises DatapathError, and then there still is none."""
        _check_memory_len(regions)
        mapped, kept = [], []
        try:
            for i, (region, fd) in enumerate(zip(regions, fds, strict=True)):
                found = found_of(fd)
                if not self.unmapped.takes(region, found, i):
                    mapped.append((region, fd))
                    kept.append(found)
            self.table = Memory([r for r, _ in mapped], [fd for _, fd in mapped], kept)
        except DatapathError:
            self.unmapped.clear()
            raise
        except ValueError as exc:
            self.unmapped.clear()
            raise DatapathError(str(exc)) from exc
        except OSError as exc:
            self.unmapped.clear()
            raise DatapathError(exc.strerror or str(exc)) from exc
        self._file_ids = [_file_id(fd) for _, fd in mapped]
        return self.table

    def with_region(self, region: MemRegion, fd: int) -> Change | None:
        """The table with one more region, to `adopt`; None if that is one that is not mapped.

        Raises DatapathError, and then nothing has changed.
        """
        _check_memory_len([region, *self.mapped.regions])
        found = found_of(fd)
        before = self.mapped
        if self.unmapped.takes(region, found, len(before.regions) + len(self.unmapped)):
            self.table = before
            return None
        try:
            memory = before.with_region(region, fd, found)
        except ValueError as exc:
            raise DatapathError(str(exc)) from exc
        except OSError as exc:
            raise DatapathError(exc.strerror or str(exc)) from exc
        return memory, [*self._file_ids, _file_id(fd)]

    def without_region(self, region: MemRegion) -> Change | None:
        """The table without a region, to `adopt`; None if that was none of those mapped."""
        assert self.table is not None
        if self.unmapped.remove(region):
            return None
        at = self.table.regions.index(region)
        memory = self.table.without_region(region.gpa, region.size, region.uva)
        return memory, self._file_ids[:at] + self._file_ids[at + 1 :]

    def adopt(self, change: Change) -> Memory | None:
        """Go on with another table; returns the old one, which rings may still use."""
        old = self.table
        self.table, self._file_ids = change
        return old

    # The log

    def use_log(self, fd: int, area: LogArea) -> DirtyLog | None:
        """Have another log; returns the old one, which rings may still use. DatapathError."""
        if area.size > LOG_LEN_MAX:
            raise DatapathError(f"the log has {area.size} bytes, more than {LOG_LEN_MAX}")
        found = found_of(fd)
        if found is not None and found.kind is not Kind.MEMORY:
            raise DatapathError(
                f"the log's file descriptor is not a file of shared memory but {found.text}"
            )
        old = self.dirty_log
        try:
            self.dirty_log = DirtyLog(fd, area.size, area.offset, found)
        except ValueError as exc:
            raise DatapathError(str(exc)) from exc
        except OSError as exc:
            raise DatapathError(exc.strerror or str(exc)) from exc
        return old

    # What may be wrong with it

    @property
    def lost(self) -> bool:
        """Whether it was found to be taken away; no ring may run in it then."""
        return self._lost

    def found_lost(self) -> bool:
        """Look whether it was taken away; True once."""
        if self.table is None or not self.table.lost or self._lost:
            return False
        self._lost = True
        return True

    def look_for_sharing(self, setup: RingSetup) -> None:
        """Warn, some time later, when the driver's rings are not in the memory that we were given.

        QEMU without share=on hands over the file all the same, and keeps a private copy of it. The
        relay looks, once a memory table: that takes as long as the frontend makes it.
        """
        assert self.table is not None
        frontend = self._frontend()
        if self._sharing_looked_for or self._health.warning is not None or frontend is None:
            return
        if frontend.peer_pid is None:
            return
        for (dev, ino), (_, size, uva, _) in zip(self._file_ids, self.table.regions, strict=True):
            if 0 <= setup.desc_uva - uva < size:
                self._sharing_looked_for = True
                self._sharing_task = asyncio.create_task(
                    self._warn_of_private_copy(frontend.link, setup.desc_uva, dev, ino)
                )
                return

    async def _warn_of_private_copy(self, link: Link, uva: int, dev: int, ino: int) -> None:
        if not await link.is_private_copy(uva, dev, ino):
            return
        frontend = self._frontend()
        if frontend is not None and frontend.link is link:
            self._health.warn(
                "the guest's memory is not shared with the switch: its process has it mapped "
                "privately. Start QEMU with share=on, for example: -object "
                "memory-backend-memfd,id=mem,size=SIZE,share=on -machine memory-backend=mem"
            )

    def identity(self, setup: RingSetup) -> int:
        """A number that is the same for the same ring in the same memory, whoever looks at it.

        Only the files that hold the ring count: others come and go by hot-plug.
        """
        assert self.table is not None
        places = [
            (file_id, uva, offset + uva - region_uva)
            for uva in (
                setup.desc_uva,
                setup.used_uva,
                setup.avail_uva,
                *(piece for part in setup.pieces for piece, _ in part[1:]),
            )
            for file_id, (_, size, region_uva, offset) in zip(
                self._file_ids, self.table.regions, strict=True
            )
            if 0 <= uva - region_uva < size
        ]
        told = (places, setup.size, Feature.RING_PACKED in setup.features)
        digest = hashlib.blake2b(repr(told).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") | 1


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
