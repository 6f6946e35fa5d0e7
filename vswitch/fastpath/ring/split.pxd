"""Split virtqueues: the device's side (VIRTIO 1.2, section 2.7).

What the rest calls, whatever format a ring has, is in dispatch.pxd, and described there.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vswitch.fastpath.ring.notes cimport note_taken
from vswitch.fastpath.shared.chain cimport (
    add_segment,
    check_indirect,
    copy_desc,
    locate_buffer,
    read_desc,
    read_indirect,
    ring_fault,
)
from vswitch.fastpath.shared.dirty cimport log_used, log_used_elements
from vswitch.fastpath.shared.memory cimport Seg
from vswitch.fastpath.shared.ring cimport Cursor, RingC
from vswitch.fastpath.shared.sizes cimport MAX_CHAIN, SEG_POOL
from vswitch.fastpath.shared.virtio cimport (
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
    VringDesc,
    VringUsedElem,
)
from vswitch.fastpath.shared.words cimport (
    FAULT_AVAIL_IDX,
    FAULT_CHAIN_LEN,
    FAULT_DIRECTION,
    FAULT_HEAD,
    FAULT_INDIRECT_NESTED,
    FAULT_NEXT,
)
from vswitch.fastpath.shared.worker cimport FrameTaker, WorkerC
from vswitch.fastpath.sys.atomics cimport (
    vs_load16,
    vs_load_acquire16,
    vs_prefetch,
    vs_prefetch_write,
    vs_put64,
    vs_store16,
    vs_store_release16,
    vs_unlikely,
)

cdef enum:
    USED_A_LINE = 8        # used elements in a cache line


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


cdef inline int next_split(
    RingC *ring, const Cursor *at, uint16_t *head, VringDesc *first
) noexcept nogil:
    """As next_offered."""
    cdef uint16_t wanted = <uint16_t>(at.position - ring.last_avail) + 1
    if ring_room(ring, wanted) < wanted:
        return -1 if ring.fault else 0
    head[0] = vs_load16(ring.avail + 2 + (at.position & ring.mask))
    if vs_unlikely(head[0] >= ring.size):
        ring_fault(ring, FAULT_HEAD, head[0], ring.size)
        return -1
    read_desc(first, &ring.desc[head[0]])
    return 1


cdef inline int walk_split(
    RingC *ring, uint32_t index, const VringDesc *first, uint16_t want_write, Seg *segs, uint32_t limit
) noexcept nogil:
    cdef VringDesc desc
    cdef uint32_t n_segs = 0, table_size = ring.size, walked = 0
    cdef uint64_t table_gpa = 0
    cdef bint indirect = False
    copy_desc(&desc, first)
    while True:
        walked += 1
        ring.walked += 1
        if vs_unlikely(walked > table_size or walked > MAX_CHAIN):
            ring_fault(ring, FAULT_CHAIN_LEN, walked, table_size)
            return -1
        if desc.flags & VRING_DESC_F_INDIRECT:
            if indirect:
                ring_fault(ring, FAULT_INDIRECT_NESTED, desc.flags, index)
                return -1
            if check_indirect(ring, &desc, index) < 0:
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
        elif read_indirect(ring, &desc, table_gpa, index) < 0:
            return -1


cdef inline void prefetch_used(RingC *ring, uint16_t n) noexcept nogil:
    """Fetch the lines for the next `n` used elements of a split ring, which the driver has read."""
    cdef uint32_t i = 0
    while i < <uint32_t>n + USED_A_LINE - 1:
        vs_prefetch_write(&ring.used[<uint16_t>(ring.last_used + i) & ring.mask])
        i += USED_A_LINE


cdef inline void log_event_split(const RingC *ring) noexcept nogil:
    """Mark where want_kicks_split and refuse_kicks_split write."""
    if ring.event_idx:
        log_used(ring, 4 + 8 * <uint32_t>ring.size, 2)
    else:
        log_used(ring, 0, 4)


cdef inline void want_kicks_split(RingC *ring) noexcept nogil:
    """As want_kicks (2.7.10)."""
    if ring.event_idx:
        vs_store16(ring.avail_event, ring.last_avail)
    else:
        vs_store16(ring.used_hdr, 0)
    ring.armed = 1
    if vs_unlikely(ring.dirty_log != NULL):
        log_event_split(ring)


cdef inline void refuse_kicks_split(RingC *ring) noexcept nogil:
    """With EVENT_IDX the driver stays silent by itself as long as avail_event stands still."""
    if not ring.event_idx:
        vs_store16(ring.used_hdr, VRING_USED_F_NO_NOTIFY)
    ring.armed = 0
    if vs_unlikely(ring.dirty_log != NULL):
        log_event_split(ring)


cdef inline uint16_t take_split(WorkerC *w, RingC *ring, FrameTaker take) noexcept nogil:
    """As take_chains."""
    cdef uint16_t n = ring_room(ring, 1), i, taken = 0
    cdef VringDesc desc
    if n == 0:
        return 0
    if n > ring.quota:
        n = ring.quota
    if ring.armed:
        refuse_kicks_split(ring)
    for i in range(n):
        w.heads[i] = vs_load16(ring.avail + 2 + (<uint16_t>(ring.last_avail + i) & ring.mask))
        if vs_unlikely(w.heads[i] >= ring.size):
            ring_fault(ring, FAULT_HEAD, w.heads[i], ring.size)
            n = i
            break
        vs_prefetch(&ring.desc[w.heads[i]])
    prefetch_used(ring, n)
    for i in range(n):
        if vs_unlikely(w.n_segs + MAX_CHAIN + 1 > SEG_POOL):
            break
        read_desc(&desc, &ring.desc[w.heads[i]])
        w.frames[i].head = w.frames[i].id = w.heads[i]
        w.frames[i].count = 1
        if vs_unlikely(take(w, ring, &w.frames[i], &desc) < 0):
            break
        taken += 1
    ring.last_avail += taken
    note_taken(ring)
    return taken


cdef inline uint16_t prepare_split(WorkerC *w, RingC *ring, uint16_t n) noexcept nogil:
    """As prepare_buffers."""
    cdef uint16_t room = ring_room(ring, n), i, head
    if n > room:
        n = room
    for i in range(n):
        head = vs_load16(ring.avail + 2 + (<uint16_t>(ring.last_avail + i) & ring.mask))
        if vs_unlikely(head >= ring.size):
            ring_fault(ring, FAULT_HEAD, head, ring.size)
            n = i
            break
        w.rx_heads[i] = head
        vs_prefetch(&ring.desc[head])
    prefetch_used(ring, n)
    for i in range(n):
        read_desc(&w.rx_desc[i], &ring.desc[w.rx_heads[i]])
        locate_buffer(w, ring, i)
    return n


cdef inline void write_used_elem(
    VringUsedElem *elem, uint16_t id, uint32_t length
) noexcept nogil:
    """Both fields in one store."""
    vs_put64(elem, id | <uint64_t>length << 32)


cdef inline void put_used_split(RingC *ring, uint16_t id, uint32_t length) noexcept nogil:
    write_used_elem(&ring.used[ring.last_used & ring.mask], id, length)
    ring.last_used += 1


cdef inline void publish_split(RingC *ring) noexcept nogil:
    # Release: elements and buffers before the index. Pairs with the driver's read barrier after it
    # read used.idx (2.7.14).
    vs_store_release16(ring.used_hdr + 1, ring.last_used)
    if vs_unlikely(ring.dirty_log != NULL):
        log_used_elements(ring, ring.published, ring.last_used)
    ring.published = ring.last_used


cdef inline bint split_wants_call(RingC *ring) noexcept nogil:
    """As driver_wants_call (2.7.7)."""
    cdef uint16_t old = ring.signalled, now = ring.last_used
    cdef bint valid = ring.signalled_valid
    if not ring.event_idx:
        return not vs_load16(ring.avail) & VRING_AVAIL_F_NO_INTERRUPT
    ring.signalled = now
    ring.signalled_valid = 1
    if not valid:
        return True
    return <uint16_t>(now - vs_load16(ring.used_event) - 1) < <uint16_t>(now - old)
