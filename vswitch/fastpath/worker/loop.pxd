"""The worker loop: poll, forward, and sleep when there is nothing to do."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vswitch.fastpath.ring.notes cimport note_batch, note_taken
from vswitch.fastpath.ring.virtqueue cimport (
    has_work,
    notify_driver,
    packed_ready,
    packed_step,
    prefetch_packed,
    prefetch_used,
    publish_used,
    put_used,
    refuse_kicks,
    ring_room,
    want_kicks,
)
from vswitch.fastpath.shared.chain cimport miss_answered, read_desc, read_packed, ring_fault
from vswitch.fastpath.shared.turns cimport end_turn
from vswitch.fastpath.shared.types cimport (
    BURST,
    DROP_DISABLED,
    DROP_LINK_DOWN,
    EVENT_TAP_LOST,
    FAULT_HEAD,
    MAX_CHAIN,
    MAX_PORTS,
    SEG_POOL,
    STATE_RUNNING,
    STATE_SLEEPING,
    STATE_STOPPED,
    VNET_HDR_MAX,
    Counters,
    Frame,
    Inject,
    PortC,
    RingC,
    UsedChain,
    VringDesc,
    View,
    WorkerC,
    WorkerView,
)
from vswitch.fastpath.sys.atomics cimport (
    vs_exchange_ptr,
    vs_fence,
    vs_likely,
    vs_load8,
    vs_load16,
    vs_load32,
    vs_load_acquire_ptr,
    vs_now_ns,
    vs_pause,
    vs_prefetch,
    vs_store32,
    vs_store64,
    vs_store_release32,
    vs_store_release64,
    vs_ticks,
    vs_unlikely,
)
from vswitch.fastpath.worker.events cimport post_event, report_fault
from vswitch.fastpath.worker.forward cimport begin_turn, extra_work, forward_burst, take_frame, turn_cost
from vswitch.fastpath.worker.tap cimport tap_receive

cdef extern from "<sys/epoll.h>" nogil:
    union epoll_data:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data data
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)

cdef extern from "<string.h>" nogil:
    void *memset(void *s, int c, size_t n)

cdef enum:
    COLD_AFTER = 1024      # empty polls after which a ring is looked at less often ...
    COLD_EVERY = 16        # ... once in so many loops, as long as other rings are busy
    POLL_ONLY_MS = 1       # sleep of a worker that has a ring without kick eventfd
    TAP_EVERY_NS = 10000   # how often a quiet TAP is read while guests are busy
    EPOLL_BATCH = 64
    LONGEST_TURN = 4       # times what an ordinary turn costs

cdef enum:
    WAKE_TOKEN = 0x7FFFFFFF  # epoll data of the wake eventfd; others are port << 16 | vring index
    TAP_INDEX = 0xFFFF


cdef inline uint16_t take_split(WorkerC *w, RingC *ring) noexcept nogil:
    """Fill in `frames` from a split ring, up to a burst of them; returns how many.

    `last_avail` is moved past them by the caller.
    """
    cdef uint16_t n = ring_room(ring, 1), i, taken = 0
    cdef VringDesc desc
    if n == 0:
        return 0
    if n > ring.quota:
        n = ring.quota
    if ring.armed:
        refuse_kicks(ring)
    for i in range(n):
        w.heads[i] = vs_load16(ring.avail + 2 + (<uint16_t>(ring.last_avail + i) & ring.mask))
        if vs_unlikely(w.heads[i] >= ring.size):
            ring_fault(ring, FAULT_HEAD, w.heads[i], ring.size)
            n = i
            break
        vs_prefetch(&ring.desc[w.heads[i]])
    prefetch_used(ring, n)
    for i in range(n):
        if vs_unlikely(w.n_segs + MAX_CHAIN + 1 > SEG_POOL):
            break
        read_desc(&desc, &ring.desc[w.heads[i]])
        w.frames[i].head = w.frames[i].id = w.heads[i]
        w.frames[i].count = 1
        if vs_unlikely(take_frame(w, ring, &w.frames[i], &desc) < 0):
            break
        taken += 1
    ring.last_avail += taken
    note_taken(ring)
    return taken


cdef inline uint16_t take_packed(WorkerC *w, RingC *ring) noexcept nogil:
    """The same from a packed ring."""
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
            refuse_kicks(ring)
        read_packed(&desc, &ring.desc[ring.last_avail])
        frame = &w.frames[taken]
        frame.head = ring.last_avail
        frame.id = desc.next
        frame.count = 1
        if vs_unlikely(take_frame(w, ring, frame, &desc) < 0):
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


cdef inline void charge(WorkerC *w, RingC *ring, uint16_t taken, uint32_t copies) noexcept nogil:
    """Have a ring pay for its turn, whatever made that dear: it or those whom its frames went to.

    What goes beyond a turn of BURST copies it sits out. And it takes no more in the next one than makes
    LONGEST_TURN ordinary ones, so that others need not wait long either: fewer at a time would take
    long frames their speed, of 64 KiB 4 % at two a turn.
    """
    cdef uint32_t extra = extra_work(w, copies), quota
    copies = turn_cost(w, copies, extra)
    if vs_unlikely(copies > BURST):
        ring.debt = copies - BURST
    if vs_likely(extra == 0 and ring.quota == BURST):
        return
    if extra:
        quota = <uint32_t>taken * (LONGEST_TURN * BURST) // extra
        ring.quota = <uint16_t>min(quota, <uint32_t>BURST) if quota else 1
    elif w.work >> 3 <= BURST and w.copied >> 10 <= BURST:
        ring.quota = 2 * ring.quota if ring.quota <= BURST // 2 else BURST


cdef inline uint32_t poll_transmitq(WorkerC *w, const View *view, RingC *ring) noexcept nogil:
    """Take up to a burst from one transmitq and forward it; returns how many chains were taken."""
    cdef uint16_t i, taken
    cdef uint32_t copies
    cdef Counters *counters
    if vs_unlikely(ring.fault != 0) and not miss_answered(ring):
        return 0
    begin_turn(w)
    taken = take_packed(w, ring) if ring.packed else take_split(w, ring)
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


cdef inline void set_busy(WorkerC *w, bint busy, uint64_t now) noexcept nogil:
    """Keep the account of busy and idle time: `busy` since `now`."""
    if w.busy == busy:
        return
    if w.busy:
        w.busy_ns += now - w.mark_ns
    else:
        w.idle_ns += now - w.mark_ns
    w.busy = busy
    w.mark_ns = now


cdef inline bint arm_rings(const WorkerView *mine) noexcept nogil:
    """Ask every driver for kicks, then look once more; False when work has come meanwhile."""
    cdef uint32_t i
    cdef RingC *ring
    for i in range(mine.n_transmitqs):
        ring = mine.transmitqs[i]
        if not ring.armed:
            want_kicks(ring)
    # Full fence: our wish for kicks is visible before avail.idx is read again. Pairs with the
    # driver's fence between writing avail.idx and reading avail_event or the flags (2.7.10.3).
    vs_fence()
    for i in range(mine.n_transmitqs):
        ring = mine.transmitqs[i]
        # A ring that waited for a translation may have it by now and not have been polled since,
        # for cold rings are not polled in every loop. With the view that came with the translation
        # seen, nothing else would wake this worker.
        if (ring.fault == 0 or miss_answered(ring)) and has_work(ring):
            return False
    return True


cdef inline void sleep_until_event(WorkerC *w, const View *view) noexcept nogil:
    """Wait in epoll for a kick, a frame on the TAP or a wish of the main thread.

    Between the two state changes this worker touches neither the view nor guest memory, so the main
    thread takes it as quiescent. `view` may be freed as soon as the state says sleeping.
    """
    cdef epoll_event events[EPOLL_BATCH]
    cdef const WorkerView *mine = &view.workers[w.id]
    cdef const View *current
    cdef int timeout = POLL_ONLY_MS if mine.poll_only else -1
    cdef int n, i
    cdef uint32_t port, index
    cdef RingC *ring
    vs_store32(&w.state, STATE_SLEEPING)
    # Full fence: either main sees us sleeping, or we see its new view, its frame to inject or its
    # order to stop. Pairs with the fences in Engine.publish, Engine.inject and Worker.stop.
    vs_fence()
    if (
        vs_load_acquire_ptr(&w.shared.view) != <void *>view
        or vs_load32(&w.stop)
        or (w.id == 0 and vs_load_acquire_ptr(&w.shared.inject) != NULL)
    ):
        vs_store32(&w.state, STATE_RUNNING)
        # Full fence: as below, and pairs with that in Engine.publish.
        vs_fence()
        return
    w.sleeps += 1
    end_turn(&w.turns, vs_ticks())
    n = epoll_wait(w.epoll_fd, events, EPOLL_BATCH, timeout)
    w.wakeups += 1
    vs_store64(&w.turns.mark, vs_ticks())
    # Release: a turn that is seen to run has begun. Pairs with the acquire in Worker.turns.
    vs_store_release32(&w.state, STATE_RUNNING)
    # Full fence: running before the view is loaded. Pairs with the fence in Engine.publish.
    vs_fence()
    current = <const View *>vs_load_acquire_ptr(&w.shared.view)
    for i in range(n):
        if events[i].data.u64 == WAKE_TOKEN:
            continue
        port = <uint32_t>(events[i].data.u64 >> 16)
        index = <uint32_t>(events[i].data.u64 & 0xFFFF)
        # Numbers, not pointers: what they named may be gone.
        if port < MAX_PORTS and index < current.ports[port].n_rings:
            ring = current.ports[port].rings[index]
            if ring != NULL:
                w.counters[port].kicks += 1


cdef inline void forgive(WorkerC *w, const WorkerView *mine) noexcept nogil:
    """Nobody was there for whom those with debts sat out."""
    cdef uint32_t i
    for i in range(mine.n_transmitqs):
        mine.transmitqs[i].debt = 0
    w.tap_debt = 0


cdef inline void worker_loop(WorkerC *w) noexcept nogil:
    """Run until told to stop."""
    cdef const View *view
    cdef const WorkerView *mine
    cdef RingC *ring
    cdef uint32_t i, work, owing, got, loops = 0
    cdef uint64_t idle_since = 0, tap_due = 0, now
    cdef uint64_t idle_limit = w.shared.idle_ns
    cdef bint tap_hot = True
    now = w.mark_ns = vs_now_ns()
    w.busy = 0
    vs_store64(&w.turns.mark, vs_ticks())
    # Release: as in sleep_until_event.
    vs_store_release32(&w.state, STATE_RUNNING)
    while True:
        # Everything read under the previous view is done with. The full fence keeps the load of the
        # view behind the store of the epoch; pairs with the fence in Engine.publish.
        vs_store_release64(&w.epoch, w.epoch + 1)
        vs_fence()
        end_turn(&w.turns, vs_ticks())
        if vs_unlikely(vs_load32(&w.stop)):
            break
        view = <const View *>vs_load_acquire_ptr(&w.shared.view)
        mine = &view.workers[w.id]
        loops += 1
        work = owing = 0
        for i in range(mine.n_transmitqs):
            ring = mine.transmitqs[i]
            if ring.empty_polls >= COLD_AFTER and loops % COLD_EVERY:
                continue
            if vs_unlikely(ring.debt):
                # As many turns of the others as what it made would have filled.
                ring.debt -= BURST if ring.debt > BURST else ring.debt
                owing += 1
                continue
            got = poll_transmitq(w, view, ring)
            if got:
                ring.empty_polls = 0
                work += got
            else:
                ring.empty_polls += ring.empty_polls < COLD_AFTER
        if mine.n_taps:
            # The clock is cheap but not free: it is read in one loop of eight.
            if vs_unlikely(w.tap_debt):
                w.tap_debt -= BURST if w.tap_debt > BURST else w.tap_debt
                owing += 1
            elif tap_hot or (loops & 7 == 0 and vs_now_ns() >= tap_due):
                got = 0
                for i in range(mine.n_taps):
                    got += poll_tap(w, view, mine.taps[i])
                tap_hot = got != 0
                work += got
                if not tap_hot:
                    tap_due = vs_now_ns() + TAP_EVERY_NS
        if w.id == 0 and vs_unlikely(vs_load_acquire_ptr(&w.shared.inject) != NULL):
            send_injected(w, view)
        w.loops += 1
        if vs_unlikely(owing) and work == 0:
            if loops % COLD_EVERY == 0:
                forgive(w, mine)
            else:
                loops = COLD_EVERY - 1  # only who looked at the cold ones, too, knows that nobody waits
            work = owing
        if work:
            idle_since = 0
            # Since the last look in vain: the first burst is work, too.
            set_busy(w, True, now)
            continue
        vs_pause()
        now = vs_now_ns()
        set_busy(w, False, now)
        if idle_since == 0:
            idle_since = now
        if now - idle_since < idle_limit:
            continue
        if arm_rings(mine):
            sleep_until_event(w, view)
            tap_hot = True
            now = vs_now_ns()
        idle_since = 0
        # What was cold may be what woke us.
        loops = COLD_EVERY - 1
    set_busy(w, not w.busy, vs_now_ns())
    vs_store32(&w.state, STATE_STOPPED)
