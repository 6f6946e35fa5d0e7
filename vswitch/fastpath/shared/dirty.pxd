"""Dirty page logging, for live migration ("Migration" of the protocol document).

The frontend reads and clears the bitmap while it copies memory. A bit is set after the write it
stands for, never before: a page whose bit is cleared between the two would be copied without it.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vswitch.fastpath.shared.memory cimport MemTable, Region, Seg
from vswitch.fastpath.shared.ring cimport LogC, RingC
from vswitch.fastpath.sys.atomics cimport vs_set_bit, vs_unlikely

cdef enum:
    LOG_PAGE_SHIFT = 12  # VHOST_LOG_PAGE, whatever the host's pages are


cdef inline void log_range(const LogC *log, uint64_t gpa, uint64_t length) noexcept nogil:
    """Mark the pages of a guest-physical range. What lies beyond the log is left out."""
    cdef uint64_t page = gpa >> LOG_PAGE_SHIFT, last = gpa + (length - 1)
    if length == 0:
        return
    if vs_unlikely(last < gpa):
        last = <uint64_t>-1
    last >>= LOG_PAGE_SHIFT
    while page <= last and page >> 3 < log.len:
        vs_set_bit(&log.bits[page >> 3], <uint16_t>(page & 7))
        page += 1


cdef inline uint64_t log_piece(
    const LogC *log, const MemTable *mem, const char *host, uint64_t length
) noexcept nogil:
    """Mark what was written through a host pointer, up to its region's end; how much that was."""
    cdef const Region *region
    cdef uint64_t offset
    cdef uint32_t i
    for i in range(mem.count):
        region = &mem.regions[i]
        offset = <uint64_t>host - <uint64_t>region.host
        if offset < region.size:
            if length > region.size - offset:
                length = region.size - offset
            log_range(log, region.gpa + offset, length)
            return length
    return 0


cdef inline void log_host(const RingC *ring, const char *host, uint64_t length) noexcept nogil:
    """Mark what was written into a buffer; the range lies in one region."""
    log_piece(ring.dirty_log, ring.guest_mem, host, length)


cdef inline void log_own(const RingC *ring, const char *host, uint64_t length) noexcept nogil:
    """Mark what was written into the ring itself, whose parts may be in several pieces."""
    cdef uint64_t done
    while length:
        done = log_piece(ring.dirty_log, ring.own_mem, host, length)
        if vs_unlikely(done == 0):
            return
        host += done
        length -= done


cdef inline void log_segs(const RingC *ring, const Seg *segs, uint64_t length) noexcept nogil:
    """Mark the first `length` bytes of a chain's pieces."""
    cdef uint32_t i = 0
    cdef uint64_t part
    while length:
        part = segs[i].len
        if part > length:
            part = length
        log_host(ring, segs[i].ptr, part)
        length -= part
        i += 1


cdef inline void log_used(const RingC *ring, uint32_t offset, uint32_t length) noexcept nogil:
    """Mark a part of the used ring, of a packed ring the device's event suppression structure.

    Behind an IOMMU frontends give an IOVA for `log_gpa`, as QEMU and DPDK do, and the log is about
    guest-physical pages: the place is told by the pointer there.
    """
    if not ring.log_used:
        return
    if ring.mem == ring.guest_mem:
        log_range(ring.dirty_log, ring.log_gpa + offset, length)
    else:
        log_own(ring, <char *>ring.used_hdr + offset, length)


cdef inline void log_used_elements(RingC *ring, uint16_t first, uint16_t end) noexcept nogil:
    """Mark the elements from one free-running index up to another, and the index itself."""
    cdef uint32_t at = first & ring.mask, count = <uint16_t>(end - first)
    if count > ring.size:
        count = ring.size
    if at + count > ring.size:
        log_used(ring, 4, 8 * (at + count - ring.size))
        count = ring.size - at
    log_used(ring, 4 + 8 * at, 8 * count)
    log_used(ring, 2, 2)


cdef inline void log_packed(RingC *ring, uint16_t first, uint16_t end) noexcept nogil:
    """Mark a packed ring's descriptors from one position up to another, around if need be."""
    if not ring.log_used:
        return
    if end <= first:
        log_own(ring, <char *>&ring.desc[0], 16 * <uint64_t>end)
        end = ring.size
    log_own(ring, <char *>&ring.desc[first], 16 * <uint64_t>(end - first))
