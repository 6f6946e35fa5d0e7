# The driver side of a split virtqueue (VIRTIO 1.2 section 2.7), as inline C without the GIL.
#
# Callers go through ring.pxd, which has packed rings as well.

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

from vswitch.lab.guest.vring cimport (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    USED_ID_NOT_OUTSTANDING,
    USED_ID_RANGE,
    USED_IDX_RAN_AHEAD,
    USED_OUT_OF_ORDER,
    Desc,
    Piece,
    Ring,
)


cdef extern from "barriers.h" nogil:
    uint16_t guest_load_acquire_u16(const uint16_t *p)
    uint16_t guest_load_relaxed_u16(const uint16_t *p)
    void guest_store_release_u16(uint16_t *p, uint16_t value)
    void guest_store_relaxed_u16(uint16_t *p, uint16_t value)
    void guest_fence_full()
    void guest_prefetch(const void *p)


cdef enum:
    AVAIL_F_NO_INTERRUPT = 1
    USED_F_NO_NOTIFY = 1
    USED_A_LINE = 8            # used elements in a cache line
    PREFETCH_USED = 64


cdef struct UsedElem:
    uint32_t id
    uint32_t len


cdef inline UsedElem *split_used_elem(Ring *ring, uint16_t idx) noexcept nogil:
    return (<UsedElem *>(ring.used + 2)) + (idx & (ring.size - 1))


cdef inline int32_t split_add(
    Ring *ring, const Piece *pieces, uint32_t n_out, uint32_t n_in, uint32_t token,
    Desc *table, uint64_t table_gpa,
) noexcept nogil:
    """As ring_add; returns the head."""
    cdef uint32_t n = n_out + n_in
    cdef uint32_t needed = 1 if table != NULL else n
    cdef uint32_t i
    cdef uint16_t flags, head, at
    cdef Desc *desc
    if needed > ring.num_free:
        return -1
    head = ring.free_head
    at = head
    if table != NULL:
        for i in range(n):
            table[i].addr = pieces[i].gpa
            table[i].len = pieces[i].len
            flags = DESC_F_WRITE if i >= n_out else 0
            if i + 1 < n:
                flags |= DESC_F_NEXT
            table[i].flags = flags
            table[i].next = <uint16_t>(i + 1) if i + 1 < n else 0
        desc = ring.desc + head
        desc.addr = table_gpa
        desc.len = n * <uint32_t>sizeof(Desc)
        desc.flags = DESC_F_INDIRECT
        desc.next = 0
        at = ring.next[head]
    else:
        for i in range(n):
            desc = ring.desc + at
            desc.addr = pieces[i].gpa
            desc.len = pieces[i].len
            flags = DESC_F_WRITE if i >= n_out else 0
            if i + 1 < n:
                flags |= DESC_F_NEXT
            desc.flags = flags
            at = ring.next[at]
            desc.next = at if i + 1 < n else 0
    ring.free_head = at
    ring.num_free -= <uint16_t>needed
    ring.chain_size[head] = <uint16_t>needed
    ring.token[head] = token
    ring.avail[2 + (ring.avail_idx & (ring.size - 1))] = head
    ring.avail_idx += 1
    ring.outstanding += 1
    return head


cdef inline void split_publish(Ring *ring) noexcept nogil:
    # Release: pairs with the device's acquire load of avail.idx, after which it reads the heads,
    # the descriptors and (for a transmitq) the data.
    guest_store_release_u16(ring.avail + 1, ring.avail_idx)
    ring.published_idx = ring.avail_idx


cdef inline bint split_kick_needed(Ring *ring) noexcept nogil:
    cdef uint16_t old = ring.kicked_idx
    cdef uint16_t new = ring.published_idx
    cdef uint16_t event
    if old == new:
        return False
    # Full fence: our store of avail.idx before our load of what the device wants. Pairs with the
    # device's fence between asking for notifications and looking at avail.idx once more; without
    # the two, both sides could miss each other and sleep for ever.
    guest_fence_full()
    ring.kicked_idx = new
    if ring.event_idx:
        event = guest_load_relaxed_u16(ring.used + 2 + 4 * <uint32_t>ring.size)
        return <uint16_t>(new - event - 1) < <uint16_t>(new - old)
    return not guest_load_relaxed_u16(ring.used) & USED_F_NO_NOTIFY


cdef inline bint split_more_used(Ring *ring) noexcept nogil:
    if ring.seen_used_idx == ring.used_idx:
        # Acquire: pairs with the device's release store of used.idx; the elements and the data it
        # wrote are visible after this.
        ring.seen_used_idx = guest_load_acquire_u16(ring.used + 1)
    return ring.seen_used_idx != ring.used_idx


