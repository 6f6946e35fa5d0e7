"""Guest memory, mapped from the file descriptors that a frontend hands over."""

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

import os
import stat

from vswitch.fastpath.atomics cimport vs_load32
from vswitch.fastpath.memory cimport uva_to_host
from vswitch.fastpath.types cimport MAX_REGIONS, MemTable, Region

cdef extern from "sigbus.h" nogil:
    int vs_watch_sigbus()
    int vs_add_region(char *base, size_t len, uint32_t *lost)
    void vs_remove_region(int slot)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int madvise(void *addr, size_t length, int advice)
    int mincore(void *addr, size_t length, unsigned char *vec)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_NORESERVE, MADV_DONTDUMP
    void *MAP_FAILED

PAGE = os.sysconf("SC_PAGE_SIZE")
U64_END = 1 << 64


def _check_region(index, region, fd, earlier):
    """Raise ValueError unless the region can be mapped and addressed without surprises."""
    gpa, size, uva, offset = region
    if size == 0:
        raise ValueError(f"region {index}: size is 0")
    for name, start in (("guest address", gpa), ("user address", uva), ("mmap offset", offset)):
        if start + size > U64_END:
            raise ValueError(f"region {index}: {name} {start:#x} plus size {size:#x} wraps past 2^64")
    for other, (o_gpa, o_size, o_uva, _) in enumerate(earlier):
        if gpa < o_gpa + o_size and o_gpa < gpa + size:
            raise ValueError(f"region {index}: guest address {gpa:#x} overlaps region {other}")
        if uva < o_uva + o_size and o_uva < uva + size:
            raise ValueError(f"region {index}: user address {uva:#x} overlaps region {other}")
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(
            f"region {index}: its file descriptor is not a file of shared memory "
            f"(file type {stat.S_IFMT(info.st_mode):#o})"
        )
    if offset + size > info.st_size:
        raise ValueError(
            f"region {index}: mmap offset {offset:#x} plus size {size:#x} is beyond "
            f"the end of its file ({info.st_size:#x} bytes)"
        )
    return info


def watch_lost_memory():
    """Survive memory files that are truncated; returns an eventfd that is signalled when one was.

    Once a process; the descriptor is never closed. Threads that touch guest memory must not block
    SIGBUS.
    """
    cdef int fd = vs_watch_sigbus()
    if fd < 0:
        raise OSError(errno, os.strerror(errno))
    return fd


cdef class Memory:
    """The mapped regions of one frontend (SET_MEM_TABLE).

    `regions` is a list of (guest address, size, user address, mmap offset), sizes and offsets in
    bytes; `fds` holds one file descriptor each, which stay the caller's and may be closed
    afterwards. Raises ValueError naming the region, field and value for what no honest frontend
    sends, OSError when the kernel refuses to map.
    """

    def __cinit__(self, regions, fds):
        self.regions = []
        self.is_huge = []
        self.huge_empty = []
        self.table = <MemTable *>calloc(1, sizeof(MemTable))
        if self.table == NULL:
            raise MemoryError

    def __init__(self, regions, fds):
        if len(regions) != len(fds):
            raise ValueError(f"{len(regions)} regions came with {len(fds)} file descriptors")
        if len(regions) > MAX_REGIONS:
            raise ValueError(f"{len(regions)} regions, the most is {MAX_REGIONS}")
        for index, (region, fd) in enumerate(zip(regions, fds)):
            self._map(index, tuple(region), fd)

    def _map(self, index, region, int fd):
        info = _check_region(index, region, fd, self.regions)
        cdef uint64_t page = max(PAGE, info.st_blksize)
        cdef uint64_t gpa = region[0], size = region[1], uva = region[2], offset = region[3]
        # hugetlbfs wants file offset and length in whole huge pages; st_blksize tells their size.
        cdef uint64_t start = offset - offset % page
        cdef uint64_t length = (offset - start + size + page - 1) // page * page
        cdef void *base
        cdef Region *slot
        with nogil:
            base = mmap(
                NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, <long>start
            )
        if base == MAP_FAILED:
            raise OSError(errno, f"region {index}: mmap of {size:#x} bytes: {os.strerror(errno)}")
        # Guest memory is of no use in a core dump of the switch, and is somebody else's secret.
        madvise(base, length, MADV_DONTDUMP)
        slot = &self.table.regions[self.table.count]
        slot.gpa = gpa
        slot.size = size
        slot.uva = uva
        slot.host = <char *>base + (offset - start)
        slot.map_base = base
        slot.map_len = length
        slot.slot = vs_add_region(<char *>base, length, &self.table.lost)
        self.table.count += 1
        self.regions.append(region)
        self.is_huge.append(page > <uint64_t>PAGE)
        self.huge_empty.append(info.st_blocks == 0)

    def is_hole(self, uint64_t uva, uint64_t length):
        """True when no page behind a user address range was ever written.

        A driver has always written its rings before it starts them. When the file has no page
        there, the guest's writes went elsewhere: its memory is mapped privately, without share=on.
        """
        cdef char *host
        cdef unsigned char present
        cdef uint64_t page = PAGE, at
        cdef size_t i
        for i in range(self.table.count):
            if uva - self.table.regions[i].uva < self.table.regions[i].size:
                break
        else:
            return False
        # mincore() looks into the file for ordinary shared memory, but only into our own page
        # table for huge pages; there the file as a whole must do.
        if self.is_huge[i]:
            return self.huge_empty[i]
        host = uva_to_host(self.table, uva, length)
        if host == NULL:
            return False
        at = <uint64_t>host - <uint64_t>host % page
        while at < <uint64_t>host + length:
            if mincore(<void *>at, page, &present) < 0 or present & 1:
                return False
            at += page
        return True

    @property
    def lost(self):
        """True once memory was found missing: its owner truncated the file. It reads as zero now."""
        return bool(vs_load32(&self.table.lost))

    cdef void _unmap(self, Region *region) noexcept:
        vs_remove_region(region.slot)
        munmap(region.map_base, region.map_len)

    def close(self):
        """Unmap. No worker may know of this memory any more."""
        cdef uint64_t i
        for i in range(self.table.count):
            self._unmap(&self.table.regions[i])
        self.table.count = 0
        self.regions = []

    def __dealloc__(self):
        cdef uint64_t i
        if self.table != NULL:
            for i in range(self.table.count):
                self._unmap(&self.table.regions[i])
            free(self.table)
