from libc.stdint cimport uint32_t, uint64_t

from vswitch.fastpath.main.mapping cimport Memory
from vswitch.fastpath.shared.memory cimport MemTable


cdef struct Entry:            # one row of an IOTLB
    uint64_t iova
    uint64_t last             # its last byte, which may be the last of all
    uint64_t uva              # what `iova` is in the frontend's address space
    uint64_t stamp            # when it came; the oldest goes when there is no more room
    char *host                # the same byte in ours
    uint32_t access           # ACCESS_*, 0: nothing is there


cdef class IotlbTables:
    cdef Memory memory        # kept mapped for as long as a table points into it
    cdef MemTable *read
    cdef MemTable *write
    cdef MemTable *known
    cdef MemTable *for_ring(self, bint writing) noexcept


cdef class Iotlb:
    cdef readonly Memory memory
    cdef bint physical
    cdef Entry *entries       # sorted by address, none overlaps another
    cdef uint32_t count
    cdef uint32_t room        # entries allocated
    cdef uint32_t widest      # the most entries there have been: what tables are allocated for
    cdef uint64_t stamp
    cdef IotlbTables made     # of the present entries, None if they were not asked for yet

    cdef uint32_t _first(self, uint64_t address) noexcept
    cdef int _cut(self, uint64_t iova, uint64_t last) except -1
    cdef int _insert(self, Entry entry) except -1
    cdef void _remove(self, uint32_t at) noexcept
    cdef MemTable *_table(self, uint32_t wanted, uint32_t mask, uint64_t serial) except NULL
