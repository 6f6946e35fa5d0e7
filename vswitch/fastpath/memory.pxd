"""Guest addresses to host pointers."""

from libc.stdint cimport uint16_t, uint64_t

from vswitch.fastpath.types cimport MemTable, Region


cdef inline char *gpa_to_host(
    const MemTable *mem, uint64_t gpa, uint64_t length, uint64_t *contiguous, uint16_t *hint
) noexcept nogil:
    """Translate a guest physical address.

    `contiguous` receives how many of `length` bytes lie behind the pointer; it is less than
    `length` where the range runs on into a neighbouring region. NULL when `gpa` is in no region.
    `hint` is the index of the region tried first, and is updated.

    Neither sum can wrap: `gpa - region.gpa` is below `region.size`, whose end was checked when the
    region was mapped.
    """
    cdef const Region *region
    cdef uint64_t offset
    cdef uint16_t i
    region = &mem.regions[hint[0]]
    offset = gpa - region.gpa
    if offset >= region.size:
        for i in range(mem.count):
            region = &mem.regions[i]
            offset = gpa - region.gpa
            if offset < region.size:
                hint[0] = i
                break
        else:
            return NULL
    contiguous[0] = region.size - offset
    if contiguous[0] > length:
        contiguous[0] = length
    return region.host + offset


cdef inline char *uva_to_host(const MemTable *mem, uint64_t uva, uint64_t length) noexcept nogil:
    """Translate an address of the frontend; NULL unless all of `length` lies in one region.

    Rings are addressed this way (SET_VRING_ADDR) and must be contiguous.
    """
    cdef const Region *region
    cdef uint64_t offset
    cdef uint16_t i
    for i in range(mem.count):
        region = &mem.regions[i]
        offset = uva - region.uva
        if offset < region.size and length <= region.size - offset:
            return region.host + offset
    return NULL
