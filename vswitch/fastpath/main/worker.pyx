"""Workers as the main thread sees them: made, run, woken and asked."""

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

import os

from vswitch.fastpath.shared.turns import open_schedstat

from vswitch.fastpath.shared.sizes cimport EVENT_SLOTS, LINEAR_LEN, MAX_PORTS
from vswitch.fastpath.shared.turns cimport describe_turns, ticks_to_ns
from vswitch.fastpath.shared.view cimport View, WorkerView
from vswitch.fastpath.shared.words cimport Counters, EventC
from vswitch.fastpath.shared.worker cimport STATE_RUNNING, STATE_SLEEPING, STATE_STOPPED, WorkerC
from vswitch.fastpath.sys.atomics cimport (
    vs_fence,
    vs_load32,
    vs_load64,
    vs_load_acquire32,
    vs_now_ns,
    vs_store32,
    vs_store_release32,
    vs_ticks,
)
from vswitch.fastpath.sys.notify cimport vs_notifier_close, vs_notifier_open
from vswitch.fastpath.sys.uring cimport vs_uring_close
from vswitch.fastpath.worker.ingress cimport poll_tap, poll_transmitq, send_injected
from vswitch.fastpath.worker.loop cimport WAKE_TOKEN, arm_rings, epoll_event, worker_loop
from vswitch.fastpath.worker.tap cimport STAGING_LEN

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<sys/epoll.h>" nogil:
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL
    uint32_t EPOLLIN, EPOLLET

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initval, int flags)
    int eventfd_write(int fd, uint64_t value)
    int EFD_NONBLOCK, EFD_CLOEXEC


