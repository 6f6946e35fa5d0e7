"""Egress lists, and frames into a guest's receiveqs.

Frames arrive in batches for one port; the used index is published and the driver notified once a batch
and ring.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vswitch.fastpath.ring.dispatch cimport (
    notify_driver,
    prepare_buffers,
    publish_used,
    put_used,
    take_one,
    used_in_place,
)
from vswitch.fastpath.ring.split cimport write_used_elem
from vswitch.fastpath.shared.chain cimport miss_answered
from vswitch.fastpath.shared.dirty cimport log_host
from vswitch.fastpath.shared.port cimport KIND_TAP
from vswitch.fastpath.shared.ring cimport RingC
from vswitch.fastpath.shared.sizes cimport BURST, FINISH_BATCH
from vswitch.fastpath.shared.view cimport PortView, View
from vswitch.fastpath.shared.virtio cimport VringUsedElem
from vswitch.fastpath.shared.words cimport (
    DROP_BAD_GSO,
    DROP_BUFFER_PIECES,
    DROP_EGRESS_MTU,
    DROP_NO_BUFFER,
    Counters,
)
from vswitch.fastpath.shared.worker cimport Frame, WorkerC
from vswitch.fastpath.sys.atomics cimport vs_likely, vs_load32, vs_pause, vs_trylock, vs_unlikely, vs_unlock
from vswitch.fastpath.worker.buffers cimport copy_frame, copy_piece, deliver_chains, fault_drop, held, put_header
from vswitch.fastpath.worker.events cimport report_fault
from vswitch.fastpath.worker.finish cimport Finish, finish_begin, finish_next, finish_work
from vswitch.fastpath.worker.flow cimport flow_hash
from vswitch.fastpath.worker.tap cimport tap_send


cdef inline uint16_t deliver_plain(
    WorkerC *w, RingC *ring, const uint8_t *which, uint16_t n, uint32_t max_len, uint64_t *total
) noexcept nogil:
    """The first of `n` frames that are in one piece and fit the prepared buffers, where used_in_place.

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
    if vs_likely(used_in_place(ring)):
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
            if vs_unlikely(ring.dirty_log != NULL):
                log_host(ring, host, need)
            put_used(w, ring, head, 1, need)
            take_one(ring)
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
            w.work += frame.nseg
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


cdef inline void deliver_queues(
    WorkerC *w, const PortView *to, const uint8_t *which, uint16_t n, Counters *counters
) noexcept nogil:
    """Spread frames over several receiveqs, each flow to one of them."""
    cdef uint16_t i, q
    for q in range(to.n_receiveqs):
        w.queue_n[q] = 0
    for i in range(n):
        q = <uint16_t>(flow_hash(w, &w.frames[which[i]]) % to.n_receiveqs)
        w.queue[q][w.queue_n[q]] = which[i]
        w.queue_n[q] += 1
    for q in range(to.n_receiveqs):
        if w.queue_n[q]:
            deliver(w, to.receiveqs[q], w.queue[q], w.queue_n[q], counters)


cdef inline void deliver_list(WorkerC *w, const View *view, uint16_t id) noexcept nogil:
    """Deliver what stands on a port's list, which is empty then."""
    cdef uint16_t n = w.egress_n[id]
    cdef const PortView *to = &view.ports[id]
    w.egress_n[id] = 0
    w.copies += n
    if to.port.kind == KIND_TAP:
        tap_send(w, to.port, w.egress[id], n, &w.counters[id])
    elif to.n_receiveqs == 1:
        deliver(w, to.receiveqs[0], w.egress[id], n, &w.counters[id])
    else:
        deliver_queues(w, to, w.egress[id], n, &w.counters[id])


cdef inline void deliver_lists(WorkerC *w, const View *view) noexcept nogil:
    """Deliver what stands on any list."""
    cdef uint32_t i
    for i in range(w.n_touched):
        deliver_list(w, view, w.touched[i])
    w.n_touched = 0
    w.n_variants = w.n_variant_segs = 0


cdef inline uint16_t begin_list(WorkerC *w, const View *view, uint16_t port) noexcept nogil:
    """Note a port whose list is empty, or deliver one that is full; how many stand on it then: none."""
    if w.egress_n[port]:
        deliver_list(w, view, port)
    else:
        w.touched[w.n_touched] = port
        w.n_touched += 1
    return 0


cdef inline void send_to(WorkerC *w, const View *view, uint16_t port, uint8_t i) noexcept nogil:
    """Put `frames[i]` on the list of an egress port; one may stand there more than once."""
    cdef uint16_t n = w.egress_n[port]
    # None stand there yet, or as many as there may be: one question for both.
    if vs_unlikely(n & (BURST - 1) == 0):
        n = begin_list(w, view, port)
    w.egress[port][n] = i
    w.egress_n[port] = n + 1
