"""The worker loop: poll, forward, and sleep when there is nothing to do."""

from libc.stdint cimport uint32_t, uint64_t

from vswitch.fastpath.ring.dispatch cimport has_work, want_kicks
from vswitch.fastpath.shared.chain cimport miss_answered
from vswitch.fastpath.shared.ring cimport RingC
from vswitch.fastpath.shared.sizes cimport BURST, MAX_PORTS
from vswitch.fastpath.shared.turns cimport end_turn
from vswitch.fastpath.shared.view cimport View, WorkerView
from vswitch.fastpath.shared.worker cimport STATE_RUNNING, STATE_SLEEPING, STATE_STOPPED, WorkerC
from vswitch.fastpath.sys.atomics cimport (
    vs_fence,
    vs_load32,
    vs_load_acquire_ptr,
    vs_now_ns,
    vs_pause,
    vs_store32,
    vs_store64,
    vs_store_release32,
    vs_store_release64,
    vs_ticks,
    vs_unlikely,
)
from vswitch.fastpath.worker.ingress cimport poll_tap, poll_transmitq, send_injected

cdef extern from "<sys/epoll.h>" nogil:
    union epoll_data:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data data
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)

cdef enum:
    COLD_AFTER = 1024      # empty polls after which a ring is looked at less often ...
    COLD_EVERY = 16        # ... once in so many loops, as long as other rings are busy
    POLL_ONLY_MS = 1       # sleep of a worker that has a ring without kick eventfd
    TAP_EVERY_NS = 10000   # how often a quiet TAP is read while guests are busy
    EPOLL_BATCH = 64

cdef enum:
    WAKE_TOKEN = 0x7FFFFFFF  # epoll data of the wake eventfd; others are port << 16 | vring index
    TAP_INDEX = 0xFFFF


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