cdef class Worker:
    """One poll thread's state. `run` is the thread's body."""

    def __cinit__(self, int number, bint aio=True):
        self.c = <WorkerC *>aligned_alloc(64, (sizeof(WorkerC) + 63) // 64 * 64)
        if self.c == NULL:
            raise MemoryError
        memset(self.c, 0, sizeof(WorkerC))
        self.id = number
        self.c.id = number
        self.c.epoll_fd = self.c.wake_fd = self.c.notifier.file = self.c.uring.fd = -1
        self.c.turns.schedstat = -1
        self.c.counters = <Counters *>calloc(MAX_PORTS, sizeof(Counters))
        self.c.events = <EventC *>calloc(EVENT_SLOTS, sizeof(EventC))
        self.c.staging = <char *>aligned_alloc(4096, STAGING_LEN)
        self.c.linear = <char *>aligned_alloc(64, LINEAR_LEN)
        if (
            self.c.counters == NULL or self.c.events == NULL or self.c.staging == NULL
            or self.c.linear == NULL
        ):
            raise MemoryError
        self.c.fragment_id = int.from_bytes(os.urandom(4), "little")
        self.c.event_armed = 1
        self.c.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        self.c.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.c.epoll_fd < 0 or self.c.wake_fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.watch(self.c.wake_fd, WAKE_TOKEN)
        if aio:
            vs_notifier_open(&self.c.notifier)

    def __dealloc__(self):
        if self.c != NULL:
            if self.c.epoll_fd >= 0:
                os.close(self.c.epoll_fd)
            if self.c.wake_fd >= 0:
                os.close(self.c.wake_fd)
            if self.c.turns.schedstat >= 0:
                os.close(self.c.turns.schedstat)
            vs_notifier_close(&self.c.notifier)
            vs_uring_close(&self.c.uring)
            free(self.c.counters)
            free(self.c.events)
            free(self.c.staging)
            free(self.c.linear)
            free(self.c)

    def watch(self, int fd, uint64_t token):
        """Wake up when `fd` becomes readable. Edge-triggered: nobody needs to read it empty."""
        cdef epoll_event event
        event.events = EPOLLIN | EPOLLET
        event.data.u64 = token
        if epoll_ctl(self.c.epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0:
            raise OSError(errno, os.strerror(errno))

    def unwatch(self, int fd):
        cdef epoll_event event
        epoll_ctl(self.c.epoll_fd, EPOLL_CTL_DEL, fd, &event)

    def run(self):
        """Poll and forward until `stop`; call it in a thread of its own."""
        self.c.turns.schedstat = open_schedstat()
        with nogil:
            worker_loop(self.c)

    def turn(self):
        """Look once at every ring and TAP, in the calling thread; returns how many chains came.

        For tests that go step by step, and never while `run` does.
        """
        cdef const View *view = <const View *>self.c.shared.view
        cdef const WorkerView *mine = &view.workers[self.c.id]
        cdef uint32_t i, got = 0
        with nogil:
            self.c.loops += 1
            for i in range(mine.n_transmitqs):
                got += poll_transmitq(self.c, view, mine.transmitqs[i])
            for i in range(mine.n_taps):
                got += poll_tap(self.c, view, mine.taps[i])
            if self.c.shared.inject != NULL:
                send_injected(self.c, view)
        return got

    def arm(self):
        """Ask the drivers for kicks, as before a sleep; False if there is something to do first.

        For tests, as `turn` is.
        """
        cdef const View *view = <const View *>self.c.shared.view
        cdef bint idle
        with nogil:
            idle = arm_rings(&view.workers[self.c.id])
        return idle

    def stop(self):
        vs_store32(&self.c.stop, 1)
        # Full fence: the order is visible before the wake-up; pairs with sleep_until_event.
        vs_fence()
        eventfd_write(self.c.wake_fd, 1)

    @property
    def running(self):
        return vs_load32(&self.c.state) != STATE_STOPPED

    def stats(self):
        """Counters of the loop; times in nanoseconds up to now."""
        cdef WorkerC *c = self.c
        cdef uint64_t busy = vs_load64(&c.busy_ns), idle = vs_load64(&c.idle_ns)
        cdef uint64_t mark = vs_load64(&c.mark_ns), now = vs_now_ns()
        if vs_load32(&c.state) != STATE_STOPPED and now > mark:
            if c.busy:
                busy += now - mark
            else:
                idle += now - mark
        return {
            "id": self.id,
            "state": "sleeping" if vs_load32(&c.state) == STATE_SLEEPING else "busy",
            "loops": vs_load64(&c.loops),
            "bursts": vs_load64(&c.bursts),
            "frames": vs_load64(&c.frames_total),
            "sleeps": vs_load64(&c.sleeps),
            "wakeups": vs_load64(&c.wakeups),
            "notify": "aio" if c.notifier.context else "write",
            "busy_ns": busy,
            "idle_ns": idle,
            "events_lost": vs_load32(&c.events_lost),
        }

    def turns(self):
        """The longest turns of the loop by window, as api.TurnsInfo has them.

        The present one counts as far as it has come: a worker that hangs is seen.
        """
        cdef uint64_t began = vs_load64(&self.c.turns.mark), now = vs_ticks()
        cdef uint64_t unfinished = 0
        # Acquire: the state before the mark, which is another one if it has slept meanwhile. Pairs
        # with the release in sleep_until_event.
        if (
            vs_load_acquire32(&self.c.state) == STATE_RUNNING
            and vs_load64(&self.c.turns.mark) == began and now > began
        ):
            unfinished = ticks_to_ns(&self.c.turns, now - began)
        return describe_turns(&self.c.turns, vs_now_ns(), unfinished)

    cdef _check(self, uint32_t most):
        """Take up to `most` events that have come; returns (kind, port, other, key) tuples."""
        cdef WorkerC *c = self.c
        cdef uint32_t tail = c.event_tail
        cdef uint32_t head
        cdef EventC *event
        found = []
        # Acquire: the index before the events; pairs with the release in post_event.
        head = vs_load_acquire32(&c.event_head)
        if head - tail > most:
            head = tail + most
        while tail != head:
            event = &c.events[tail & (EVENT_SLOTS - 1)]
            found.append((event.kind, event.port, event.other, event.key))
            tail += 1
        # Release: the events are read before their slots are free; pairs with post_event.
        vs_store_release32(&c.event_tail, tail)
        return found
