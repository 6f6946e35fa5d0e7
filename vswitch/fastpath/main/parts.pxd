from libc.stdint cimport uint32_t, uint64_t

from vswitch.fastpath.main.joined cimport RingPlace
from vswitch.fastpath.main.mapping cimport Memory


cdef tuple ring_parts(
    unsigned int size, uint64_t desc_uva, uint64_t used_uva, uint64_t avail_uva, uint32_t base,
    bint packed,
)
cdef RingPlace find_parts(char **hosts, Memory memory, unsigned int size, tuple parts, tuple pieces)
