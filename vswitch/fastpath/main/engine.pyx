"""The engine: workers, the view they forward by, and how the main thread changes it.

The main thread never edits what a worker may be reading. It builds a new View, publishes it with
one pointer store, and gives the old one, and whatever else was taken away with it, free only after
every worker has passed a quiescent point: the top of its loop, or its sleep.
"""

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

import os

from vswitch.fastpath.main.fdb import NO_LIMIT
from vswitch.fastpath.shared.words import DROP_REASONS, EVENT_NAMES

from vswitch.fastpath.main.fdb_table cimport Shares
from vswitch.fastpath.main.network cimport Network
from vswitch.fastpath.main.port cimport Port
from vswitch.fastpath.main.ring cimport Ring
from vswitch.fastpath.main.view cimport Shown, build_view
from vswitch.fastpath.main.worker cimport Worker
from vswitch.fastpath.shared.sizes cimport MAX_PORTS, MAX_WORKERS
from vswitch.fastpath.shared.view cimport View
from vswitch.fastpath.shared.words cimport Counters
from vswitch.fastpath.shared.worker cimport STATE_RUNNING, Inject, Shared
from vswitch.fastpath.sys.atomics cimport (
    vs_cas_ptr,
    vs_fence,
    vs_load32,
    vs_load64,
    vs_load_acquire32,
    vs_load_acquire64,
    vs_load_acquire_ptr,
    vs_now_ns,
    vs_pause,
    vs_store32,
    vs_store_release_ptr,
)
from vswitch.fastpath.sys.notify cimport vs_notifier_close, vs_notifier_open, vs_notify
from vswitch.fastpath.sys.uring cimport vs_uring_open
from vswitch.fastpath.worker.loop cimport TAP_INDEX

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initval, int flags)
    int eventfd_write(int fd, uint64_t value)
    int EFD_NONBLOCK, EFD_CLOEXEC

FOREVER = (1 << 64) - 1


