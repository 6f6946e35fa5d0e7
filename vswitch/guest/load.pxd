from vswitch.guest.driver cimport ReceiveQueue, TransmitQueue
from vswitch.guest.flow cimport FlowC


cdef class Flow:
    cdef FlowC c
    cdef readonly TransmitQueue tx
    cdef readonly ReceiveQueue rx
    cdef readonly list frames