cdef inline void split_prefetch(Ring *ring) noexcept nogil:
    cdef uint16_t n, i = 0
    if not split_more_used(ring):
        return
    # The device has just written these lines: all at once costs little more than the first.
    n = ring.seen_used_idx - ring.used_idx
    while i < n and i < PREFETCH_USED:
        guest_prefetch(split_used_elem(ring, <uint16_t>(ring.used_idx + i)))
        i += USED_A_LINE


cdef inline void split_free(Ring *ring, uint16_t head) noexcept nogil:
    """Give the descriptors of a chain back to the free list."""
    cdef uint16_t last = head
    cdef uint16_t n = ring.chain_size[head]
    cdef uint16_t _i
    if not ring.in_order:
        for _i in range(1, n):
            last = ring.next[last]
        ring.next[last] = ring.free_head
        ring.free_head = head
    # Else they are in ring order already, behind those that are free (2.7.9).
    ring.num_free += n
    ring.chain_size[head] = 0
    ring.outstanding -= 1


cdef inline int split_begin_batch(Ring *ring, uint16_t last) noexcept nogil:
    """The device has used all chains from the oldest one to `last`, and named the last alone."""
    cdef uint16_t at = ring.oldest
    cdef uint16_t n = 1
    while at != last:
        at = <uint16_t>(at + ring.chain_size[at]) & (ring.size - 1)
        n += 1
        if n > <uint16_t>(ring.seen_used_idx - ring.used_idx):
            ring.bad_value = last
            return USED_OUT_OF_ORDER
    ring.batch_left = n
    ring.skipped += n - 1
    return 0


cdef inline int split_reap(Ring *ring, uint32_t *token, uint32_t *length) noexcept nogil:
    cdef UsedElem *elem
    cdef uint32_t head = ring.oldest
    cdef int rc
    if not split_more_used(ring):
        return 0
    if ring.batch_left == 0:
        if <uint16_t>(ring.seen_used_idx - ring.used_idx) > ring.outstanding:
            ring.bad_value = ring.seen_used_idx
            return USED_IDX_RAN_AHEAD
        elem = split_used_elem(ring, ring.used_idx)
        head = elem.id
        if head >= ring.size:
            ring.bad_value = head
            return USED_ID_RANGE
        if ring.chain_size[head] == 0:
            ring.bad_value = head
            return USED_ID_NOT_OUTSTANDING
        ring.batch_len = elem.len
        ring.batch_left = 1
        if ring.in_order and head != ring.oldest:
            rc = split_begin_batch(ring, <uint16_t>head)
            if rc < 0:
                return rc
    ring.batch_left -= 1
    length[0] = ring.batch_len
    if ring.in_order:
        head = ring.oldest
        ring.oldest = <uint16_t>(head + ring.chain_size[head]) & (ring.size - 1)
        if ring.batch_left:
            length[0] = ring.posted_len[head]
    token[0] = ring.token[head]
    split_free(ring, <uint16_t>head)
    ring.used_idx += 1
    return 1


cdef inline uint32_t split_upcoming(Ring *ring, uint32_t *tokens, uint32_t most) noexcept nogil:
    cdef uint16_t n, i
    cdef uint32_t head, found = 0
    if not split_more_used(ring):
        return 0
    n = ring.seen_used_idx - ring.used_idx
    if n > most:
        n = <uint16_t>most
    for i in range(n):
        head = split_used_elem(ring, <uint16_t>(ring.used_idx + i)).id
        if head < ring.size:
            tokens[found] = ring.token[head]
            found += 1
    return found


cdef inline void split_calls_off(Ring *ring) noexcept nogil:
    ring.calls_wanted = False
    if ring.event_idx:
        # As far ahead as the index goes: the device passes it after 65535 more elements, so a
        # driver that polls repeats this now and then.
        guest_store_relaxed_u16(ring.avail + 2 + ring.size, <uint16_t>(ring.used_idx - 1))
    else:
        guest_store_relaxed_u16(ring.avail, AVAIL_F_NO_INTERRUPT)


cdef inline bint split_calls_on(Ring *ring) noexcept nogil:
    ring.calls_wanted = True
    if ring.event_idx:
        guest_store_relaxed_u16(ring.avail + 2 + ring.size, ring.used_idx)
    guest_store_relaxed_u16(ring.avail, 0)
    # Full fence: our request before our look at used.idx. Pairs with the device's fence between
    # publishing used.idx and reading used_event or the flags.
    guest_fence_full()
    return split_more_used(ring)
