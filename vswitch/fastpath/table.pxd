from libc.stdint cimport int32_t, uint32_t

from vswitch.fastpath.types cimport FdbC


cdef class Fdb:
    cdef FdbC *c
    cdef void _lock(self) noexcept nogil
    cdef _sweep(self, int32_t port, bint statics, uint32_t limit, list gone)
