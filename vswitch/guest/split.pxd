# The driver side of a split virtqueue (VIRTIO 1.2 section 2.7), as inline C without the GIL.
#
# The device may write the used ring and nothing else that we rely on: free list, chain lengths and
# indices live in private memory, and what the used ring says is held against them.
#
# A packed ring is to be a second file with functions of the same shapes (add, publish, kick_needed,
# more_used, reap, calls_on, calls_off); callers go through the names in driver.pxd only.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "barriers.h" nogil:
    uint16_t guest_load_acquire_u16(const uint16_t *p)
    uint16_t guest_load_relaxed_u16(const uint16_t *p)
    void guest_store_release_u16(uint16_t *p, uint16_t value)
    void guest_store_relaxed_u16(uint16_t *p, uint16_t value)
    void guest_fence_full()


cdef enum:
    DESC_F_NEXT = 1
    DESC_F_WRITE = 2
    DESC_F_INDIRECT = 4
    AVAIL_F_NO_INTERRUPT = 1
    USED_F_NO_NOTIFY = 1
    # What reap returns when the device broke a rule; `bad_value` of the ring says more.
    USED_IDX_RAN_AHEAD = -1
    USED_ID_RANGE = -2
    USED_ID_NOT_OUTSTANDING = -3


cdef struct Desc:
    uint64_t addr
    uint32_t len
    uint16_t flags
    uint16_t next


cdef struct UsedElem:
    uint32_t id
    uint32_t len


cdef struct Piece:
    # A run of guest memory that one descriptor describes; `ptr` is where we have it mapped.
    uint64_t gpa
    uint8_t *ptr
    uint32_t len


cdef struct SplitRing:
    uint16_t size
    bint event_idx
    # Shared with the device.
    Desc *desc
    uint16_t *avail            # flags, idx, ring[size], used_event
    uint16_t *used             # flags, idx, elem[size], avail_event
    # Ours.
    uint16_t avail_idx         # where the next head goes
    uint16_t published_idx     # what avail.idx says
    uint16_t kicked_idx        # avail.idx at the last decision about a notification
    uint16_t used_idx          # next used element to read
    uint16_t seen_used_idx     # used.idx as last read
    uint16_t outstanding       # chains the device holds or may take
    uint16_t free_head
    uint16_t num_free
    bint calls_wanted
    uint16_t *next             # links of the free list and of our chains
    uint16_t *chain_size       # by head: descriptors in the ring; 0 = not outstanding
    uint32_t *token            # by head: the caller's number for the chain
    uint32_t bad_value


cdef inline UsedElem *split_used_elem(SplitRing *ring, uint16_t idx) noexcept nogil:
    return (<UsedElem *>(ring.used + 2)) + (idx & (ring.size - 1))


cdef inline int32_t split_add(
    SplitRing *ring, const Piece *pieces, uint32_t n_out, uint32_t n_in, uint32_t token,
    Desc *table, uint64_t table_gpa,
) noexcept nogil:
    """Describe a chain and put its head into the avail ring, not yet published.

    The first `n_out` pieces are read by the device, the `n_in` after them written. With `table`
    (room for all pieces, at `table_gpa`) the chain takes one indirect descriptor of the ring.
    Returns the head, or -1 when the ring has too few free descriptors.
    """
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


cdef inline void split_publish(SplitRing *ring) noexcept nogil:
    """Let the device see every chain added so far."""
    # Release: pairs with the device's acquire load of avail.idx, after which it reads the heads,
    # the descriptors and (for a transmitq) the data.
    guest_store_release_u16(ring.avail + 1, ring.avail_idx)
    ring.published_idx = ring.avail_idx


cdef inline bint split_kick_needed(SplitRing *ring) noexcept nogil:
    """Whether the device wants to be told of what was published since the last call of this."""
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


cdef inline bint split_more_used(SplitRing *ring) noexcept nogil:
    """Whether the used ring holds an element that was not reaped."""
    if ring.seen_used_idx == ring.used_idx:
        # Acquire: pairs with the device's release store of used.idx; the elements and the data it
        # wrote are visible after this.
        ring.seen_used_idx = guest_load_acquire_u16(ring.used + 1)
    return ring.seen_used_idx != ring.used_idx


cdef inline void split_free(SplitRing *ring, uint16_t head) noexcept nogil:
    """Give the descriptors of a chain back to the free list."""
    cdef uint16_t last = head
    cdef uint16_t n = ring.chain_size[head]
    cdef uint16_t i
    for i in range(1, n):
        last = ring.next[last]
    ring.next[last] = ring.free_head
    ring.free_head = head
    ring.num_free += n
    ring.chain_size[head] = 0
    ring.outstanding -= 1


cdef inline int split_reap(SplitRing *ring, uint32_t *token, uint32_t *length) noexcept nogil:
    """Take the next used element: 1 and the chain's token and written length, or 0 for none.

    A negative value names the rule that the device broke; the element is not taken then.
    """
    cdef UsedElem *elem
    cdef uint32_t head
    if not split_more_used(ring):
        return 0
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
    token[0] = ring.token[head]
    length[0] = elem.len
    split_free(ring, <uint16_t>head)
    ring.used_idx += 1
    return 1


cdef inline void split_calls_off(SplitRing *ring) noexcept nogil:
    """Ask the device not to notify us; a hint, late notifications may still come."""
    ring.calls_wanted = False
    if ring.event_idx:
        # As far ahead as the index goes: the device passes it after 65535 more elements, so a
        # driver that polls repeats this now and then.
        guest_store_relaxed_u16(ring.avail + 2 + ring.size, <uint16_t>(ring.used_idx - 1))
    else:
        guest_store_relaxed_u16(ring.avail, AVAIL_F_NO_INTERRUPT)


cdef inline bint split_calls_on(SplitRing *ring) noexcept nogil:
    """Ask for a notification at the next used element. True when there is one already."""
    ring.calls_wanted = True
    if ring.event_idx:
        guest_store_relaxed_u16(ring.avail + 2 + ring.size, ring.used_idx)
    guest_store_relaxed_u16(ring.avail, 0)
    # Full fence: our request before our look at used.idx. Pairs with the device's fence between
    # publishing used.idx and reading used_event or the flags.
    guest_fence_full()
    return split_more_used(ring)
