"""A software guest whose memory is still elsewhere: postcopy migration, as a frontend does it.

What a page contained is kept here and the page taken out of the guest's memory file. When the
switch misses it, it is put back by UFFDIO_COPY, at once or when a test allows it. Nobody else may
touch a missing page: the driver's own accesses go to the file directly and would make it empty.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import random
import select
import socket
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from tests.support.running import posted
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.guest.frontend import Frontend
from vswitch.lab.guest.memory import PAGE_LEN, Region
from vswitch.lab.guest.options import DEFAULT_PROTOCOL_FEATURES, by_subject
from vswitch.ports import fault_helper
from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import MemRegion, ProtocolFeature, Request

PAGEFAULT = DEFAULT_PROTOCOL_FEATURES | ProtocolFeature.PAGEFAULT

_UFFDIO_COPY = 0xC028AA03
_MADV_REMOVE = 9
_EEXIST = 17
_EVENT = struct.Struct("=B7xQQ8x")

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def page(gpa: int) -> int:
    return gpa - gpa % PAGE_LEN


class OtherSide:
    """Where the pages are that were taken, and the thread that brings them when they are missed."""

    def __init__(self, guest: SoftwareGuest) -> None:
        self.missed: list[int] = []
        """Guest addresses of the pages that the switch waited for, in order."""
        self.uffd = -1
        self.bases: dict[Region, int] = {}
        """The switch's addresses of regions."""
        self._guest = guest
        self._kept: dict[int, bytes] = {}
        self._allowed: set[int] | None = set()
        self._ours: dict[Region, int] = {}
        self._our_uffd = fault_helper.userfaultfd()
        for region in guest.memory.regions:
            fd = guest.memory.fd(region)
            self._ours[region] = libc.mmap(None, region.size, 3, 1, fd, region.mmap_offset)
            fcntl.ioctl(
                self._our_uffd,
                fault_helper._UFFDIO_REGISTER,
                struct.pack("=QQQQ", self._ours[region], region.size, 1, 0),
            )
        self._changed = threading.Condition()
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        self.failure: Exception | None = None

    def take(self, pages: Iterable[int] | None = None) -> None:
        """Take pages out of the guest's memory; all if None."""
        if pages is None:
            pages = [
                region.gpa + at for region in self._ours for at in range(0, region.size, PAGE_LEN)
            ]
        for gpa in map(page, pages):
            self._kept[gpa] = self._guest.memory.read(gpa, PAGE_LEN)
            assert libc.madvise(self._at(self._ours, gpa), PAGE_LEN, _MADV_REMOVE) == 0

    def is_there(self, gpa: int) -> bool:
        region = self._region(gpa)
        offset = region.mmap_offset + page(gpa) - region.gpa
        try:
            return os.lseek(self._guest.memory.fd(region), offset, os.SEEK_DATA) == offset
        except OSError:
            return False

    def allow(self, pages: Iterable[int] | None = None) -> None:
        """Bring these pages when they are missed, or were; all if None."""
        with self._changed:
            if pages is None:
                self._allowed = None
            elif self._allowed is not None:
                self._allowed |= set(map(page, pages))
            for gpa in set(self.missed):
                self._bring(gpa)

    def bring(self, pages: Iterable[int] | None = None) -> None:
        """Bring pages although nobody asked, as a migration does in the background."""
        self.allow(pages)
        with self._changed:
            for gpa in list(self._kept) if pages is None else sorted(set(map(page, pages))):
                self._bring(gpa)

    def bring_some(self, chance: random.Random, count: int) -> None:
        with self._changed:
            kept = sorted(self._kept)
        self.bring(chance.sample(kept, min(count, len(kept))))

    def brought(self, pages: Iterable[int]) -> bool:
        """Whether all of these are where they belong."""
        with self._changed:
            return self._kept.keys().isdisjoint(map(page, pages))

    def empty_pages(self) -> set[int]:
        """Pages that were not brought and are there all the same: somebody has touched them."""
        with self._changed:
            return {gpa for gpa in self._kept if self.is_there(gpa)}

    def wait_missed(self, pages: Iterable[int], timeout: float = 60.0) -> None:
        wanted = set(map(page, pages))
        with self._changed:
            assert self._changed.wait_for(lambda: wanted <= set(self.missed), timeout), (
                f"not missed: {sorted(map(hex, wanted - set(self.missed)))}"
            )

    def listen(self, uffd: int) -> None:
        self.uffd = uffd
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Bring nothing more. What went wrong in the thread is raised here."""
        if self._stop_fd < 0:
            return
        if self._thread is not None:
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
            os.close(self.uffd)
        os.close(self._stop_fd)
        self._stop_fd = -1
        os.close(self._our_uffd)
        for region, address in self._ours.items():
            libc.munmap(address, region.size)
        if self.failure is not None:
            raise self.failure

    def _region(self, gpa: int) -> Region:
        [region] = [r for r in self._ours if r.gpa <= gpa < r.gpa + r.size]
        return region

    def _at(self, bases: dict[Region, int], gpa: int) -> int:
        region = self._region(gpa)
        return bases[region] + gpa - region.gpa

    def _bring(self, gpa: int) -> None:
        if self._allowed is not None and gpa not in self._allowed:
            return
        content = self._kept.pop(gpa, None)
        if content is not None:
            source = ctypes.create_string_buffer(content, 2 * PAGE_LEN)
            # The kernel takes nothing but whole pages, wherever they begin.
            copy = struct.pack(
                "=QQQQq", self._at(self._ours, gpa), ctypes.addressof(source), PAGE_LEN, 0, 0
            )
            try:
                fcntl.ioctl(self._our_uffd, _UFFDIO_COPY, bytearray(copy))
            except OSError as error:
                if error.errno != _EEXIST:  # the driver has written there
                    raise
        if self.uffd >= 0 and self._region(gpa) in self.bases:
            where = struct.pack("=QQ", self._at(self.bases, gpa), PAGE_LEN)
            fcntl.ioctl(self.uffd, fault_helper._UFFDIO_WAKE, where)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self.uffd, select.POLLIN)
        poll.register(self._stop_fd, select.POLLIN)
        try:
            while not any(fd == self._stop_fd for fd, _ in poll.poll()):
                try:
                    data = os.read(self.uffd, 32)
                except BlockingIOError:
                    continue
                kind, _, address = _EVENT.unpack(data)
                assert kind == 0x12, f"event {kind:#x}"
                [gpa] = [
                    region.gpa + address - base
                    for region, base in self.bases.items()
                    if base <= address < base + region.size
                ]
                with self._changed:
                    self.missed.append(page(gpa))
                    self._bring(page(gpa))
                    self._changed.notify_all()
        except Exception as error:
            self.failure = error


class LateGuest(SoftwareGuest):
    """A guest that arrives by postcopy: `taken` of its memory is missing when it starts.

    Everything if that is left out. What it sends before it connects lies in its transmitq already.
    `slots`: tell of memory by ADD_MEM_REG, as QEMU does, and not by SET_MEM_TABLE.
    """

    def __init__(self, *args: Any, slots: bool = False, **options: Any) -> None:
        options.setdefault("protocol_features", PAGEFAULT)
        super().__init__(*args, **by_subject(**options))
        self.other_side = OtherSide(self)
        self.slots = slots
        self.unsent: list[bytes] = []
        self.taken: set[int] | None = None
        self.receive_pages: set[int] = set()
        """Guest addresses of the pages of its posted receive buffers; not those of its rings."""
        self.moves = True

    def start_rings(self) -> None:
        if self.moves:
            self.moves = False
            frontend = self.frontend
            self.other_side.listen(advise(frontend))
            frontend.command(Request.POSTCOPY_LISTEN)
            if self.unsent:
                assert self.transmitqs[0].ring.send(self.unsent, 0, None) == len(self.unsent)
            self.receive_pages = {page(gpa) for gpa in posted(self)} - self.ring_pages()
            self.other_side.take(self.taken)
            # Once: reboots and the like tell of it in the usual way.
            frontend.set_mem_table = self._give_memory  # type: ignore[method-assign]
            try:
                super().start_rings()
            finally:
                del frontend.set_mem_table
        else:
            super().start_rings()

    def _give_memory(self, regions: list[MemRegion], fds: Sequence[int]) -> None:
        frontend = self.frontend
        if self.slots:
            for region, one, fd in zip(self.memory.regions, regions, fds, strict=True):
                reply = frontend.request(Request.ADD_MEM_REG, protocol.encode_mem_region(one), [fd])
                self.other_side.bases[region] = self._base(protocol.decode_mem_region(reply), one)
            last = Request.ADD_MEM_REG
        else:
            table = protocol.encode_mem_table(regions)
            reply = frontend.request(Request.SET_MEM_TABLE, table, fds)
            assert len(reply) == len(table)
            answers = protocol.decode_mem_table(reply)
            for region, one, answer in zip(self.memory.regions, regions, answers, strict=True):
                self.other_side.bases[region] = self._base(answer, one)
            last = Request.SET_MEM_TABLE
        frontend.send(last, protocol.encode_u64(0))

    @staticmethod
    def _base(answer: MemRegion, told: MemRegion) -> int:
        assert answer._replace(uva=told.uva) == told
        return answer.uva

    def end_postcopy(self) -> int:
        """Say that all has come; the switch's status."""
        return protocol.decode_u64(self.frontend.request(Request.POSTCOPY_END))

    def ring_pages(self) -> set[int]:
        """Guest addresses of the pages that its rings lie in."""
        found = set()
        for queue in self.queues():
            layout = queue.layout
            for start, length in (
                (layout.desc_gpa, 16 * layout.size),
                (layout.avail_gpa, 6 + 2 * layout.size),
                (layout.used_gpa, 6 + 8 * layout.size),
            ):
                found |= set(range(page(start), start + length, PAGE_LEN))
        return found

    def close(self) -> None:
        super().close()
        self.other_side.close()


def advise(frontend: Frontend) -> int:
    """Send POSTCOPY_ADVISE; the descriptor that came with the reply, -1 if none did."""
    frontend.send(Request.POSTCOPY_ADVISE)
    frontend.socket.settimeout(frontend.timeout)
    data, ancillary, _, _ = frontend.socket.recvmsg(protocol.HEADER_LEN, socket.CMSG_SPACE(4))
    header = protocol.decode_header(data)
    assert (header.request, header.is_reply, header.size) == (Request.POSTCOPY_ADVISE, True, 0)
    fds = array.array("i")
    for _, _, raw in ancillary:
        fds.frombytes(raw)
    if not fds:
        return -1
    os.set_blocking(fds[0], False)
    return fds[0]
