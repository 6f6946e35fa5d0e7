from libc.stdint cimport uint16_t

from vswitch.fastpath.shared.ring cimport JournalC, RingC


cdef class Journal:
    cdef readonly int size
    cdef void *base
    cdef size_t length
    cdef JournalC *slot(self, int index) noexcept


cdef bint recover_packed(RingC *ring, uint16_t base) noexcept
cdef void recover_split(RingC *ring) noexcept
