from libc.stdint cimport uint8_t, uint64_t


cdef class Mapping:
    cdef uint8_t *base        # host address of guest-physical address `lowest_gpa`
    cdef readonly uint64_t lowest_gpa
    cdef readonly uint64_t span_len
    cdef list spans           # (first gpa, end gpa) of what is backed, adjacent regions joined

    cdef uint8_t *at(self, uint64_t gpa, uint64_t length) except NULL
