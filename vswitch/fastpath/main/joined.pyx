"""Rings whose pages are neighbours for their driver only.

Behind an IOMMU a driver sees its ring in one piece of I/O virtual addresses, and the pages behind
them lie anywhere in its memory. Workers want one piece too, so those pages are mapped once more,
side by side. Nothing of the ring is copied: both mappings are of the same file.
"""

cimport cython
from libc.errno cimport ENOMEM, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

import os

from vswitch.fastpath.main.mapping cimport Mapped, Memory, SharedFile
from vswitch.fastpath.shared.memory cimport MemTable, Region, uva_to_host
from vswitch.fastpath.shared.sizes cimport MAX_REGIONS

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    void *mremap(void *old_address, size_t old_size, size_t new_size, int flags, void *new_address)
    int PROT_NONE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MREMAP_MAYMOVE, MREMAP_FIXED
    void *MAP_FAILED

PIECES_MAX = 16384
"""The most pieces that are mapped in all. Each is a mapping of its own, and Linux lets a process have
65530 of them by default, which everybody's regions, stacks and heaps are among."""

cdef uint64_t PAGE = os.sysconf("SC_PAGE_SIZE")
cdef uint32_t in_use = 0


def pieces_in_use():
    """How many pieces of rings are mapped now, of all ports."""
    return in_use


cdef Mapped _region_of(Memory memory, uint64_t uva, uint64_t length):
    """The region that a piece lies in, None if it is in no single one."""
    cdef Mapped one
    for one in memory.mapped:
        if uva - one.c.uva < one.c.size and length <= one.c.size - (uva - one.c.uva):
            return one
    return None


def why_apart(Memory memory not None, pieces):
    """Why pieces cannot be mapped side by side, as a text for people; None when they can.

    `pieces` are (user address, size in bytes), in the ring's order.
    """
    cdef Mapped one
    cdef uint64_t uva, length, host, skew = 0, done = 0
    for uva, length in pieces:
        one = _region_of(memory, uva, length)
        if one is None:
            return f"its piece at user address {uva:#x} ({length} bytes) is in no region"
        if one.page > PAGE:
            # mremap(2) makes no second mapping of those, and parts of one cannot be mapped at all.
            return (
                f"the guest's memory is in huge pages of {one.page >> 10} KiB: give this guest memory "
                "in ordinary pages (memory-backend-memfd without hugetlb=on), or boot its kernel "
                "with iommu=pt"
            )
        host = <uint64_t>one.c.host + (uva - one.c.uva)
        if done == 0:
            skew = host % PAGE
        elif host % PAGE or (skew + done) % PAGE:
            return (
                f"its piece at user address {uva:#x} does not begin a page of {PAGE} bytes: only "
                "whole pages can be mapped side by side"
            )
        done += length
    return None


@cython.no_gc_clear
cdef class Joined(SharedFile):
    """One part of a ring, in one piece of our address space, guarded and watched as a region is.

    Raises ValueError when it cannot be, OSError when the kernel refuses. Unmapped with the object,
    of which no worker may have a pointer any more.
    """

    def __cinit__(self, Memory memory not None, pieces):
        global in_use
        cdef Mapped one
        cdef uint64_t uva, length, host, first, size, total, skew, at
        cdef char *base
        cdef void *reserved
        pieces = tuple(pieces)
        problem = why_apart(memory, pieces)
        if problem is not None:
            raise ValueError(problem)
        if in_use + len(pieces) > PIECES_MAX:
            raise OSError(
                ENOMEM, f"rings of all guests are in {in_use} pieces already, of {PIECES_MAX} at most"
            )
        regions = [_region_of(memory, uva, length) for uva, length in pieces]
        one = regions[0]
        skew = (<uint64_t>one.c.host + (<uint64_t>pieces[0][0] - one.c.uva)) % PAGE
        total = skew + <uint64_t>sum([length for _, length in pieces])
        total = (total + PAGE - 1) // PAGE * PAGE
        # A page that nobody can use before it, and one behind it.
        self.guard_len = total + 2 * PAGE
        with nogil:
            reserved = mmap(
                NULL, self.guard_len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
            )
        if reserved == MAP_FAILED:
            raise OSError(errno, f"address space for {total} bytes: {os.strerror(errno)}")
        self.guard_base = reserved
        base = <char *>reserved + PAGE
        at = 0
        for one, (uva, length) in zip(regions, pieces):
            host = <uint64_t>one.c.host + (uva - one.c.uva)
            first = host - host % PAGE
            size = (host + length - first + PAGE - 1) // PAGE * PAGE
            # Of a shared mapping, an old size of 0 makes another one of the same pages (mremap(2)):
            # descriptors of the memory's files need not be kept.
            if mremap(
                <void *>first, 0, size, MREMAP_MAYMOVE | MREMAP_FIXED, base + at
            ) == MAP_FAILED:
                raise OSError(errno, f"mapping {size} bytes once more: {os.strerror(errno)}")
            at += size
        self.regions = tuple(regions)
        self.kept = self.regions  # goes after the mapping: this is not the files' last use
        self.map_base = base
        self.map_len = total
        # Its truncation is that of the memory: who looks there learns of it.
        self._watch("a ring", base, total, &(<Mapped>regions[0]).lost)
        self.host = base + skew
        self.pieces = len(pieces)
        in_use += self.pieces

    def __dealloc__(self):
        global in_use
        in_use -= self.pieces


cdef class RingPlace:
    """Where the parts of a ring lie that are not in one piece each.

    `parts` are, in the ring's order, each a tuple of pieces as of Joined. Raises as Joined does.
    """

    def __cinit__(self, Memory memory not None, parts):
        cdef Joined joined
        cdef Mapped one
        cdef Region *region
        cdef uint64_t uva, length
        cdef char *host
        cdef size_t count = sum([len(part) for part in parts])
        cdef size_t extra = count - MAX_REGIONS if count > MAX_REGIONS else 0
        self.memory = memory
        self.table = <MemTable *>calloc(1, sizeof(MemTable) + extra * sizeof(Region))
        if self.table == NULL:
            raise MemoryError
        made = []
        for i, part in enumerate(parts):
            if len(part) > 1:
                joined = Joined(memory, part)
                made.append(joined)
                host = joined.host
            else:
                uva, length = part[0]
                host = uva_to_host(memory.table, uva, length)
                if host == NULL:
                    raise ValueError(f"its part at user address {uva:#x} is in no region")
            self.hosts[i] = host
            for uva, length in part:
                one = _region_of(memory, uva, length)
                region = &self.table.regions[self.table.count]
                region.gpa = one.c.gpa + (uva - one.c.uva)
                region.size = length
                region.uva = uva
                region.host = host
                self.table.count += 1
                host += length
        self.joined = tuple(made)

    def __dealloc__(self):
        free(self.table)
