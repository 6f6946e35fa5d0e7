"""Guest memory: memfd regions as a hypervisor would announce them, and an allocator over them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from vswitch.lab.guest.errors import GuestError
from vswitch.lab.guest.mapping import Mapping
from vswitch.vhost_user import protocol

PAGE_LEN = 4096
_GIB = 1 << 30


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Region:
    """One row of the memory table; addresses and `size` (bytes) are multiples of the page size.

    Regions with the same `file` share one memfd at different `mmap_offset`s, as QEMU's memory below
    and above 4 GiB does. `uva` is what the frontend calls its own address of the region: the
    protocol uses it for ring addresses only, so any number does that overlaps no other region.
    """

    gpa: int
    size: int
    uva: int
    mmap_offset: int = 0
    file: int = 0


def row(region: Region) -> protocol.MemRegion:
    """A region as the protocol has it."""
    return protocol.MemRegion(region.gpa, region.size, region.uva, region.mmap_offset)


def plain_layout(total_len: int) -> list[Region]:
    """One region from guest-physical address 0, like a small QEMU guest."""
    return [Region(0, round_up(total_len, PAGE_LEN), 0x7F00_0000_0000)]


def scattered_layout(count: int, total_len: int, largest_len: int) -> list[Region]:
    """`count` regions (1 to 8) that together have room for `total_len` bytes.

    They are laid out so that a translation that takes a short cut goes wrong: odd neighbours touch
    in guest-physical space but not in their files, pairs are apart by holes, user addresses descend
    while guest-physical ones ascend, files are shared and offsets in them differ from zero.
    `largest_len` is the greatest single allocation in bytes.
    """
    if not 1 <= count <= protocol.MAX_FDS:
        raise ValueError(f"{count} regions, must be 1 to {protocol.MAX_FDS}")
    if count == 1:
        return plain_layout(total_len)
    size = round_up(total_len // count + largest_len + PAGE_LEN, PAGE_LEN)
    regions = []
    gpa = 0
    for i in range(count):
        if i == 2:
            gpa = round_up(gpa, 4 * _GIB)
        elif i and i % 2 == 0:
            gpa += 16 * PAGE_LEN
        uva = 0x7F80_0000_0000 - (i + 1) * round_up(2 * size, _GIB) + i * PAGE_LEN
        file, place = i % 2, i // 2
        regions.append(Region(gpa, size, uva, (place + file) * (size + 2 * PAGE_LEN), file))
        gpa += size
    return regions


class GuestMemory:
    """The memory of one software guest: memfds, our mapping of them, and a simple allocator.

    Allocations spread over the regions (each goes where most room is left), so that the descriptors
    of one chain lie in different regions when there are several. There is no free(): `reset()`
    forgets all of them, as a guest's reboot does.

    `spare` are regions that a backend is told of only later (memory hot-plug): nothing is allocated
    from them before `plug`. Behind an IOMMU, all addresses here are I/O virtual, and the backend's
    memory table has guest-physical ones `gpa_offset` bytes above them.
    """

    def __init__(
        self, regions: Sequence[Region], spare: Sequence[Region] = (), gpa_offset: int = 0
    ) -> None:
        if not 1 <= len(regions) <= protocol.MAX_FDS:
            raise ValueError(f"{len(regions)} regions, must be 1 to {protocol.MAX_FDS}")
        self.regions = list(regions)
        self.gpa_offset = gpa_offset
        self._files: dict[int, int] = {}
        self._spare = list(spare)
        everything = [*self.regions, *self._spare]
        try:
            for region in everything:
                fd = self._files.get(region.file)
                if fd is None:
                    fd = os.memfd_create(f"vswitch-guest-{region.file}", os.MFD_CLOEXEC)
                    self._files[region.file] = fd
                end = region.mmap_offset + region.size
                if os.fstat(fd).st_size < end:
                    os.ftruncate(fd, end)
            self.mapping = Mapping([(r.gpa, r.size, self.fd(r), r.mmap_offset) for r in everything])
        except BaseException:
            self.close()
            raise
        self._used_len = [0] * len(self.regions)

    def fd(self, region: Region) -> int:
        """The memfd behind a region; stays ours."""
        return self._files[region.file]

    def table(self) -> tuple[list[protocol.MemRegion], list[int]]:
        """What SET_MEM_TABLE says: the regions, and one file descriptor for each."""
        rows = [row(r) for r in self.regions]
        rows = [one._replace(gpa=one.gpa + self.gpa_offset) for one in rows]
        return rows, [self.fd(r) for r in self.regions]

    def plug(self, region: Region) -> None:
        """Let a spare region be part of the table and of what is allocated from."""
        self._spare.remove(region)
        self.regions.append(region)
        self._used_len.append(0)

    def unplug(self, region: Region) -> None:
        """The opposite of `plug`. What was allocated there must not be used any more."""
        at = self.regions.index(region)
        del self.regions[at], self._used_len[at]
        self._spare.append(region)

    def allocate(self, length: int, align: int = 64) -> int:
        """Set `length` bytes aside and return their gpa. GuestError when no region has the room."""
        order = sorted(
            range(len(self.regions)), key=lambda i: self._used_len[i] - self.regions[i].size
        )
        for i in order:
            region = self.regions[i]
            start = round_up(region.gpa + self._used_len[i], align) - region.gpa
            if start + length <= region.size:
                self._used_len[i] = start + length
                return region.gpa + start
        raise GuestError(
            f"no region of the guest's memory has {length} bytes left",
            hint="give the guest larger regions, or fewer or smaller buffers",
        )

    def reset(self) -> None:
        """Forget every allocation; the bytes stay as they are."""
        self._used_len = [0] * len(self.regions)

    def uva(self, gpa: int) -> int:
        """The user address the memory table gives for a gpa. GuestError outside of all regions."""
        for region in self.regions:
            if region.gpa <= gpa < region.gpa + region.size:
                return gpa - region.gpa + region.uva
        raise GuestError(f"no region of the guest's memory holds gpa {gpa:#x}")

    def move(self, gpa: int, place: int) -> None:
        """Put the page that lies in the file where `place` did first behind another address.

        What was at `gpa` is there afterwards.
        """
        [region] = [r for r in self.regions if r.gpa <= place < r.gpa + r.size]
        content = self.read(gpa, PAGE_LEN)
        offset = region.mmap_offset + place - region.gpa
        self.mapping.move(gpa, PAGE_LEN, self.fd(region), offset)
        self.write(gpa, content)

    def read(self, gpa: int, length: int) -> bytes:
        return self.mapping.read(gpa, length)

    def write(self, gpa: int, data: bytes) -> None:
        self.mapping.write(gpa, data)

    def truncate(self, region: Region, length: int) -> None:
        """Cut the file behind a region to `length` bytes: every later access past it is SIGBUS.

        A hostile frontend does this after the backend has mapped the file. Our own process must not
        touch the lost part either.
        """
        os.ftruncate(self.fd(region), length)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the memfds. The mapping goes when the last queue that uses it does."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
