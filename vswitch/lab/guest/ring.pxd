# The driver side of a virtqueue of either format; the names that drivers use.

from libc.stdint cimport int32_t, uint32_t, uint64_t

from vswitch.lab.guest.packed cimport (
    packed_add,
    packed_calls_off,
    packed_calls_on,
    packed_kick_needed,
    packed_more_used,
    packed_prefetch,
    packed_publish,
    packed_reap,
    packed_upcoming,
)
from vswitch.lab.guest.split cimport (
    split_add,
    split_calls_off,
    split_calls_on,
    split_kick_needed,
    split_more_used,
    split_prefetch,
    split_publish,
    split_reap,
    split_upcoming,
)
from vswitch.lab.guest.vring cimport Desc, Piece, Ring


cdef inline int32_t ring_add(
    Ring *ring, const Piece *pieces, uint32_t n_out, uint32_t n_in, uint32_t token,
    Desc *table, uint64_t table_gpa,
) noexcept nogil:
    """Describe a chain to the device, not yet published.

    The first `n_out` pieces are read by the device, the `n_in` after them written. With `table`
    (room for all pieces, at `table_gpa`) the chain takes one indirect descriptor of the ring.
    Returns the chain's id in the ring, or -1 when the ring has too few free descriptors.
    """
    cdef int32_t id
    cdef uint32_t i, length = 0
    if ring.packed:
        id = packed_add(ring, pieces, n_out, n_in, token, table, table_gpa)
    else:
        id = split_add(ring, pieces, n_out, n_in, token, table, table_gpa)
    if ring.in_order and id >= 0:
        for i in range(n_out, n_out + n_in):
            length += pieces[i].len
        ring.posted_len[id] = length
    return id


cdef inline void ring_publish(Ring *ring) noexcept nogil:
    """Let the device see every chain added so far."""
    if ring.packed:
        packed_publish(ring)
    else:
        split_publish(ring)


cdef inline bint ring_kick_needed(Ring *ring) noexcept nogil:
    """Whether the device wants to be told of what was published since the last call of this."""
    return packed_kick_needed(ring) if ring.packed else split_kick_needed(ring)


cdef inline bint ring_more_used(Ring *ring) noexcept nogil:
    """Whether the device has used a chain that was not reaped."""
    return packed_more_used(ring) if ring.packed else split_more_used(ring)


cdef inline int ring_reap(Ring *ring, uint32_t *token, uint32_t *length) noexcept nogil:
    """Take the next used chain: 1 and the chain's token and written length, or 0 for none.

    With IN_ORDER the device may use several chains by naming the last: those before it count as
    written to their end. A negative value names the rule that the device broke (vring.pxd); the
    chain is not taken then.
    """
    return packed_reap(ring, token, length) if ring.packed else split_reap(ring, token, length)


cdef inline void ring_prefetch(Ring *ring) noexcept nogil:
    """Fetch what the device has probably written since the last time."""
    if ring.packed:
        packed_prefetch(ring)
    else:
        split_prefetch(ring)


cdef inline uint32_t ring_upcoming(Ring *ring, uint32_t *tokens, uint32_t most) noexcept nogil:
    """Tokens of used chains that were not reaped, as far as the device is right; for prefetching."""
    return packed_upcoming(ring, tokens, most) if ring.packed else split_upcoming(ring, tokens, most)


cdef inline void ring_calls_off(Ring *ring) noexcept nogil:
    """Ask the device not to notify us; a hint, late notifications may still come."""
    if ring.packed:
        packed_calls_off(ring)
    else:
        split_calls_off(ring)


cdef inline bint ring_calls_on(Ring *ring) noexcept nogil:
    """Ask for a notification at the next used chain. True when there is one already."""
    return packed_calls_on(ring) if ring.packed else split_calls_on(ring)
