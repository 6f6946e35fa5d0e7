"""One frame into receive buffers of any shape: the one copy.

VIRTIO 1.2, section 5.1.6.4 (device side).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from vswitch.fastpath.ring.dispatch cimport (
    cursor_of,
    keep_together,
    next_offered,
    put_used,
    step_over,
    take_up_to,
    walk_chain,
)
from vswitch.fastpath.shared.chain cimport ring_fault
from vswitch.fastpath.shared.dirty cimport log_segs
from vswitch.fastpath.shared.memory cimport MemTable, Seg
from vswitch.fastpath.shared.ring cimport Cursor, RingC
from vswitch.fastpath.shared.sizes cimport BURST, MAX_CHAIN, VNET_HDR_MAX
from vswitch.fastpath.shared.virtio cimport VRING_DESC_F_WRITE, VringDesc
from vswitch.fastpath.shared.words cimport (
    DROP_BUFFER_SMALL,
    DROP_IOTLB_MISS,
    DROP_NO_BUFFER,
    DROP_PAGE_MISSING,
    DROP_RING_FAULT,
    FAULT_EMPTY_BUFFER,
    FAULT_IOTLB_MISS,
    FAULT_SHORT_BUFFER,
    Counters,
)
from vswitch.fastpath.shared.worker cimport Frame, WorkerC
from vswitch.fastpath.sys.atomics cimport vs_copy_short, vs_likely, vs_load_acquire_ptr, vs_unlikely

cdef enum:
    HOLD_WORK = 64         # descriptors of a receiver's buffers for one frame, see `held`


cdef inline void put_header(char *to, const Frame *frame, uint8_t hdr_len, uint16_t buffers) noexcept nogil:
    """struct virtio_net_hdr: ten bytes, and num_buffers where the driver knows it (5.1.6)."""
    memcpy(to, frame.hdr, 10)
    if hdr_len == 12:
        memcpy(to + 10, &buffers, 2)


cdef inline void copy_piece(char *to, const char *source, uint32_t length) noexcept nogil:
    if length - 16 <= 128 - 16:  # unsigned: from 16 to 128
        vs_copy_short(to, source, length)
    else:
        memcpy(to, source, length)


cdef inline void copy_frame(WorkerC *w, char *to, const Frame *frame) noexcept nogil:
    """The frame's pieces one after the other."""
    cdef const Seg *seg
    cdef uint32_t i
    copy_piece(to, frame.seg.ptr, frame.seg.len)
    if vs_unlikely(frame.nseg > 1):
        w.work += frame.nseg
        to += frame.seg.len
        seg = &w.segs[frame.more]
        for i in range(<uint32_t>frame.nseg - 1):
            memcpy(to, seg[i].ptr, seg[i].len)
            to += seg[i].len


cdef inline void scatter(Seg *to, uint32_t *at, uint32_t *offset, const char *data, uint32_t length) noexcept nogil:
    """Copy `data` to the pieces from `to[at]`, `offset` bytes in; both are moved on."""
    cdef uint32_t part
    while length:
        part = to[at[0]].len - offset[0]
        if part > length:
            part = length
        memcpy(to[at[0]].ptr + offset[0], data, part)
        data += part
        length -= part
        offset[0] += part
        if offset[0] == to[at[0]].len:
            at[0] += 1
            offset[0] = 0


cdef inline int fault_drop(const RingC *ring) noexcept nogil:
    """What frames for a ring are dropped for that is not running."""
    cdef const MemTable *mem
    if ring.fault != FAULT_IOTLB_MISS:
        return DROP_RING_FAULT
    # Acquire: pairs with Ring.use_iotlb.
    mem = <const MemTable *>vs_load_acquire_ptr(<void **>&ring.mem)
    return DROP_PAGE_MISSING if mem.physical else DROP_IOTLB_MISS


