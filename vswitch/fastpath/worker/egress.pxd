"""Frames into a guest's receiveq: the one copy.

VIRTIO 1.2, section 5.1.6.4 (device side). Frames arrive here in batches for one ring; the used index
is published and the driver notified once a batch.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from vswitch.fastpath.ring.virtqueue cimport (
    notify_driver,
    packed_ready,
    packed_step,
    prefetch_packed,
    prefetch_used,
    publish_used,
    put_used,
    ring_room,
    write_used_elem,
)
from vswitch.fastpath.shared.chain cimport miss_answered, read_desc, read_packed, ring_fault, walk_chain
from vswitch.fastpath.shared.dirty cimport log_host, log_segs
from vswitch.fastpath.shared.memory cimport gpa_to_host
from vswitch.fastpath.shared.types cimport (
    BURST,
    DROP_BAD_GSO,
    DROP_BUFFER_PIECES,
    DROP_BUFFER_SMALL,
    DROP_EGRESS_MTU,
    DROP_IOTLB_MISS,
    DROP_NO_BUFFER,
    DROP_PAGE_MISSING,
    DROP_RING_FAULT,
    FINISH_BATCH,
    FAULT_EMPTY_BUFFER,
    FAULT_HEAD,
    FAULT_IOTLB_MISS,
    FAULT_SHORT_BUFFER,
    MAX_CHAIN,
    USED_BATCH,
    VNET_HDR_MAX,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    Counters,
    Frame,
    MemTable,
    RingC,
    Seg,
    VringDesc,
    VringUsedElem,
    WorkerC,
)
from vswitch.fastpath.sys.atomics cimport (
    vs_copy_short,
    vs_likely,
    vs_load16,
    vs_load32,
    vs_load_acquire_ptr,
    vs_pause,
    vs_prefetch,
    vs_prefetch_write,
    vs_trylock,
    vs_unlikely,
    vs_unlock,
)
from vswitch.fastpath.worker.events cimport report_fault
from vswitch.fastpath.worker.offload cimport Finish, finish_begin, finish_next, finish_work


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
    copies, then gives the chains back; nothing is taken from the ring when it does not work out.
    Returns how many chains were used, or -1 - the drop reason.
    """
    cdef uint32_t need = frame.len + ring.hdr_len, left = need, n_segs = 0, chains = 0
    cdef uint32_t i, at = 0, offset = 0, room
    cdef int got
    cdef uint16_t head, position = ring.last_avail
    cdef uint8_t wrap = ring.avail_wrap
    cdef VringDesc desc
    cdef char hdr[VNET_HDR_MAX]
    cdef const Seg *seg
    while left:
        if chains and not ring.mergeable:
            return -1 - DROP_BUFFER_SMALL
        if ring.packed:
            if not packed_ready(ring, position, wrap):
                return -1 - DROP_NO_BUFFER
            head = position
            read_packed(&desc, &ring.desc[head])
        else:
            if ring_room(ring, <uint16_t>(chains + 1)) < chains + 1:
                return -1 - (DROP_RING_FAULT if ring.fault else DROP_NO_BUFFER)
            head = vs_load16(ring.avail + 2 + (<uint16_t>(ring.last_avail + chains) & ring.mask))
            if vs_unlikely(head >= ring.size):
                ring_fault(ring, FAULT_HEAD, head, ring.size)
                return -1 - DROP_RING_FAULT
            read_desc(&desc, &ring.desc[head])
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
        packed_step(ring, &position, &wrap, ring.walk_count)
        if room == left:
            n_segs += i + 1
        else:
            n_segs += got
        left -= room
        chains += 1
    w.work += frame.nseg
    put_header(hdr, frame, ring.hdr_len, <uint16_t>chains)
    scatter(w.rx_segs, &at, &offset, hdr, ring.hdr_len)
    scatter(w.rx_segs, &at, &offset, frame.seg.ptr, frame.seg.len)
    seg = &w.segs[frame.more]
    for i in range(<uint32_t>frame.nseg - 1):
        scatter(w.rx_segs, &at, &offset, seg[i].ptr, seg[i].len)
    if vs_unlikely(ring.log != NULL):
        log_segs(ring, w.rx_segs, need)
    if ring.packed and w.n_used + chains > USED_BATCH:
        # A driver that sees the first buffer of a frame expects to find all of them.
        publish_used(w, ring)
    for i in range(chains):
        put_used(w, ring, w.rx_heads[i], w.rx_counts[i], w.rx_lens[i])
    if ring.packed:
        ring.last_avail = position
        ring.avail_wrap = wrap
    else:
        ring.last_avail += <uint16_t>chains
    return chains


