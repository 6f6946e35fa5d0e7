"""The device side of a split virtqueue: taking chains, giving them back, notifications.

VIRTIO 1.2, section 2.7. Ring memory belongs to the guest: every field is read once, into a private
copy, and checked there.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vswitch.fastpath.atomics cimport (
    vs_fence,
    vs_get32,
    vs_get64,
    vs_likely,
    vs_load16,
    vs_load_acquire16,
    vs_load_int,
    vs_store16,
    vs_store_release16,
    vs_store_release32,
    vs_unlikely,
)
from vswitch.fastpath.memory cimport gpa_to_host
from vswitch.fastpath.types cimport (
    FAULT_ADDRESS,
    FAULT_AVAIL_IDX,
    FAULT_CHAIN_LEN,
    FAULT_DIRECTION,
    FAULT_HEAD,
    FAULT_INDIRECT_LEN,
    FAULT_INDIRECT_NESTED,
    FAULT_INDIRECT_UNOFFERED,
    FAULT_NEXT,
    MAX_CHAIN,
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
    Counters,
    Fault,
    RingC,
    Seg,
    VringDesc,
)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *buf, size_t count)


cdef inline void ring_fault(
    RingC *ring, Fault fault, uint64_t value, uint64_t detail
) noexcept nogil:
    """Stop a ring for good; the worker loop reports it to the main thread."""
    ring.fault_value = value
    ring.fault_detail = detail
    # Release: whoever sees the fault sees its value. Pairs with the acquire load in engine.pyx.
    vs_store_release32(&ring.fault, fault)


cdef inline void read_desc(VringDesc *out, const VringDesc *desc) noexcept nogil:
    """A private copy, each half read once."""
    cdef uint64_t tail
    out.addr = vs_get64(&desc.addr)
    tail = vs_get64(&desc.len)
    out.len = <uint32_t>tail
    out.flags = <uint16_t>(tail >> 32)
    out.next = <uint16_t>(tail >> 48)


cdef inline uint16_t ring_room(RingC *ring, uint16_t wanted) noexcept nogil:
    """How many avail entries can be taken, at least `wanted` if the driver has offered as many.

    The driver's index is a cache line that its core writes, so it is read again only when what we
    know of does not suffice. Faults the ring when the index claims more than the ring holds.
    """
    cdef uint16_t room = ring.cached_avail - ring.last_avail
    if room < wanted:
        # Acquire: entries and descriptors are read after the index. Pairs with the driver's write
        # barrier before it moves avail.idx (2.7.13.3.1).
        ring.cached_avail = vs_load_acquire16(ring.avail + 1)
        room = ring.cached_avail - ring.last_avail
        if vs_unlikely(room > ring.size):
            ring_fault(ring, FAULT_AVAIL_IDX, ring.cached_avail, ring.last_avail)
            ring.cached_avail = ring.last_avail
            return 0
    return room


cdef inline int add_segment(
    RingC *ring, const VringDesc *desc, Seg *segs, uint32_t *n_segs, uint32_t limit
) noexcept nogil:
    """Append the host pieces of one descriptor's buffer; -1 after faulting the ring."""
    cdef uint64_t gpa = desc.addr, left = desc.len, contiguous
    cdef char *host
    while left:
        host = gpa_to_host(ring.mem, gpa, left, &contiguous, &ring.region_hint)
        if vs_unlikely(host == NULL):
            ring_fault(ring, FAULT_ADDRESS, desc.addr, desc.len)
            return -1
        if vs_unlikely(n_segs[0] >= limit):
            ring_fault(ring, FAULT_CHAIN_LEN, n_segs[0], ring.size)
            return -1
        segs[n_segs[0]].ptr = host
        segs[n_segs[0]].len = <uint32_t>contiguous
        n_segs[0] += 1
        gpa += contiguous
        left -= contiguous
    return 0


