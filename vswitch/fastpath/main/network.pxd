from vswitch.fastpath.main.fdb cimport Fdb


cdef class Network:
    cdef readonly str name
    cdef readonly Fdb fdb
    cdef readonly bint learning