cdef inline void locate_buffer(WorkerC *w, RingC *ring, uint16_t i) noexcept nogil:
    """Where the receive buffer of `rx_desc[i]` lies, if it is a plain one: one piece in one region."""
    cdef VringDesc *desc = &w.rx_desc[i]
    cdef uint64_t contiguous
    w.rx_host[i] = NULL
    if vs_likely(
        desc.flags & (VRING_DESC_F_WRITE | VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT)
        == VRING_DESC_F_WRITE
    ):
        w.rx_host[i] = gpa_to_host(ring.mem, desc.addr, desc.len, &contiguous, &ring.region_hint)
        if vs_likely(w.rx_host[i] != NULL):
            desc.len = <uint32_t>contiguous
            vs_prefetch_write(w.rx_host[i])
            vs_prefetch_write(w.rx_host[i] + 64)


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


cdef inline uint16_t prepare_buffers(WorkerC *w, RingC *ring, uint16_t n) noexcept nogil:
    """Read the next `n` receive buffers a stage ahead of the copies.

    Only plain ones (a single writable descriptor in one region) get a host pointer. Returns how
    many were read; fewer than `n` when the driver has not offered as many or the ring is at fault.
    """
    cdef uint16_t room, i, head
    cdef uint64_t contiguous
    cdef VringDesc *desc
    if ring.packed:
        return prepare_packed(w, ring, n)
    room = ring_room(ring, n)
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
        desc = &w.rx_desc[i]
        read_desc(desc, &ring.desc[w.rx_heads[i]])
        locate_buffer(w, ring, i)
    return n


cdef inline uint16_t deliver_plain(
    WorkerC *w, RingC *ring, const uint8_t *which, uint16_t n, uint32_t max_len, uint64_t *total
) noexcept nogil:
    """The first of `n` frames that are in one piece and fit the prepared buffers of a split ring.

    All that deliver_locked does for one of these and no more, so that a short frame's few stores are
    not among many loads. Returns how many; the sum of their lengths is added to `total`.
    """
    cdef uint16_t i, index = ring.last_used, mask = ring.mask
    cdef uint8_t hdr_len = ring.hdr_len
    cdef VringUsedElem *used = ring.used
    cdef uint64_t bytes = 0
    cdef const Frame *frame
    cdef uint32_t need
    cdef char *host
    for i in range(n):
        frame = &w.frames[which[i]]
        need = frame.len + hdr_len
        host = w.rx_host[i]
        if vs_unlikely(
            frame.nseg != 1 or host == NULL or w.rx_desc[i].len < need or frame.wire_len > max_len
        ):
            break
        put_header(host, frame, hdr_len, 1)
        copy_piece(host + hdr_len, frame.seg.ptr, frame.len)
        write_used_elem(&used[<uint16_t>(index + i) & mask], w.rx_heads[i], need)
        bytes += frame.len
    else:
        i = n
    ring.last_used += i
    ring.last_avail += i
    total[0] += bytes
    return i


