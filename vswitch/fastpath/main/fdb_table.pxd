from libc.stdint cimport uint32_t, uint64_t

from vswitch.fastpath.shared.fdb cimport FdbC, FdbEntryC, FdbTable
from vswitch.fastpath.shared.sizes cimport MAX_PORTS

cdef enum:
    ORDER_BITS = 24  # of a place in the order of a listing; the largest table has 2**19 buckets


cdef uint64_t backwards(uint64_t at, int bits) noexcept


cdef class Shares:
    cdef uint32_t learned[MAX_PORTS]
    cdef uint32_t learned_max[MAX_PORTS]
    cdef uint32_t statics[MAX_PORTS]  # the main thread's alone, who makes and removes them


cdef class Table:
    cdef FdbTable c
    cdef bint take(self, const FdbC *fdb, const FdbEntryC *entry, int which) noexcept nogil
