from libc.stdint cimport int32_t, uint32_t, uint64_t

from vswitch.fastpath.shared.fdb cimport FdbC, FdbEntryC, FdbTable
from vswitch.fastpath.shared.sizes cimport MAX_PORTS


cdef class Shares:
    cdef uint32_t learned[MAX_PORTS]
    cdef uint32_t learned_max[MAX_PORTS]
    cdef uint32_t statics[MAX_PORTS]  # the main thread's alone, who makes and removes them


cdef class Table:
    cdef FdbTable c
    cdef bint take(self, const FdbC *fdb, const FdbEntryC *entry, int which) noexcept nogil


cdef class Fdb:
    cdef FdbC *c
    cdef Table table           # the present one
    cdef Shares shares
    cdef uint64_t buckets_max
    cdef void _lock(self) noexcept nogil
    cdef void _remove(self, FdbEntryC *entry) noexcept
    cdef Table _of(self, uint64_t buckets)
    cdef bint _copy(self, Table old, Table table) noexcept
    cdef _sweep(self, uint64_t start, int32_t port, bint statics, uint32_t limit, list gone)
