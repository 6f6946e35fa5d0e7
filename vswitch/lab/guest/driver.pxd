from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from vswitch.lab.guest.mapping cimport Mapping
from vswitch.lab.guest.vring cimport Desc, Piece, Ring


cdef class VirtQueue:
    cdef Ring ring
    cdef readonly Mapping mapping
    cdef readonly str name
    cdef readonly uint32_t header_len
    cdef readonly uint64_t frames
    cdef readonly uint64_t bytes
    cdef readonly uint64_t kicks
    cdef readonly uint32_t slots
    cdef uint32_t max_pieces    # pieces a slot
    cdef uint32_t slot_len      # bytes the pieces of a slot hold together
    cdef Piece *pieces          # `max_pieces` for each slot
    cdef Desc **tables          # indirect table of each slot, or NULL: no indirect descriptors
    cdef uint64_t *table_gpas
    cdef uint32_t *free_slots   # a stack
    cdef uint32_t num_free_slots

    cdef int lay_split(
        self, Mapping mapping, uint64_t desc_gpa, uint64_t avail_gpa, uint64_t used_gpa
    ) except -1
    cdef int lay_packed(
        self, Mapping mapping, uint64_t desc_gpa, uint64_t avail_gpa, uint64_t used_gpa
    ) except -1
    cdef Piece *slot_pieces(self, uint32_t slot) noexcept nogil
    cdef int32_t add(self, uint32_t slot, Piece *pieces, uint32_t n, bint writable) noexcept nogil
    cdef object broken(self, int rule)


cdef class TransmitQueue(VirtQueue):
    cdef void write_slot(
        self, uint32_t slot, uint32_t offset, const uint8_t *data, uint32_t length
    ) noexcept nogil
    cdef uint32_t lay(self, uint32_t slot, Piece *chain, uint32_t total) noexcept nogil


cdef class ReceiveQueue(VirtQueue):
    cdef readonly bint mergeable
    cdef readonly uint32_t guard_len
    cdef public bint strict
    cdef bytes gather(self, uint32_t slot, uint32_t offset, uint32_t end)
    cdef uint32_t take(self, uint32_t *length, uint32_t least) except *
    cdef int check_guard(self, uint32_t slot, uint32_t length) except -1
