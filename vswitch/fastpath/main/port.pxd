from libc.stdint cimport uint8_t

from vswitch.fastpath.main.journal cimport Journal
from vswitch.fastpath.main.network cimport Network
from vswitch.fastpath.shared.port cimport PortC


cdef class Port:
    cdef PortC *c
    cdef readonly str name
    cdef readonly Journal journal  # of its rings
    cdef readonly dict rings  # by vring index
    cdef readonly bint removed         # to be left out of what is published
    cdef public bint paused            # so is this, for as long as it is
    cdef readonly Network network      # that it is in; None: in none
    cdef readonly Port peer            # at the other end of its cable; None: no cable, or nobody there
    cdef int _stage(self, uint8_t stage, bint on) except -1
