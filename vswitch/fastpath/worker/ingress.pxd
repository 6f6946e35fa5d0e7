"""From a transmitq, a TAP or the switch itself: frames are taken, forwarded and given back.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from vswitch.fastpath.ring.dispatch cimport notify_driver, publish_used, put_used, take_chains, walk_chain
from vswitch.fastpath.shared.chain cimport miss_answered
from vswitch.fastpath.shared.memory cimport Seg, gpa_to_host
from vswitch.fastpath.shared.port cimport PortC
from vswitch.fastpath.shared.ring cimport RingC
from vswitch.fastpath.shared.sizes cimport BURST, MAX_CHAIN, VNET_HDR_MAX
from vswitch.fastpath.shared.view cimport View
from vswitch.fastpath.shared.virtio cimport (
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VringDesc,
)
from vswitch.fastpath.shared.words cimport DROP_DISABLED, DROP_LINK_DOWN, DROP_RUNT, EVENT_TAP_LOST, Counters
from vswitch.fastpath.shared.worker cimport Frame, Inject, WorkerC
from vswitch.fastpath.sys.atomics cimport (
    vs_exchange_ptr,
    vs_get16,
    vs_likely,
    vs_load32,
    vs_load8,
    vs_store32,
    vs_store_release32,
    vs_unlikely,
)
from vswitch.fastpath.worker.cost cimport begin_turn, charge, extra_work, turn_cost
from vswitch.fastpath.worker.events cimport post_event, report_fault
from vswitch.fastpath.worker.forward cimport forward_burst
from vswitch.fastpath.worker.tap cimport tap_receive


cdef inline void find_vnet_header(
    RingC *ring, Frame *frame, const Seg *segs, uint32_t n
) noexcept nogil:
    """Note where the virtio_net_hdr of a chain is; one in pieces is gathered."""
    cdef uint32_t have = 0, part, i
    frame.vnet = segs[0].ptr
    if segs[0].len >= ring.hdr_len:
        return
    frame.vnet = <const char *>frame.hdr
    for i in range(n):
        part = ring.hdr_len - have
        if part > segs[i].len:
            part = segs[i].len
        memcpy(<char *>frame.hdr + have, segs[i].ptr, part)
        have += part
        if have == ring.hdr_len:
            break
    if vs_get16(frame.vnet) == 0:
        memset(frame.hdr, 0, VNET_HDR_MAX)


cdef inline int take_frame(WorkerC *w, RingC *ring, Frame *frame, const VringDesc *first) noexcept nogil:
    """Fill in `frame` from the chain at `frame.head`; -1 after faulting the ring.

    `id` and `count` are set by the caller for a chain of one; a longer one sets its own.
    The virtio_net_hdr may share a descriptor with the frame, have one of its own or be spread over
    several (5.1.6.6.1: any layout).
    """
    cdef uint64_t contiguous, total = 0
    cdef uint32_t skip = ring.hdr_len, n, i
    cdef int got
    cdef Seg *segs
    cdef char *host
    frame.drop = 0
    memset(frame.hdr, 0, VNET_HDR_MAX)
    if vs_likely(
        first.flags & (VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE) == 0
        and first.len > ring.hdr_len
    ):
        host = gpa_to_host(ring.mem, first.addr, first.len, &contiguous, &ring.region_hint)
        if vs_likely(host != NULL and contiguous == first.len):
            frame.vnet = host
            frame.seg.ptr = host + ring.hdr_len
            frame.seg.len = first.len - ring.hdr_len
            frame.len = frame.seg.len
            frame.nseg = 1
            frame.more = 0
            return 0
    segs = &w.segs[w.n_segs]
    got = walk_chain(ring, frame.head, first, 0, segs, MAX_CHAIN)
    w.work += ring.walked
    if got < 0:
        return -1
    frame.id = ring.walk_id
    frame.count = ring.walk_count
    n = <uint32_t>got
    if ring.offloads and n:
        find_vnet_header(ring, frame, segs, n)
    while n and segs[0].len <= skip:
        skip -= segs[0].len
        segs += 1
        n -= 1
    if n == 0:
        frame.seg.ptr = NULL
        frame.len = 0
        frame.seg.len = 0
        frame.nseg = 0
        frame.drop = DROP_RUNT + 1
        return 0
    segs[0].ptr += skip
    segs[0].len -= skip
    for i in range(n):
        total += segs[i].len
    frame.seg = segs[0]
    frame.nseg = <uint16_t>n
    frame.more = <uint16_t>(segs + 1 - w.segs)
    frame.len = <uint32_t>total if total < 0xFFFFFFFFu else <uint32_t>0xFFFFFFFFu
    w.n_segs = <uint32_t>(segs + n - w.segs)
    return 0


cdef inline uint32_t poll_transmitq(WorkerC *w, const View *view, RingC *ring) noexcept nogil:
    """Take up to a burst from one transmitq and forward it; returns how many chains were taken."""
    cdef uint16_t i, taken
    cdef uint32_t copies
    cdef Counters *counters
    if vs_unlikely(ring.fault != 0) and not miss_answered(ring):
        return 0
    begin_turn(w)
    taken = take_chains(w, ring, take_frame)
    if taken:
        counters = &w.counters[ring.port.id]
        if vs_likely(vs_load8(&ring.enabled)):
            copies = forward_burst(w, view, ring.port, ring, taken)
            charge(w, ring, taken, copies)
        else:
            # Started but disabled: process and discard ("Ring states" of the protocol document).
            counters.ingress_frames += taken
            for i in range(taken):
                counters.ingress_bytes += w.frames[i].len
            counters.drops[
                DROP_LINK_DOWN if vs_load8(&ring.port.link_down) else DROP_DISABLED
            ] += taken
        for i in range(taken):
            put_used(w, ring, w.frames[i].id, w.frames[i].count, 0)
        publish_used(w, ring)
        notify_driver(w, ring, counters)
        ring.taken += taken
        w.bursts += 1
        w.frames_total += taken
    if vs_unlikely(ring.fault != 0):
        report_fault(w, ring)
    return taken


cdef inline uint32_t poll_tap(WorkerC *w, const View *view, PortC *port) noexcept nogil:
    cdef bint lost = False
    cdef int n
    cdef uint32_t copies
    if vs_unlikely(vs_load32(&port.tap_lost)):
        return 0
    begin_turn(w)
    n = tap_receive(w, port, &lost)
    if n > 0:
        copies = forward_burst(w, view, port, NULL, <uint16_t>n)
        copies = turn_cost(w, copies, extra_work(w, copies))
        if vs_unlikely(copies > BURST):
            w.tap_debt += copies - BURST
        w.bursts += 1
        w.frames_total += n
    if vs_unlikely(lost):
        vs_store32(&port.tap_lost, 1)
        post_event(w, EVENT_TAP_LOST, port.id, 0, 0)
    return <uint32_t>n


cdef inline void send_injected(WorkerC *w, const View *view) noexcept nogil:
    """Forward frames that the switch made itself, oldest first. The main thread frees them.
    """
    cdef Inject *item = <Inject *>vs_exchange_ptr(&w.shared.inject, NULL)
    cdef Inject *oldest = NULL
    cdef Inject *following
    cdef PortC *port
    while item != NULL:
        following = item.next
        item.next = oldest
        oldest = item
        item = following
    while oldest != NULL:
        port = view.ports[oldest.port].port
        if port != NULL:
            memset(w.frames[0].hdr, 0, VNET_HDR_MAX)
            w.frames[0].vnet = <const char *>w.frames[0].hdr
            w.frames[0].seg.ptr = oldest.data
            w.frames[0].seg.len = oldest.len
            w.frames[0].len = oldest.len
            w.frames[0].nseg = 1
            w.frames[0].more = 0
            w.frames[0].drop = 0
            forward_burst(w, view, port, NULL, 1)
        following = oldest.next
        # Release: we are done with it before main frees it. Pairs with the acquire in Engine._reap.
        vs_store_release32(&oldest.done, 1)
        oldest = following
