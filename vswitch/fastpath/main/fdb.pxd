from libc.stdint cimport int32_t, uint32_t, uint64_t

from vswitch.fastpath.main.fdb_table cimport Shares, Table
from vswitch.fastpath.shared.fdb cimport FdbC, FdbEntryC


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
