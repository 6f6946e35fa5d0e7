# The driver side of a packed virtqueue (VIRTIO 1.2 section 2.8), as inline C without the GIL.
#
# Callers go through ring.pxd. Buffer ids come from a stack, so that they soon have nothing to do with
# positions, and only the last descriptor of a chain carries the right one (2.8.6): a device that
# mixes those up is found out.

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

from vswitch.lab.guest.vring cimport (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    USED_ID_NOT_OUTSTANDING,
    USED_ID_RANGE,
    USED_NOTHING_OUTSTANDING,
    Desc,
    PackedDesc,
    Piece,
    Ring,
)


cdef extern from "barriers.h" nogil:
    uint16_t guest_load_acquire_u16(const uint16_t *p)
    uint16_t guest_load_relaxed_u16(const uint16_t *p)
    void guest_store_release_u16(uint16_t *p, uint16_t value)
    void guest_store_relaxed_u16(uint16_t *p, uint16_t value)
    void guest_fence_full()
    void guest_prefetch_write(const void *p)


cdef enum:
    PACKED_F_AVAIL = 0x80
    PACKED_F_USED = 0x8000
    EVENT_FLAGS_ENABLE = 0
    EVENT_FLAGS_DISABLE = 1
    EVENT_FLAGS_DESC = 2
    DESCS_A_LINE = 4           # descriptors in a cache line


cdef inline uint16_t packed_avail_bits(uint16_t wrap) noexcept nogil:
    """AVAIL and USED of an entry that is made available in a round with this wrap counter (2.8.1)."""
    return PACKED_F_AVAIL if wrap else PACKED_F_USED


cdef inline uint16_t packed_used_bits(uint16_t wrap) noexcept nogil:
    return PACKED_F_AVAIL | PACKED_F_USED if wrap else 0


cdef inline void packed_advance(
    Ring *ring, uint16_t *at, uint16_t *wrap, uint16_t entries
) noexcept nogil:
    cdef uint32_t to = <uint32_t>at[0] + entries
    if to >= ring.size:
        to -= ring.size
        wrap[0] ^= 1
    at[0] = <uint16_t>to


cdef inline void packed_put(
    Ring *ring, uint64_t addr, uint32_t length, uint16_t id, uint16_t flags
) noexcept nogil:
    """One ring entry; the flags of the first unpublished one are kept back."""
    cdef PackedDesc *desc = ring.packed_desc + ring.avail_at
    desc.addr = addr
    desc.len = length
    desc.id = id
    flags |= packed_avail_bits(ring.avail_wrap)
    if ring.unpublished:
        # Ahead of an entry that is not available yet: the device cannot get here before publish.
        guest_store_relaxed_u16(&desc.flags, flags)
    else:
        ring.first_at = ring.avail_at
        ring.first_flags = flags
    ring.unpublished += 1
    packed_advance(ring, &ring.avail_at, &ring.avail_wrap, 1)


cdef inline int32_t packed_add(
    Ring *ring, const Piece *pieces, uint32_t n_out, uint32_t n_in, uint32_t token,
    Desc *table, uint64_t table_gpa,
) noexcept nogil:
    """As ring_add; returns the buffer id."""
    cdef uint32_t n = n_out + n_in
    cdef uint32_t needed = 1 if table != NULL else n
    cdef PackedDesc *entry = <PackedDesc *>table
    cdef uint32_t i
    cdef uint16_t flags, id
    if needed > ring.num_free:
        return -1
    id = ring.free_head
    ring.free_head = ring.next[id]
    ring.id_at[ring.avail_at] = id
    if table != NULL:
        for i in range(n):
            entry[i].addr = pieces[i].gpa
            entry[i].len = pieces[i].len
            entry[i].id = 0
            entry[i].flags = DESC_F_WRITE if i >= n_out else 0
        packed_put(ring, table_gpa, n * <uint32_t>sizeof(PackedDesc), id, DESC_F_INDIRECT)
    else:
        for i in range(n):
            flags = DESC_F_WRITE if i >= n_out else 0
            if i + 1 < n:
                packed_put(ring, pieces[i].gpa, pieces[i].len, ~id, flags | DESC_F_NEXT)
            else:
                packed_put(ring, pieces[i].gpa, pieces[i].len, id, flags)
    ring.num_free -= <uint16_t>needed
    ring.chain_size[id] = <uint16_t>needed
    ring.token[id] = token
    ring.avail_idx += 1
    ring.outstanding += 1
    return id


cdef inline void packed_publish(Ring *ring) noexcept nogil:
    if ring.unpublished:
        # Release: pairs with the device's acquire load of these flags, after which it reads this
        # descriptor, those behind it and (for a transmitq) the data.
        guest_store_release_u16(&ring.packed_desc[ring.first_at].flags, ring.first_flags)
        ring.unkicked += ring.unpublished
        ring.unpublished = 0
    ring.published_idx = ring.avail_idx