cdef inline int walk_chain(
    RingC *ring, uint16_t head, const VringDesc *first, uint16_t want_write, Seg *segs, uint32_t limit
) noexcept nogil:
    """Turn the chain that starts at `head` into host pieces; `first` is a copy of its descriptor.

    Returns the number of pieces, none of them empty, or -1 after faulting the ring: a chain longer
    than the ring or MAX_CHAIN (2.7.5), a `next` beyond its table, a buffer outside guest memory, a
    buffer in the wrong direction (`want_write` is VRING_DESC_F_WRITE or 0), a nested, empty, odd or
    unoffered indirect table (2.7.5.3).
    """
    cdef VringDesc desc = first[0]
    cdef VringDesc raw
    cdef uint32_t n_segs = 0, table_size = ring.size, walked = 0, index = head, entry
    cdef uint64_t contiguous, table_gpa = 0
    cdef bint indirect = False
    cdef char *host
    while True:
        walked += 1
        if vs_unlikely(walked > table_size or walked > MAX_CHAIN):
            ring_fault(ring, FAULT_CHAIN_LEN, walked, table_size)
            return -1
        if desc.flags & VRING_DESC_F_INDIRECT:
            if indirect or desc.flags & VRING_DESC_F_NEXT:
                ring_fault(ring, FAULT_INDIRECT_NESTED, desc.flags, index)
                return -1
            if not ring.indirect:
                ring_fault(ring, FAULT_INDIRECT_UNOFFERED, desc.flags, index)
                return -1
            if desc.len == 0 or desc.len & 15 or desc.len > 16 * 32768:
                ring_fault(ring, FAULT_INDIRECT_LEN, desc.len, index)
                return -1
            indirect = True
            table_gpa = desc.addr
            table_size = desc.len >> 4
            walked = 0
            index = 0
        else:
            if vs_unlikely((desc.flags & VRING_DESC_F_WRITE) != want_write):
                ring_fault(ring, FAULT_DIRECTION, desc.flags, index)
                return -1
            if add_segment(ring, &desc, segs, &n_segs, limit) < 0:
                return -1
            if not desc.flags & VRING_DESC_F_NEXT:
                return n_segs
            index = desc.next
            if vs_unlikely(index >= table_size):
                ring_fault(ring, FAULT_NEXT, index, table_size)
                return -1
        if not indirect:
            read_desc(&desc, &ring.desc[index])
            continue
        # An entry of an indirect table may lie across the border of two regions.
        entry = 0
        while entry < 16:
            host = gpa_to_host(
                ring.mem, table_gpa + 16 * <uint64_t>index + entry, 16 - entry,
                &contiguous, &ring.region_hint,
            )
            if vs_unlikely(host == NULL):
                ring_fault(ring, FAULT_ADDRESS, table_gpa + 16 * <uint64_t>index, 16)
                return -1
            if vs_likely(contiguous == 16):
                read_desc(&desc, <VringDesc *>host)
                break
            copy_bytes(<char *>&raw + entry, host, <uint32_t>contiguous)
            entry += <uint32_t>contiguous
            if entry == 16:
                desc = raw


cdef inline void copy_bytes(char *to, const char *source, uint32_t length) noexcept nogil:
    """For the few bytes that lie across a border; one read a byte."""
    cdef uint32_t i
    for i in range(length):
        to[i] = source[i]


cdef inline void put_used(RingC *ring, uint16_t head, uint32_t length) noexcept nogil:
    """Write the next used element; the driver sees it with publish_used."""
    ring.used[ring.last_used & ring.mask].id = head
    ring.used[ring.last_used & ring.mask].len = length
    ring.last_used += 1


cdef inline void publish_used(RingC *ring) noexcept nogil:
    # Release: elements and buffers before the index. Pairs with the driver's read barrier after it
    # read used.idx (2.7.14).
    vs_store_release16(ring.used_hdr + 1, ring.last_used)


cdef inline void notify_driver(RingC *ring, Counters *counters) noexcept nogil:
    """Signal the call eventfd if the driver wants to hear of what was just published (2.7.7).

    At most one system call, and none while the driver polls.
    """
    cdef uint16_t event, old
    cdef uint64_t one = 1
    cdef int fd
    # Full fence: used.idx is visible before used_event or the flags are read. Pairs with the
    # driver's fence between writing used_event (or clearing NO_INTERRUPT) and reading used.idx.
    vs_fence()
    if ring.event_idx:
        old = ring.signalled
        ring.signalled = ring.last_used
        if vs_likely(ring.signalled_valid):
            event = vs_load16(ring.used_event)
            if vs_likely(
                <uint16_t>(ring.last_used - event - 1) >= <uint16_t>(ring.last_used - old)
            ):
                return
        ring.signalled_valid = 1
    elif vs_load16(ring.avail) & VRING_AVAIL_F_NO_INTERRUPT:
        return
    fd = vs_load_int(&ring.call_fd)
    if fd >= 0:
        # A full counter (EAGAIN) means that a notification is pending already.
        write(fd, &one, 8)
        counters.calls += 1


cdef inline void want_kicks(RingC *ring) noexcept nogil:
    """Ask the driver to kick (2.7.10). The caller fences and looks at avail.idx once more."""
    if ring.event_idx:
        vs_store16(ring.avail_event, ring.last_avail)
    else:
        vs_store16(ring.used_hdr, 0)
    ring.armed = 1


cdef inline void refuse_kicks(RingC *ring) noexcept nogil:
    """Polling again: with EVENT_IDX the driver stays silent as long as avail_event stands still."""
    if not ring.event_idx:
        vs_store16(ring.used_hdr, VRING_USED_F_NO_NOTIFY)
    ring.armed = 0