cdef class Engine:
    """Ports, networks and workers.

    `fdb_size` and `learning` are those of the network that ports are in which join no other.
    `idle_ns` is how long a worker looks for work in vain before it sleeps; None polls for ever.
    Without `aio`, frontends are notified as where the kernel has no AIO (notify.h), without `uring`
    frames are written to TAPs as where it has no io_uring (uring.h).
    Methods are for one thread, the main one.
    """

    def __cinit__(
        self, int workers=1, fdb_size=65536, idle_ns=50_000, bint aio=True, bint uring=True,
        bint learning=True,
    ):
        self.notifier.file = -1
        if not 1 <= workers <= MAX_WORKERS:
            raise ValueError(f"{workers} workers; between 1 and {MAX_WORKERS} are possible")
        self.shared = <Shared *>aligned_alloc(64, (sizeof(Shared) + 63) // 64 * 64)
        if self.shared == NULL:
            raise MemoryError
        memset(self.shared, 0, sizeof(Shared))
        self.shared.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.shared.event_fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.shares = Shares()
        self.default = self.add_network("default", fdb_size, learning)
        self.shared.idle_ns = FOREVER if idle_ns is None else idle_ns
        self.shared.n_workers = workers
        self.workers = []
        self.ports = {}
        self.retired = []
        self.leaving = []
        self.injected = []
        for number in range(workers):
            worker = Worker(number, aio)
            (<Worker>worker).c.shared = self.shared
            self.workers.append(worker)
        self.shared.view = build_view(self.ports, self.shared.n_workers)
        self.aio_error = vs_notifier_open(&self.notifier) if aio else 0
        self.uring = uring
        self.uring_error = 0

    def __dealloc__(self):
        vs_notifier_close(&self.notifier)
        if self.shared != NULL:
            for item in self.injected or ():
                free(<void *><uintptr_t>item)
            free(self.shared.view)
            if self.shared.event_fd >= 0:
                os.close(self.shared.event_fd)
            free(self.shared)

    @property
    def event_fd(self):
        """Readable when `take_events` has something."""
        return self.shared.event_fd

    @property
    def report_macs(self):
        """Whether learned and moved addresses become events."""
        return bool(self.shared.report_macs)

    @report_macs.setter
    def report_macs(self, bint value):
        vs_store32(&self.shared.report_macs, value)

    # Networks, ports and rings

    @property
    def fdb(self):
        """That of the default network."""
        return self.default.fdb

    def add_network(self, str name, fdb_size=65536, bint learning=True):
        """A network without ports. It is gone when its last reference is, and its last port has left."""
        return Network(name, fdb_size, learning, self.shares)

    def add_port(self, str name, int tap_fd=-1):
        """A new port with the lowest free number; a TAP when `tap_fd` is given.

        Raises OSError when MAX_PORTS are in use. Visible to workers after `publish`.
        """
        cdef Worker worker
        for number in range(MAX_PORTS):
            if number not in self.ports:
                break
        else:
            raise OSError(f"all {MAX_PORTS} ports are in use")
        if tap_fd >= 0 and self.uring:
            # No worker looks at it before it sees this port.
            for each in self.workers:
                worker = each
                if worker.c.uring.fd < 0 and not self.uring_error:
                    self.uring_error = vs_uring_open(&worker.c.uring)
        port = Port(name, number, tap_fd >= 0, tap_fd)
        port.join(self.default)
        self.default.fdb.limit(number, NO_LIMIT)
        for worker in self.workers:
            memset(&worker.c.counters[number], 0, sizeof(Counters))
        if tap_fd >= 0:
            worker = self.workers[0]
            worker.watch(tap_fd, <uint64_t>number << 16 | TAP_INDEX)
        self.ports[number] = port
        return port

    def remove_port(self, Port port):
        """Take a port away; its rings must be stopped. Its number is free after `forget`."""
        cdef Worker worker = self.workers[0]
        if port.c.tap_fd >= 0:
            worker.unwatch(port.c.tap_fd)
        port.rings.clear()
        port.removed = True
        if port.network is not None:
            port.network.fdb.flush(port.id, True)

    def forget(self, Port port):
        """Give a removed port's number free, after quiescence."""
        # Workers may have learned from the port until they passed their quiescent point.
        if port.network is not None:
            port.network.fdb.flush(port.id, True)
        port.journal.release()
        del self.ports[port.id]

    def attach(self, Ring ring, int kick_fd, int worker=0):
        """Give a started ring to a worker; `kick_fd` -1: it is polled, without kicks."""
        cdef Worker owner
        ring.kick_fd = kick_fd
        if not ring.is_transmitq:
            return  # nobody waits for receive buffers: frames that find none are dropped
        owner = self.workers[worker]
        ring.worker = worker
        if kick_fd >= 0:
            owner.watch(kick_fd, <uint64_t>ring.port.id << 16 | <uint64_t>ring.c.index)

    def finish_move(self, Ring ring, int worker):
        """Give a ring to another worker, after `Ring.begin_move`, `publish` and quiescence.

        False if the ring was stopped meanwhile. It is polled again after another `publish`.
        """
        if not ring.moving:
            return False
        kick_fd = ring.kick_fd
        self.detach(ring)
        self.attach(ring, kick_fd, worker)
        ring.moving = False
        ring.published = True
        # Nobody polls it at present. Its new worker is to look at it at once.
        ring.c.empty_polls = 0
        return True

    def detach(self, Ring ring):
        """Stop waiting for the ring's kicks, before its eventfd is closed."""
        cdef Worker worker
        if ring.worker >= 0 and ring.kick_fd >= 0:
            worker = self.workers[ring.worker]
            worker.unwatch(ring.kick_fd)
        ring.worker = -1
        ring.kick_fd = -1

    # Publishing

    def publish(self):
        """Show the workers the present ports and rings; returns a ticket for `passed`."""
        cdef View *view = build_view(self.ports, self.shared.n_workers)
        cdef Shown old = Shown()
        cdef Worker worker
        old.view = <View *>self.shared.view
        vs_store_release_ptr(&self.shared.view, view)
        # Full fence: the new view is visible before the workers' states are read. Pairs with the
        # fences in worker_loop and sleep_until_event.
        vs_fence()
        epochs = []
        for worker in self.workers:
            if vs_load32(&worker.c.state) == STATE_RUNNING:
                epochs.append(vs_load_acquire64(&worker.c.epoch))
            else:
                epochs.append(None)
                # It may have to wait for other rings, or in another way, than when it fell asleep.
                eventfd_write(worker.c.wake_fd, 1)
        self.tickets += 1
        self.retired.append((self.tickets, epochs, [*self.leaving, old]))
        self.leaving = []
        return self.tickets

    def retire(self, thing):
        """Keep an object that was just taken out of use; see `dataplane.handover.HandOver.retire`."""
        self.leaving.append(thing)

    def collect(self):
        """Let go what no worker can be using."""
        self.passed(self.tickets)

    def passed(self, ticket):
        """True once no worker can be using anything from before the publish of that ticket."""
        cdef Worker worker
        while self.retired:
            number, epochs, leaving = self.retired[0]
            for index, epoch in enumerate(epochs):
                if epoch is None:
                    continue
                worker = self.workers[index]
                if (
                    vs_load32(&worker.c.state) == STATE_RUNNING
                    and vs_load_acquire64(&worker.c.epoch) == epoch
                ):
                    return ticket < number
                epochs[index] = None
            del self.retired[0]
            for thing in leaving:
                if callable(thing):
                    thing()
        return True

    def wait(self, ticket, uint64_t patience_ns=20_000):
        """Like `passed`, but look again for a short while, without the GIL."""
        cdef uint64_t until = vs_now_ns() + patience_ns
        cdef int _i
        while not self.passed(ticket):
            if vs_now_ns() > until:
                return False
            with nogil:
                for _i in range(50):
                    vs_pause()
        return True

    def inject(self, Port port, bytes frame):
        """Send a short frame (up to 64 bytes) as if it had come from `port`."""
        cdef Inject *item
        cdef void *newest
        cdef Worker worker = self.workers[0]
        if <size_t>len(frame) > sizeof(item.data):
            raise ValueError(f"a frame of {len(frame)} bytes; at most {sizeof(item.data)} fit")
        self._reap()
        item = <Inject *>calloc(1, sizeof(Inject))
        if item == NULL:
            raise MemoryError
        item.port = port.c.id
        item.len = len(frame)
        memcpy(item.data, <const char *>frame, item.len)
        self.injected.append(<uintptr_t>item)
        while True:
            newest = vs_load_acquire_ptr(&self.shared.inject)
            item.next = <Inject *>newest
            if vs_cas_ptr(&self.shared.inject, newest, item):
                break
        # Full fence: the frame is visible before the wake-up; pairs with sleep_until_event.
        vs_fence()
        eventfd_write(worker.c.wake_fd, 1)

    def signal(self, int fd):
        """Signal a frontend's eventfd, which never waits; a full counter is a signal already."""
        vs_notify(&self.notifier, fd)

    def _reap(self):
        cdef Inject *item
        left = []
        for address in self.injected:
            item = <Inject *><uintptr_t>address
            # Acquire: pairs with the release in send_injected.
            if vs_load_acquire32(&item.done):
                free(item)
            else:
                left.append(address)
        self.injected = left

    # Looking

    def stats(self, Port port):
        """Counters of a port, summed over the workers, read while they run."""
        cdef Worker worker
        cdef Counters total
        cdef uint64_t *sums = <uint64_t *>&total
        cdef uint64_t *theirs
        cdef size_t i
        memset(&total, 0, sizeof(total))
        for worker in self.workers:
            theirs = <uint64_t *>&worker.c.counters[port.c.id]
            for i in range(sizeof(Counters) // sizeof(uint64_t)):
                sums[i] += vs_load64(&theirs[i])
        cdef dict found = total  # by the names of its fields
        del found["held_until"]
        drops = zip(DROP_REASONS, found["drops"], strict=True)
        found["drops"] = {name: count for (name, _), count in drops if count}
        return found

    def take_events(self, uint32_t most=0xFFFFFFFF):
        """What the workers have to tell, as (name, port number, other, key) tuples; `most` of it.

        "mac-learned" and "mac-moved" (other: the old port), "ring-fault" and "iotlb-miss" (other:
        vring index), "tap-lost", "mac-limit" (once, until Port.mac_limit_told is reset). Call
        `arm_events` to be woken again.
        """
        cdef Worker worker
        cdef int _i
        found = []
        for _i in range(<int>self.shared.n_workers):
            if <uint32_t>len(found) == most:
                break
            # Another worker is first each time: none waits for what others never stop telling.
            worker = self.workers[self.events_from]
            self.events_from = (self.events_from + 1) % <int>self.shared.n_workers
            for kind, port, other, key in worker._check(most - <uint32_t>len(found)):
                found.append((EVENT_NAMES[kind], port, other, key))
        return found

    def n_transmitqs(self, int worker):
        """How many rings a worker polls, as published last."""
        if not 0 <= worker < <int>self.shared.n_workers:
            raise ValueError(f"there is no worker {worker}")
        return (<const View *>self.shared.view).workers[worker].n_transmitqs

    def arm_events(self):
        """Make `event_fd` readable at the next event; True when events have come meanwhile."""
        cdef Worker worker
        waiting = False
        for worker in self.workers:
            vs_store32(&worker.c.event_armed, 1)
            # Full fence: our wish before we look once more; pairs with post_event.
            vs_fence()
            if vs_load_acquire32(&worker.c.event_head) != worker.c.event_tail:
                waiting = True
        return waiting
