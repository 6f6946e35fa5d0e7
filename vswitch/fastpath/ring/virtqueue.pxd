"""The device side of virtqueues, split and packed: what is there to take, giving back, notifications.

VIRTIO 1.2, sections 2.7 (split) and 2.8 (packed). In a packed ring `last_avail` and `last_used` are
positions, with wrap counters beside them; `avail` is the driver's event suppression structure and
`used_hdr` the device's (offset and wrap first, then flags).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vswitch.fastpath.ring.notes cimport note_batch
from vswitch.fastpath.shared.chain cimport ring_fault
from vswitch.fastpath.shared.dirty cimport log_packed, log_used, log_used_elements
from vswitch.fastpath.shared.types cimport (
    FAULT_AVAIL_IDX,
    RING_EVENT_FLAGS_DESC,
    RING_EVENT_FLAGS_DISABLE,
    RING_EVENT_FLAGS_ENABLE,
    USED_BATCH,
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_WRITE,
    VRING_PACKED_DESC_F_AVAIL,
    VRING_PACKED_DESC_F_USED,
    VRING_USED_F_NO_NOTIFY,
    Counters,
    RingC,
    UsedChain,
    VringUsedElem,
    WorkerC,
)
from vswitch.fastpath.sys.atomics cimport (
    vs_fence,
    vs_likely,
    vs_load16,
    vs_load_acquire16,
    vs_load_int,
    vs_prefetch_write,
    vs_put64,
    vs_store16,
    vs_store_release16,
    vs_store_release64,
    vs_unlikely,
)
from vswitch.fastpath.sys.notify cimport vs_notify


cdef enum:
    USED_A_LINE = 8        # used elements in a cache line
    DESCS_A_LINE = 4       # descriptors


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


cdef inline bint has_work(const RingC *ring) noexcept nogil:
    """Whether the driver has offered something that was not taken yet."""
    if ring.packed:
        return packed_ready(ring, ring.last_avail, ring.avail_wrap)
    return vs_load16(ring.avail + 1) != ring.last_avail


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
    if vs_unlikely(ring.log != NULL):
        log_packed(ring, first, ring.last_used)


cdef inline void write_used_elem(
    VringUsedElem *elem, uint16_t id, uint32_t length
) noexcept nogil:
    """Both fields in one store."""
    vs_put64(elem, id | <uint64_t>length << 32)


cdef inline void prefetch_used(RingC *ring, uint16_t n) noexcept nogil:
    """Fetch the lines for the next `n` used elements of a split ring, which the driver has read."""
    cdef uint32_t i = 0
    while i < <uint32_t>n + USED_A_LINE - 1:
        vs_prefetch_write(&ring.used[<uint16_t>(ring.last_used + i) & ring.mask])
        i += USED_A_LINE


cdef inline void put_used(
    WorkerC *w, RingC *ring, uint16_t id, uint16_t count, uint32_t length
) noexcept nogil:
    """Give a chain back: `id` is its head or buffer id, `count` its ring entries, `length` what was
    written into it. The driver need not see it before publish_used."""
    if ring.packed:
        if vs_unlikely(w.n_used == USED_BATCH):
            flush_packed(w, ring)
        w.used[w.n_used].id = id
        w.used[w.n_used].count = count
        w.used[w.n_used].len = length
        w.n_used += 1
        return
    write_used_elem(&ring.used[ring.last_used & ring.mask], id, length)
    ring.last_used += 1


cdef inline void publish_used(WorkerC *w, RingC *ring) noexcept nogil:
    if ring.packed:
        flush_packed(w, ring)
        return
    # Release: elements and buffers before the index. Pairs with the driver's read barrier after it
    # read used.idx (2.7.14).
    vs_store_release16(ring.used_hdr + 1, ring.last_used)
    if vs_unlikely(ring.log != NULL):
        log_used_elements(ring, ring.published, ring.last_used)
    ring.published = ring.last_used


cdef inline bint driver_wants_call(RingC *ring) noexcept nogil:
    """Whether what was published since the last notification calls for one (2.7.7, 2.8.10)."""
    cdef uint16_t event, old = ring.signalled, now = ring.last_used
    cdef bint valid = ring.signalled_valid
    if ring.packed:
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
    elif ring.event_idx:
        ring.signalled = now
        ring.signalled_valid = 1
        if not valid:
            return True
        event = vs_load16(ring.used_event)
    else:
        return not vs_load16(ring.avail) & VRING_AVAIL_F_NO_INTERRUPT
    return <uint16_t>(now - event - 1) < <uint16_t>(now - old)


cdef inline void notify_driver(WorkerC *w, RingC *ring, Counters *counters) noexcept nogil:
    """Signal the call eventfd if the driver wants to hear of what was just published.

    At most one system call, and none while the driver polls.
    """
    cdef int fd
    # Full fence: what is used is visible before the driver's wish is read. Pairs with the driver's
    # fence between stating its wish and looking at the used ring once more.
    vs_fence()
    if vs_likely(not driver_wants_call(ring)):
        return
    fd = vs_load_int(&ring.call_fd)
    if fd >= 0:
        vs_notify(&w.notifier, fd)
        w.burst_calls += 1
        counters.calls += 1


cdef inline void prefetch_packed(RingC *ring, uint16_t position, uint16_t n) noexcept nogil:
    """Fetch the lines of the next `n` descriptors, which are written back where they were read."""
    cdef uint32_t i = 0, at = position
    while i < <uint32_t>n + DESCS_A_LINE - 1:
        if at >= ring.size:
            at = 0
        vs_prefetch_write(&ring.desc[at])
        at += DESCS_A_LINE
        i += DESCS_A_LINE


cdef inline void log_event(RingC *ring) noexcept nogil:
    """Mark where want_kicks and refuse_kicks write."""
    if not ring.packed and ring.event_idx:
        log_used(ring, 4 + 8 * <uint32_t>ring.size, 2)
    else:
        log_used(ring, 0, 4)


cdef inline void want_kicks(RingC *ring) noexcept nogil:
    """Ask the driver to kick (2.7.10, 2.8.10). The caller fences and looks at the ring once more."""
    if ring.packed:
        if ring.event_idx:
            vs_store16(ring.used_hdr, ring.last_avail | <uint16_t>(ring.avail_wrap << 15))
            # Release: the offset before the flags that make it count; pairs with the driver's read
            # of both when it decides whether to kick.
            vs_store_release16(ring.used_hdr + 1, RING_EVENT_FLAGS_DESC)
        else:
            vs_store16(ring.used_hdr + 1, RING_EVENT_FLAGS_ENABLE)
    elif ring.event_idx:
        vs_store16(ring.avail_event, ring.last_avail)
    else:
        vs_store16(ring.used_hdr, 0)
    ring.armed = 1
    if vs_unlikely(ring.log != NULL):
        log_event(ring)


cdef inline void refuse_kicks(RingC *ring) noexcept nogil:
    """Polling again: with EVENT_IDX the driver of a split ring stays silent by itself as long as
    avail_event stands still."""
    if ring.packed:
        vs_store16(ring.used_hdr + 1, RING_EVENT_FLAGS_DISABLE)
    elif not ring.event_idx:
        vs_store16(ring.used_hdr, VRING_USED_F_NO_NOTIFY)
    ring.armed = 0
    if vs_unlikely(ring.log != NULL):
        log_event(ring)