cdef inline void deliver_locked(
    WorkerC *w, RingC *ring, const uint8_t *which, uint16_t n, Counters *counters
) noexcept nogil:
    cdef uint16_t ready, at = 0, i
    cdef uint32_t need, max_len = vs_load32(&ring.port.max_len)
    cdef uint64_t total = 0, delivered = 0
    cdef const Frame *frame
    cdef char *host
    cdef int result
    cdef uint16_t head
    cdef uint32_t before
    cdef bint over
    if vs_unlikely(ring.fault != 0) and not miss_answered(ring):
        counters.drops[fault_drop(ring)] += n
        return
    if vs_unlikely(counters.held_until > w.loops):
        counters.drops[DROP_BUFFER_PIECES] += n
        return
    ready = prepare_buffers(w, ring, n)
    if vs_likely(not ring.packed and ring.log == NULL):
        at = deliver_plain(w, ring, which, ready, max_len, &total)
        delivered = at
    for i in range(at, n):
        frame = &w.frames[which[i]]
        if vs_unlikely(frame.wire_len > max_len):
            counters.drops[DROP_EGRESS_MTU] += 1
            continue
        need = frame.len + ring.hdr_len
        if vs_likely(at < ready and w.rx_host[at] != NULL and w.rx_desc[at].len >= need):
            host = w.rx_host[at]
            head = w.rx_heads[at]
            put_header(host, frame, ring.hdr_len, 1)
            copy_frame(w, host + ring.hdr_len, frame)
            if vs_unlikely(ring.log != NULL):
                log_host(ring, host, need)
            put_used(w, ring, head, 1, need)
            if ring.packed:
                packed_step(ring, &ring.last_avail, &ring.avail_wrap, 1)
            else:
                ring.last_avail += 1
            at += 1
        else:
            # The prepared buffers are spent, or shaped otherwise. deliver_chains overwrites
            # rx_heads, so what was prepared is void from here on.
            ready = 0
            before = w.work
            result = deliver_chains(w, ring, frame)
            over = held(w, counters, before, need)
            if result < 0:
                counters.drops[-1 - result] += 1
                if -1 - result == DROP_NO_BUFFER:
                    counters.stalls += 1
                if vs_unlikely(ring.fault != 0):
                    counters.drops[fault_drop(ring)] += n - i - 1
                    break
                if vs_unlikely(over):
                    counters.drops[DROP_BUFFER_PIECES] += n - i - 1
                    break
                continue
            if vs_unlikely(over):
                delivered += 1
                total += frame.len
                counters.drops[DROP_BUFFER_PIECES] += n - i - 1
                break
        delivered += 1
        total += frame.len
    if delivered:
        publish_used(w, ring)
        counters.egress_frames += delivered
        counters.egress_bytes += total
        w.copied += total
        notify_driver(w, ring, counters)
    if vs_unlikely(ring.fault != 0):
        report_fault(w, ring)


cdef inline void deliver_finished(
    WorkerC *w, RingC *ring, const Frame *frame, Counters *counters
) noexcept nogil:
    """Finish a frame for a driver that cannot do so itself, and deliver what becomes of it.

    Each segment is delivered, or dropped, for itself.
    """
    cdef Finish f
    cdef uint8_t which[FINISH_BATCH]
    cdef uint16_t n
    if frame.wire_len > vs_load32(&ring.port.max_len):
        counters.drops[DROP_EGRESS_MTU] += 1
        return
    if finish_begin(w, frame, ring.offloads, &f) == 0:
        counters.drops[DROP_BAD_GSO] += 1
        return
    w.work += finish_work(&f)
    while f.left:
        n = 0
        while f.left and n < FINISH_BATCH:
            finish_next(w, frame, &f, n)
            which[n] = <uint8_t>(BURST + n)
            n += 1
        deliver_locked(w, ring, which, n, counters)


cdef inline void deliver_mixed(
    WorkerC *w, RingC *ring, const uint8_t *which, uint16_t n, Counters *counters
) noexcept nogil:
    """Deliver a burst in which some frame asks for more than some receiver takes, in order."""
    cdef uint16_t start = 0, i
    for i in range(n):
        if w.frames[which[i]].needs & ~ring.offloads:
            if i > start:
                deliver_locked(w, ring, which + start, i - start, counters)
            deliver_finished(w, ring, &w.frames[which[i]], counters)
            start = i + 1
    if n > start:
        deliver_locked(w, ring, which + start, n - start, counters)


cdef inline void deliver(
    WorkerC *w, RingC *ring, const uint8_t *which, uint16_t n, Counters *counters
) noexcept nogil:
    """Deliver the frames `w.frames[which[0..n-1]]` into one receiveq.

    With one worker no other thread writes receiveqs and the lock is left alone.
    """
    cdef bint mixed = (w.needs & ~ring.offloads) != 0
    if vs_likely(w.shared.n_workers == 1 and not mixed):
        deliver_locked(w, ring, which, n, counters)
        return
    if w.shared.n_workers == 1:
        deliver_mixed(w, ring, which, n, counters)
        return
    while not vs_trylock(&ring.lock):
        vs_pause()
    if vs_unlikely(mixed):
        deliver_mixed(w, ring, which, n, counters)
    else:
        deliver_locked(w, ring, which, n, counters)
    vs_unlock(&ring.lock)
