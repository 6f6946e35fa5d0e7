from vswitch.fastpath.main.journal cimport Journal
from vswitch.fastpath.shared.port cimport PortC


cdef class Port:
    cdef PortC *c
    cdef readonly str name
    cdef readonly Journal journal  # of its rings
    cdef readonly dict rings  # by vring index
    cdef readonly bint removed         # to be left out of what is published
