from libc.stdint cimport uint32_t, uint64_t

from vswitch.fastpath.main.iotlb cimport IotlbTables
from vswitch.fastpath.main.joined cimport RingPlace
from vswitch.fastpath.main.journal cimport Journal
from vswitch.fastpath.main.mapping cimport DirtyLog, Memory
from vswitch.fastpath.main.port cimport Port
from vswitch.fastpath.shared.ring cimport RingC


cdef class Ring:
    cdef RingC *c
    cdef readonly Port port
    cdef readonly Memory memory        # kept mapped for as long as the ring points into it
    cdef readonly IotlbTables iotlb    # what buffers are translated by; None without an IOMMU
    cdef readonly DirtyLog dirty_log   # kept mapped as well
    cdef readonly tuple areas          # of a started ring's parts: (user address, len) of each piece
    cdef RingPlace place               # kept mapped as well; None if its parts are in one piece each
    cdef readonly bint started
    cdef readonly bint published       # workers get to see it
    cdef bint moving          # unpublished only to go from one worker to another
    cdef Journal journal
    cdef readonly int worker  # which worker polls it (transmitqs)
    cdef int kick_fd
    cdef int _lie(self, Memory memory, unsigned int size, tuple parts, tuple pieces) except -1
    cdef int _go_on(self, uint32_t base, uint64_t identity) except -1