cdef inline bint too_short(
    WorkerC *w, RingC *ring, uint16_t head, uint32_t first, uint32_t n
) noexcept nogil:
    """Whether a receive buffer cannot hold a virtio_net_hdr, which is a fault of its ring (5.1.6.3.1).

    A thousand of a byte would be a thousand chains for each frame, and none of them used. Without
    mergeable buffers a frame that finds one like that could never be delivered, nor any other.
    """
    cdef uint64_t length = 0
    cdef uint32_t i
    for i in range(n):
        length += w.rx_segs[first + i].len
    if length >= ring.hdr_len:
        return False
    if length:
        ring_fault(ring, FAULT_SHORT_BUFFER, length, ring.hdr_len)
    else:
        ring_fault(ring, FAULT_EMPTY_BUFFER, head, n)
    return True


cdef inline bint held(WorkerC *w, Counters *counters, uint32_t before, uint32_t need) noexcept nogil:
    """Whether a frame's buffers were so much work that their port is to sit out some turns.

    It is the receiver's doing, so what is for it meanwhile is dropped; its sender pays as well, but
    for this one frame. HOLD_WORK descriptors and one for 64 bytes are more than drivers make of a frame.
    """
    cdef uint32_t spent = w.work - before
    if vs_likely(spent <= HOLD_WORK + (need >> 6)):
        return False
    counters.held_until = w.loops + 1 + spent // (8 * BURST)
    return True


cdef inline int deliver_chains(WorkerC *w, RingC *ring, const Frame *frame) noexcept nogil:
    """Deliver one frame into any shape of buffers.

    First gathers chains until header and frame fit (one chain only without mergeable buffers), then
    copies, then gives the chains back; nothing is taken from the ring when it does not work out. What
    is added to `work` is the receiver's doing, see `held`; the frame's pieces are not.
    Returns how many chains were used, or -1 - the drop reason.
    """
    cdef uint32_t need = frame.len + ring.hdr_len, left = need, n_segs = 0, chains = 0
    cdef uint32_t i, at = 0, offset = 0, room
    cdef int got
    cdef uint16_t head
    cdef Cursor place = cursor_of(ring)
    cdef VringDesc desc
    cdef char hdr[VNET_HDR_MAX]
    cdef const Seg *seg
    while left:
        if chains and not ring.mergeable:
            return -1 - DROP_BUFFER_SMALL
        got = next_offered(ring, &place, &head, &desc)
        if got <= 0:
            return -1 - (DROP_RING_FAULT if got else DROP_NO_BUFFER)
        if n_segs >= MAX_CHAIN:
            return -1 - DROP_BUFFER_SMALL
        got = walk_chain(ring, head, &desc, VRING_DESC_F_WRITE, &w.rx_segs[n_segs], MAX_CHAIN)
        w.work += ring.walked
        if got < 0:
            return -1 - fault_drop(ring)
        room = 0
        for i in range(<uint32_t>got):
            # Saturates: no frame needs more, and 4 GiB buffers may not wrap the sum.
            if w.rx_segs[n_segs + i].len >= left - room:
                room = left
                break
            room += w.rx_segs[n_segs + i].len
        if vs_unlikely(room < ring.hdr_len) and too_short(w, ring, head, n_segs, <uint32_t>got):
            return -1 - DROP_RING_FAULT
        w.rx_heads[chains] = ring.walk_id
        w.rx_counts[chains] = ring.walk_count
        w.rx_lens[chains] = room
        step_over(ring, &place, ring.walk_count)
        if room == left:
            n_segs += i + 1
        else:
            n_segs += got
        left -= room
        chains += 1
    put_header(hdr, frame, ring.hdr_len, <uint16_t>chains)
    scatter(w.rx_segs, &at, &offset, hdr, ring.hdr_len)
    scatter(w.rx_segs, &at, &offset, frame.seg.ptr, frame.seg.len)
    seg = &w.segs[frame.more]
    for i in range(<uint32_t>frame.nseg - 1):
        scatter(w.rx_segs, &at, &offset, seg[i].ptr, seg[i].len)
    if vs_unlikely(ring.dirty_log != NULL):
        log_segs(ring, w.rx_segs, need)
    keep_together(w, ring, chains)
    for i in range(chains):
        put_used(w, ring, w.rx_heads[i], w.rx_counts[i], w.rx_lens[i])
    take_up_to(ring, &place)
    return chains
