"""Guest addresses to host pointers."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vswitch.fastpath.shared.sizes cimport MAX_REGIONS
from vswitch.fastpath.sys.atomics cimport vs_unlikely

cdef struct Region:
    uint64_t gpa           # guest physical address of the first byte, behind an IOMMU its IOVA
    uint64_t size          # bytes
    uint64_t uva           # the same byte in the frontend's address space
    char *host             # the same byte in ours

cdef struct MemTable:      # main; immutable once made
    uint32_t count
    uint16_t is_sorted     # by address, as those of an IOTLB are
    uint16_t physical      # of an IOTLB: its addresses are guest-physical, and pages may be missing
    uint64_t serial        # of an IOTLB's tables: another one for every change
    MemTable *read         # for what the device reads, where this one is for what it writes
    MemTable *known        # of an IOTLB: all there is in it, readable or writable or neither
    Region regions[MAX_REGIONS]  # or more: as many as were allocated

cdef struct Seg:           # a piece of memory
    char *ptr
    uint32_t len


cdef inline const Region *find_region(const MemTable *mem, uint64_t gpa, uint16_t *hint) noexcept nogil:
    """The region that holds an address, and its index in `hint`; NULL, and no change, if none does."""
    cdef uint32_t i, low = 0, high = mem.count
    if not mem.is_sorted:
        for i in range(mem.count):
            if gpa - mem.regions[i].gpa < mem.regions[i].size:
                hint[0] = <uint16_t>i
                return &mem.regions[i]
        return NULL
    while low < high:
        i = (low + high) >> 1
        if gpa - mem.regions[i].gpa < mem.regions[i].size:
            hint[0] = <uint16_t>i
            return &mem.regions[i]
        if mem.regions[i].gpa < gpa:
            low = i + 1
        else:
            high = i
    return NULL


cdef inline char *gpa_to_host(
    const MemTable *mem, uint64_t gpa, uint64_t length, uint64_t *contiguous, uint16_t *hint
) noexcept nogil:
    """Translate a guest physical address, or an IOVA by an IOTLB's table.

    `contiguous` receives how many of `length` bytes lie behind the pointer; it is less than
    `length` where the range runs on into a neighbouring region. NULL when `gpa` is in no region.
    `hint` is the index of the region tried first, and is updated. It may come from an earlier table
    of the same ring, and lies in what was allocated for this one: see `Memory` and `Iotlb`.

    Neither sum can wrap: `gpa - region.gpa` is below `region.size`, whose end was checked when the
    region was mapped.
    """
    cdef const Region *region = &mem.regions[hint[0]]
    cdef uint64_t offset = gpa - region.gpa
    if offset >= region.size:
        region = find_region(mem, gpa, hint)
        if vs_unlikely(region == NULL):
            return NULL
        offset = gpa - region.gpa
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
    cdef uint32_t i
    for i in range(mem.count):
        region = &mem.regions[i]
        offset = uva - region.uva
        if offset < region.size and length <= region.size - offset:
            return region.host + offset
    return NULL
