"""Packed virtqueues: the device's side (VIRTIO 1.2, section 2.8).

`last_avail` and `last_used` are positions, with wrap counters beside them; `avail` is the driver's event
suppression structure and `used_hdr` the device's (offset and wrap first, then flags). What the rest
calls, whatever format a ring has, is in dispatch.pxd, and described there.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vswitch.fastpath.ring.notes cimport note_batch
from vswitch.fastpath.shared.chain cimport (
    add_segment,
    check_indirect,
    copy_desc,
    locate_buffer,
    read_indirect,
    ring_fault,
)
from vswitch.fastpath.shared.dirty cimport log_packed, log_used
from vswitch.fastpath.shared.memory cimport Seg
from vswitch.fastpath.shared.ring cimport Cursor, RingC, UsedChain
from vswitch.fastpath.shared.sizes cimport BURST, MAX_CHAIN, SEG_POOL, USED_BATCH
from vswitch.fastpath.shared.virtio cimport (
    RING_EVENT_FLAGS_DESC,
    RING_EVENT_FLAGS_DISABLE,
    RING_EVENT_FLAGS_ENABLE,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_PACKED_DESC_F_AVAIL,
    VRING_PACKED_DESC_F_USED,
    VringDesc,
)
from vswitch.fastpath.shared.words cimport FAULT_CHAIN_LEN, FAULT_DIRECTION
from vswitch.fastpath.shared.worker cimport Frame, FrameTaker, WorkerC
from vswitch.fastpath.sys.atomics cimport (
    vs_get64,
    vs_load_acquire16,
    vs_prefetch_write,
    vs_store16,
    vs_store_release16,
    vs_store_release64,
    vs_unlikely,
)

cdef enum:
    DESCS_A_LINE = 4       # descriptors in a cache line


cdef inline bint packed_ready(const RingC *ring, uint16_t index, uint16_t wrap) noexcept nogil:
    """Whether a packed ring's entry is available (2.8.1)."""
    # Acquire: the rest of the descriptor, and of its chain, is read after the flags. Pairs with the
    # driver's write barrier before it writes them (2.8.21.2).
    cdef uint16_t flags = vs_load_acquire16(<uint16_t *>&ring.desc[index] + 7)
    return (flags >> 7 & 1) == wrap and flags >> 15 != wrap


cdef inline void packed_step(
    const RingC *ring, uint16_t *index, uint8_t *wrap, uint16_t count
) noexcept nogil:
    """Move a position `count` entries on, at most once around."""
    cdef uint32_t sum = <uint32_t>index[0] + count
    if sum >= ring.size:
        sum -= ring.size
        wrap[0] ^= 1
    index[0] = <uint16_t>sum


cdef inline void read_packed(VringDesc *out, const VringDesc *desc) noexcept nogil:
    """As read_desc, of a packed ring's descriptor, where the buffer id comes before the flags."""
    cdef uint64_t tail
    out.addr = vs_get64(&desc.addr)
    tail = vs_get64(&desc.len)
    out.len = <uint32_t>tail
    out.next = <uint16_t>(tail >> 32)
    out.flags = <uint16_t>(tail >> 48)


cdef inline int next_packed(
    RingC *ring, const Cursor *at, uint16_t *head, VringDesc *first
) noexcept nogil:
    """As next_offered."""
    if not packed_ready(ring, at.position, at.wrap):
        return 0
    head[0] = at.position
    read_packed(first, &ring.desc[at.position])
    return 1