cdef inline bint packed_kick_needed(Ring *ring) noexcept nogil:
    cdef uint32_t added = ring.unkicked
    cdef uint16_t flags, event
    cdef uint32_t at
    if added == 0:
        return False
    ring.unkicked = 0
    # Full fence: our store of the flags before our load of what the device wants. Pairs with the
    # device's fence between asking for notifications and looking at its next entry once more.
    guest_fence_full()
    # Acquire: pairs with the device's release store of the flags; the offset is not older.
    flags = guest_load_acquire_u16(ring.used + 1) & 3
    if flags == EVENT_FLAGS_DISABLE:
        return False
    if flags == EVENT_FLAGS_ENABLE or not ring.event_idx:
        return True
    event = guest_load_relaxed_u16(ring.used)
    # Entries from the event to our position, which is in the same round or in the one after it.
    at = ring.avail_at
    if event >> 15 != ring.avail_wrap:
        at += ring.size
    # The event is among what was added: 1 (the entry before our position) to `added` entries back.
    return <uint32_t>(at - (event & 0x7FFF) - 1) < added


cdef inline bint packed_is_used(Ring *ring, uint16_t at, uint16_t wrap) noexcept nogil:
    # Acquire: pairs with the device's release store of the flags; id, length and the data it wrote
    # are visible after this.
    cdef uint16_t flags = guest_load_acquire_u16(&ring.packed_desc[at].flags)
    return flags & packed_used_bits(1) == packed_used_bits(wrap)


cdef inline bint packed_more_used(Ring *ring) noexcept nogil:
    return ring.batch_left != 0 or packed_is_used(ring, ring.used_at, ring.used_wrap)


cdef inline void packed_begin_batch(Ring *ring, uint16_t last) noexcept nogil:
    """The device has used all chains up to that of id `last`, which is outstanding."""
    cdef uint16_t at = ring.used_at, wrap = ring.used_wrap
    ring.batch_left = 1
    while ring.id_at[at] != last:
        packed_advance(ring, &at, &wrap, ring.chain_size[ring.id_at[at]])
        ring.batch_left += 1
        ring.skipped += 1


cdef inline int packed_reap(Ring *ring, uint32_t *token, uint32_t *length) noexcept nogil:
    cdef PackedDesc *desc = ring.packed_desc + ring.used_at
    cdef uint16_t id, n
    if not packed_more_used(ring):
        return 0
    id = desc.id
    if ring.batch_left == 0:
        if ring.outstanding == 0:
            ring.bad_value = id
            return USED_NOTHING_OUTSTANDING
        if id >= ring.size:
            ring.bad_value = id
            return USED_ID_RANGE
        if ring.chain_size[id] == 0:
            ring.bad_value = id
            return USED_ID_NOT_OUTSTANDING
        # Without WRITE the length says nothing (2.8.4).
        ring.batch_len = desc.len if desc.flags & DESC_F_WRITE else 0
        ring.batch_left = 1
        if ring.in_order and id != ring.id_at[ring.used_at]:
            packed_begin_batch(ring, id)
    ring.batch_left -= 1
    length[0] = ring.batch_len
    if ring.in_order:
        id = ring.id_at[ring.used_at]
        if ring.batch_left:
            length[0] = ring.posted_len[id]
    token[0] = ring.token[id]
    n = ring.chain_size[id]
    packed_advance(ring, &ring.used_at, &ring.used_wrap, n)
    ring.chain_size[id] = 0
    ring.next[id] = ring.free_head
    ring.free_head = id
    ring.num_free += n
    ring.outstanding -= 1
    ring.used_idx += 1
    return 1


cdef inline void packed_prefetch(Ring *ring) noexcept nogil:
    cdef uint32_t i = 0, at = ring.used_at
    if not packed_is_used(ring, ring.used_at, ring.used_wrap):
        return
    # As many as the last time: more would take lines from a device that is about to write them. For
    # writing, since they are made available again.
    while i < ring.burst:
        guest_prefetch_write(ring.packed_desc + at)
        i += DESCS_A_LINE
        at += DESCS_A_LINE
        if at >= ring.size:
            at = 0


cdef inline uint32_t packed_upcoming(Ring *ring, uint32_t *tokens, uint32_t most) noexcept nogil:
    cdef uint16_t at = ring.used_at, wrap = ring.used_wrap, id
    cdef uint32_t n = 0
    while n < most and n < ring.outstanding and packed_is_used(ring, at, wrap):
        id = ring.packed_desc[at].id
        if id >= ring.size or ring.chain_size[id] == 0:
            break
        tokens[n] = ring.token[id]
        n += 1
        packed_advance(ring, &at, &wrap, ring.chain_size[id])
    return n


cdef inline void packed_calls_off(Ring *ring) noexcept nogil:
    ring.calls_wanted = False
    guest_store_relaxed_u16(ring.avail + 1, EVENT_FLAGS_DISABLE)


cdef inline bint packed_calls_on(Ring *ring) noexcept nogil:
    ring.calls_wanted = True
    if ring.event_idx:
        guest_store_relaxed_u16(ring.avail, ring.used_at | <uint16_t>(ring.used_wrap << 15))
        # Release: the offset before the flags that make it count; pairs with the device's loads.
        guest_store_release_u16(ring.avail + 1, EVENT_FLAGS_DESC)
    else:
        guest_store_relaxed_u16(ring.avail + 1, EVENT_FLAGS_ENABLE)
    # Full fence: our request before our look at the ring. Pairs with the device's fence between
    # marking entries as used and reading what we want.
    guest_fence_full()
    return packed_more_used(ring)
