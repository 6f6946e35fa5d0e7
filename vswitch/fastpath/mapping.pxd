from vswitch.fastpath.types cimport MemTable


cdef class Memory:
    cdef MemTable *table
    cdef readonly list regions