cdef inline int walk_packed(
    RingC *ring, uint32_t index, const VringDesc *first, uint16_t want_write, Seg *segs, uint32_t limit
) noexcept nogil:
    """Leaves the buffer id and the number of ring entries in `walk_id` and `walk_count`."""
    cdef VringDesc desc
    cdef uint32_t n_segs = 0, count = 1, i, entries
    cdef uint64_t table_gpa
    copy_desc(&desc, first)
    while not desc.flags & VRING_DESC_F_INDIRECT:
        if vs_unlikely((desc.flags & VRING_DESC_F_WRITE) != want_write):
            ring_fault(ring, FAULT_DIRECTION, desc.flags, index)
            return -1
        ring.walked += 1
        if add_segment(ring, &desc, segs, &n_segs, limit) < 0:
            return -1
        if not desc.flags & VRING_DESC_F_NEXT:
            break
        count += 1
        if vs_unlikely(count > ring.size or count > MAX_CHAIN):
            ring_fault(ring, FAULT_CHAIN_LEN, count, ring.size)
            return -1
        index += 1
        if index == ring.size:
            index = 0
        # The driver wrote these before it made the first one available (2.8.6).
        read_packed(&desc, &ring.desc[index])
    else:
        if check_indirect(ring, &desc, index) < 0:
            return -1
        # The id is that of the ring's own descriptor; in the table only address, length and WRITE
        # count, and one entry follows the other (2.8.7).
        table_gpa = desc.addr
        entries = desc.len >> 4
        ring.walk_id = desc.next
        ring.walk_count = <uint16_t>count
        if vs_unlikely(entries > MAX_CHAIN):
            ring_fault(ring, FAULT_CHAIN_LEN, entries, MAX_CHAIN)
            return -1
        ring.walked = <uint16_t>(count + entries)
        for i in range(entries):
            if read_indirect(ring, &desc, table_gpa, i) < 0:
                return -1
            # read_desc() took it for a split ring's: flags and id are the other way round.
            if vs_unlikely((desc.next & VRING_DESC_F_WRITE) != want_write):
                ring_fault(ring, FAULT_DIRECTION, desc.next, i)
                return -1
            if add_segment(ring, &desc, segs, &n_segs, limit) < 0:
                return -1
        return n_segs
    ring.walk_id = desc.next
    ring.walk_count = <uint16_t>count
    return n_segs


cdef inline void prefetch_packed(RingC *ring, uint16_t position, uint16_t n) noexcept nogil:
    """Fetch the lines of the next `n` descriptors, which are written back where they were read."""
    cdef uint32_t i = 0, at = position
    while i < <uint32_t>n + DESCS_A_LINE - 1:
        if at >= ring.size:
            at = 0
        vs_prefetch_write(&ring.desc[at])
        at += DESCS_A_LINE
        i += DESCS_A_LINE


cdef inline void want_kicks_packed(RingC *ring) noexcept nogil:
    """As want_kicks (2.8.10)."""
    if ring.event_idx:
        vs_store16(ring.used_hdr, ring.last_avail | <uint16_t>(ring.avail_wrap << 15))
        # Release: the offset before the flags that make it count; pairs with the driver's read
        # of both when it decides whether to kick.
        vs_store_release16(ring.used_hdr + 1, RING_EVENT_FLAGS_DESC)
    else:
        vs_store16(ring.used_hdr + 1, RING_EVENT_FLAGS_ENABLE)
    ring.armed = 1
    if vs_unlikely(ring.dirty_log != NULL):
        log_used(ring, 0, 4)


cdef inline void refuse_kicks_packed(RingC *ring) noexcept nogil:
    vs_store16(ring.used_hdr + 1, RING_EVENT_FLAGS_DISABLE)
    ring.armed = 0
    if vs_unlikely(ring.dirty_log != NULL):
        log_used(ring, 0, 4)


cdef inline uint16_t take_packed(WorkerC *w, RingC *ring, FrameTaker take) noexcept nogil:
    """As take_chains."""
    cdef uint16_t taken = 0, position = ring.last_avail
    cdef uint8_t wrap = ring.avail_wrap
    cdef UsedChain chains[BURST]
    cdef VringDesc desc
    cdef Frame *frame
    # As long as the last burst was: more would take lines from a driver that is about to write them.
    if ring.burst >= BURST // 2 and packed_ready(ring, position, wrap):
        prefetch_packed(ring, position, ring.burst)
    while taken < ring.quota and packed_ready(ring, ring.last_avail, ring.avail_wrap):
        if vs_unlikely(w.n_segs + MAX_CHAIN + 1 > SEG_POOL):
            break
        if ring.armed:
            refuse_kicks_packed(ring)
        read_packed(&desc, &ring.desc[ring.last_avail])
        frame = &w.frames[taken]
        frame.head = ring.last_avail
        frame.id = desc.next
        frame.count = 1
        if vs_unlikely(take(w, ring, frame, &desc) < 0):
            break
        chains[taken].id = frame.id
        chains[taken].count = frame.count
        chains[taken].len = 0
        packed_step(ring, &ring.last_avail, &ring.avail_wrap, frame.count)
        taken += 1
    if taken:
        ring.burst = taken
        note_batch(ring, position, wrap, chains, taken)
    return taken


