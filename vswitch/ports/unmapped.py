"""Regions of a guest's memory that are not mapped, for their files are not what workers may touch.

A worker that touches a page of tmpfs or hugetlbfs gets it from memory. On any other file system it
may wait for a disk, a network or somebody's process. Such a region may come with a memory table
(QEMU hands over the file of an NVDIMM like all others) and harms nothing; rings and buffers cannot
be in it.
"""

from __future__ import annotations

from collections.abc import Iterable

from vswitch.relay.link import Found
from vswitch.relay.wire import Kind
from vswitch.vhost_user.datapath import DatapathError
from vswitch.vhost_user.protocol import MemRegion

_HINT = (
    "rings and buffers must be on tmpfs or hugetlbfs (QEMU: -object memory-backend-memfd,share=on, "
    "or memory-backend-file with its mem-path on /dev/shm or hugetlbfs)"
)


class Unmapped:
    """Those of one port, with the words for what their files are."""

    def __init__(self) -> None:
        self._regions: list[tuple[MemRegion, str]] = []

    def takes(self, region: MemRegion, found: Found | None, index: int) -> bool:
        """Whether it is one of these. Raises DatapathError if it cannot be memory at all."""
        if found is None or found.kind is Kind.MEMORY:
            return False
        if found.kind is not Kind.FILE:
            raise DatapathError(
                f"region {index}: its file descriptor is not a file of shared memory "
                f"but {found.text}"
            )
        if region.mmap_offset + region.size > found.size:
            raise DatapathError(
                f"region {index}: mmap offset {region.mmap_offset:#x} plus size {region.size:#x} "
                f"is beyond the end of its file ({found.size:#x} bytes, {found.text})"
            )
        self._regions.append((region, found.text))
        return True

    def remove(self, region: MemRegion) -> bool:
        """Forget a region; whether it was one of these."""
        left = [one for one in self._regions if one[0] != region]
        found = len(left) < len(self._regions)
        self._regions = left
        return found

    def clear(self) -> None:
        self._regions = []

    def __len__(self) -> int:
        return len(self._regions)

    def why_no_ring(self, areas: Iterable[tuple[int, int]]) -> str | None:
        """Why a ring with such parts (user address, length) cannot run, if that is why."""
        for uva, length in areas:
            for region, text in self._regions:
                if uva < region.uva + region.size and region.uva < uva + length:
                    return (
                        f"its address {uva:#x} is in the guest's memory at {region.gpa:#x}, which "
                        f"is {text} and was not mapped: {_HINT}"
                    )
        return None

    def why_no_buffer(self, gpa: int) -> str | None:
        """Why nothing is mapped at a guest address, if that is why."""
        for region, text in self._regions:
            if region.gpa <= gpa < region.gpa + region.size:
                return (
                    f"the guest's memory at {region.gpa:#x} is {text} and was not mapped: {_HINT}"
                )
        return None
