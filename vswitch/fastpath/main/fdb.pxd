from libc.stdint cimport int32_t, uint32_t, uint64_t

from vswitch.fastpath.shared.fdb cimport FdbC, FdbEntryC
from vswitch.fastpath.shared.sizes cimport MAX_PORTS


cdef class Fdb:
    cdef FdbC *c
    cdef uint32_t statics[MAX_PORTS]  # the main thread's alone, who makes and removes them
    cdef void _lock(self) noexcept nogil
    cdef void _remove(self, FdbEntryC *entry) noexcept
    cdef _sweep(self, uint64_t start, int32_t port, bint statics, uint32_t limit, list gone)