cdef inline uint16_t prepare_packed(WorkerC *w, RingC *ring, uint16_t n) noexcept nogil:
    """As prepare_buffers. Ends at the first chain, whose length only its end tells."""
    cdef uint16_t i, position = ring.last_avail
    cdef uint8_t wrap = ring.avail_wrap
    # Drivers keep receiveqs full, so these are available already but for few.
    prefetch_packed(ring, position, n)
    for i in range(n):
        if not packed_ready(ring, position, wrap):
            return i
        read_packed(&w.rx_desc[i], &ring.desc[position])
        w.rx_heads[i] = w.rx_desc[i].next
        locate_buffer(w, ring, i)
        if w.rx_host[i] == NULL:
            return i
        packed_step(ring, &position, &wrap, 1)
    return n


cdef inline void write_used_entry(
    RingC *ring, uint16_t index, uint8_t wrap, const UsedChain *chain
) noexcept nogil:
    cdef uint16_t flags = VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED if wrap else 0
    if chain.len:
        flags |= VRING_DESC_F_WRITE  # something was written, so len counts (2.8.4)
    # Release: the buffer before the flags. Pairs with the driver's read barrier after it read them
    # (2.8.22).
    vs_store_release64(
        <uint64_t *>&ring.desc[index].len,
        <uint64_t>chain.len | <uint64_t>chain.id << 32 | <uint64_t>flags << 48,
    )


cdef inline void write_used(
    RingC *ring, uint16_t position, uint8_t wrap, const UsedChain *chains, uint32_t n
) noexcept nogil:
    """Write the used descriptors of chains that were made available one after the other.

    The first comes last, and with it the driver sees all of them: when it finds the first buffer of
    a frame it takes for granted that the others are there.
    """
    cdef uint16_t at = position
    cdef uint8_t round = wrap
    cdef uint32_t i
    packed_step(ring, &at, &round, chains[0].count)
    for i in range(1, n):
        write_used_entry(ring, at, round, &chains[i])
        packed_step(ring, &at, &round, chains[i].count)
    write_used_entry(ring, position, wrap, &chains[0])


cdef inline void flush_packed(WorkerC *w, RingC *ring) noexcept nogil:
    """Give chains of a packed ring back. Wherever this process may be killed in it, who comes next
    finds in the journal what is missing."""
    cdef uint32_t i
    cdef uint16_t first = ring.last_used
    if w.n_used == 0:
        return
    if not ring.index & 1:  # of a transmitq it was noted before the frames were forwarded
        note_batch(ring, ring.last_used, ring.used_wrap, w.used, w.n_used)
    write_used(ring, ring.last_used, ring.used_wrap, w.used, w.n_used)
    for i in range(w.n_used):
        ring.last_used_at = ring.last_used
        ring.last_wrap = ring.used_wrap
        packed_step(ring, &ring.last_used, &ring.used_wrap, w.used[i].count)
    w.n_used = 0
    if vs_unlikely(ring.dirty_log != NULL):
        log_packed(ring, first, ring.last_used)


cdef inline void put_used_packed(
    WorkerC *w, RingC *ring, uint16_t id, uint16_t count, uint32_t length
) noexcept nogil:
    if vs_unlikely(w.n_used == USED_BATCH):
        flush_packed(w, ring)
    w.used[w.n_used].id = id
    w.used[w.n_used].count = count
    w.used[w.n_used].len = length
    w.n_used += 1


cdef inline bint packed_wants_call(RingC *ring) noexcept nogil:
    """As driver_wants_call (2.8.10)."""
    cdef uint16_t event, old = ring.signalled, now = ring.last_used
    cdef bint valid = ring.signalled_valid
    # Noted whatever the driver wants: what is rounds old says nothing of an event in this one.
    ring.signalled = now
    ring.signalled_valid = 1
    # Acquire: the offset after the flags that make it count; pairs with the driver's order.
    event = vs_load_acquire16(ring.avail + 1) & 3
    if event == RING_EVENT_FLAGS_DISABLE:
        return False
    if event != RING_EVENT_FLAGS_DESC or not ring.event_idx:
        return True
    if not valid:
        return True
    event = vs_load_acquire16(ring.avail)
    if now <= old:
        old -= ring.size
    if event >> 15 != ring.used_wrap:
        event = (event & 0x7FFF) - ring.size
    else:
        event &= 0x7FFF
    return <uint16_t>(now - event - 1) < <uint16_t>(now - old)
