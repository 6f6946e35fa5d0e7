from libc.stdint cimport uint32_t

from vswitch.fastpath.shared.view cimport View


cdef class Shown:
    cdef View *view            # freed with this object


cdef View *build_view(dict ports, uint32_t n_workers) except NULL
