from libc.stdint cimport uint32_t

from vswitch.fastpath.shared.worker cimport WorkerC


cdef class Worker:
    cdef WorkerC *c
    cdef readonly int id
    cdef _check(self, uint32_t most)
