from libc.stdint cimport uint32_t, uint64_t

from vswitch.guest.driver cimport ReceiveQueue, TransmitQueue


cdef class NullBackend:
    cdef TransmitQueue tx
    cdef ReceiveQueue rx
    cdef uint32_t used_len
    cdef int stopping
    cdef readonly uint64_t forwarded
