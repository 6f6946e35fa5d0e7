from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vswitch.lab.guest.driver cimport ReceiveQueue, TransmitQueue
from vswitch.lab.guest.vring cimport Ring


cdef struct Side:              # the device's place in one ring
    Ring ring                  # a copy of what stays as it is: the driver writes to its own all the time
    uint16_t at                # next chain to take: free-running index, or position
    uint16_t wrap              # packed: wrap counter of the position
    uint16_t avail_idx         # split: avail.idx as last read


cdef class NullBackend:
    cdef TransmitQueue tx
    cdef ReceiveQueue rx
    cdef uint32_t used_len
    cdef uint16_t burst
    cdef uint32_t patience
    cdef int stopping
    cdef readonly uint64_t forwarded

    cdef Side begin(self, Ring *ring) noexcept nogil
