from vswitch.lab.guest.driver cimport ReceiveQueue, TransmitQueue
from vswitch.lab.load.flow cimport FlowC


cdef class Flow:
    cdef FlowC c
    cdef readonly TransmitQueue tx
    cdef readonly ReceiveQueue rx
    cdef readonly list frames
