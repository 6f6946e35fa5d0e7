"""What the machine itself allows: measurements without any switch, beside which a switch is put.

`wakeups` is what waking a sleeping thread costs, `copies` what moving freshly written bytes costs.
Both take two CPUs: the calling thread's and that of a thread of their own.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import contextlib
import mmap
import os
import select
import threading


cdef extern from "barriers.h" nogil:
    uint32_t guest_load_acquire_u32(const uint32_t *p)
    void guest_store_release_u32(uint32_t *p, uint32_t value)
    void guest_pause()
    uint64_t guest_now_ns()


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)


cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *buf, size_t count)


cdef extern from "<sys/epoll.h>" nogil:
    union epoll_data:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data data
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)


cdef enum:
    LINE = 128                 # two lines of 64 bytes: neighbours are fetched together
    YIELD_AFTER = 4096         # looks in vain before the core is offered to others
    CLOSED = 1
    COPY_CLOCK_EVERY = 64      # copies between two looks at the clock
    C_MAX_WAKEUPS = 10000
    LOST_NS = 5000000000       # without an answer for so long, something is broken

MAX_WAKEUPS = C_MAX_WAKEUPS


cdef class _Shared:
    """Two counters, one written by each thread, and whether it is over; each in its own line."""

    cdef uint8_t *memory
    cdef uint32_t *asked
    cdef uint32_t *answered
    cdef uint32_t *over

    def __cinit__(self):
        cdef int i
        self.memory = <uint8_t *>aligned_alloc(LINE, 3 * LINE)
        if self.memory == NULL:
            raise MemoryError()
        for i in range(3 * LINE):
            self.memory[i] = 0
        self.asked = <uint32_t *>self.memory
        self.answered = <uint32_t *>(self.memory + LINE)
        self.over = <uint32_t *>(self.memory + 2 * LINE)

    def __dealloc__(self):
        free(self.memory)

    def close(self):
        """End the other thread; the next look tells it."""
        guest_store_release_u32(self.over, CLOSED)

    def answer_wakeups(self, int epoll_fd):
        """Sleep until the eventfd is written to, say so in memory, and sleep again, until closed."""
        cdef epoll_event event
        cdef uint32_t n = 0
        with nogil:
            while True:
                epoll_wait(epoll_fd, &event, 1, -1)
                if guest_load_acquire_u32(self.over):
                    break
                n += 1
                guest_store_release_u32(self.answered, n)

    def wake(self, int event_fd, double seconds, double gap_s, uint32_t limit):
        """Nanoseconds from before each write to the eventfd until its answer is seen."""
        cdef uint64_t start, now = guest_now_ns(), gap_ns = <uint64_t>(gap_s * 1e9), one = 1
        cdef uint64_t deadline = now + <uint64_t>(seconds * 1e9)
        cdef uint32_t n = 0, vain
        cdef bint lost = False
        cdef uint64_t *spent = <uint64_t *>calloc(limit, sizeof(uint64_t))
        if spent == NULL:
            raise MemoryError()
        try:
            with nogil:
                while n < limit and now < deadline and not lost:
                    start = now
                    while now - start < gap_ns:
                        guest_pause()
                        now = guest_now_ns()
                    vain = 0
                    start = guest_now_ns()
                    write(event_fd, &one, 8)
                    while guest_load_acquire_u32(self.answered) != n + 1:
                        vain += 1
                        if vain % YIELD_AFTER == 0:
                            sched_yield()
                            if guest_now_ns() - start > <uint64_t>LOST_NS:
                                lost = True
                                break
                    now = guest_now_ns()
                    spent[n] = now - start
                    n += 1
            if lost:
                raise TimeoutError("the thread that was to be woken did not answer within 5 s")
            return [spent[i] for i in range(n)]
        finally:
            free(spent)

    def copy(
        self, const uint8_t[::1] source, uint8_t[::1] target, uint32_t length, uint32_t slots,
        uint32_t piece_len,
    ):
        """Copy what the other thread has written, slot after slot, to pieces of `target`."""
        cdef uint32_t done = 0, slot = 0, piece = 0, vain = 0, left, part
        cdef uint32_t pieces = <uint32_t>(target.shape[0] // piece_len)
        cdef const uint8_t *at
        with nogil:
            while not guest_load_acquire_u32(self.over):
                # Acquire: the bytes after the count that says so; pairs with the release in write.
                if guest_load_acquire_u32(self.asked) == done:
                    guest_pause()
                    vain += 1
                    if vain % YIELD_AFTER == 0:
                        sched_yield()
                    continue
                at = &source[<size_t>slot * length]
                left = length
                while left:
                    part = left if left < piece_len else piece_len
                    memcpy(&target[<size_t>piece * piece_len], at, part)
                    at += part
                    left -= part
                    piece += 1
                    if piece == pieces:
                        piece = 0
                slot += 1
                if slot == slots:
                    slot = 0
                done += 1
                # Release: we are done with the slot before it is written again; pairs with write.
                guest_store_release_u32(self.answered, done)

    def write(
        self, const uint8_t[::1] pattern, uint8_t[::1] source, uint32_t slots, uint32_t window,
        double seconds,
    ):
        """Write slot after slot, `window` of them uncopied at most; how many copies a second."""
        cdef uint32_t length = <uint32_t>pattern.shape[0], slot = 0, sent = 0, vain = 0, first
        cdef uint64_t start = guest_now_ns(), now, deadline
        deadline = start + <uint64_t>(seconds * 1e9)
        now = start
        first = guest_load_acquire_u32(self.answered)
        sent = guest_load_acquire_u32(self.asked)
        slot = sent % slots
        with nogil:
            while now < deadline:
                if sent - guest_load_acquire_u32(self.answered) >= window:
                    guest_pause()
                    vain += 1
                    if vain % YIELD_AFTER == 0:
                        sched_yield()
                        now = guest_now_ns()
                    continue
                memcpy(&source[<size_t>slot * length], &pattern[0], length)
                slot += 1
                if slot == slots:
                    slot = 0
                sent += 1
                guest_store_release_u32(self.asked, sent)
                if sent % COPY_CLOCK_EVERY == 0:
                    now = guest_now_ns()
            now = guest_now_ns()
        return <uint32_t>(guest_load_acquire_u32(self.answered) - first) / ((now - start) / 1e9)


@contextlib.contextmanager
def _helper(int cpu, target, close):
    """`target()` in a thread on this CPU for the length of the block; `close` makes it return."""
    failed = []
    started = threading.Event()

    def run():
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError as error:
            failed.append(error)
            return
        finally:
            started.set()
        target()

    thread = threading.Thread(target=run, name=f"limit on CPU {cpu}", daemon=True)
    thread.start()
    started.wait()
    if failed:
        thread.join()
        raise ValueError(f"CPU {cpu} cannot be used: {failed[0].strerror}")
    try:
        yield
    finally:
        close()
        thread.join()


def wakeups(int cpu, double seconds, *, double gap_s=0.0, uint32_t limit=C_MAX_WAKEUPS):
    """How long it takes to wake a thread that sleeps on `cpu`, in nanoseconds, again and again.

    From before an eventfd is written to until the thread, back from epoll_wait, has written to
    memory and that was seen: what a guest that kicks a sleeping switch cannot undercut. The next
    wake-up comes `gap_s` seconds later, for `seconds` and `limit` times at most (1 to MAX_WAKEUPS).
    Polls in between. ValueError if the CPU may not be used.
    """
    if not 1 <= limit <= C_MAX_WAKEUPS:
        raise ValueError(f"{limit} wake-ups, must be 1 to {C_MAX_WAKEUPS}")
    shared = _Shared()
    event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    poll = select.epoll()
    try:
        # By edges, so nobody has to read it.
        poll.register(event_fd, select.EPOLLIN | select.EPOLLET)

        def close():
            shared.close()
            os.eventfd_write(event_fd, 1)

        with _helper(cpu, lambda: shared.answer_wakeups(poll.fileno()), close):
            return shared.wake(event_fd, seconds, gap_s, limit)
    finally:
        poll.close()
        os.close(event_fd)


def copies(
    int cpu, double seconds, uint32_t length, *, uint32_t slots, uint32_t piece_len,
    uint32_t pieces, uint32_t window, double warm_up_s=0.0,
):
    """How many messages of `length` bytes a thread on `cpu` copies a second.

    The calling thread writes every message anew into one of `slots` places, at most `window` of
    them waiting; the other thread copies each to the next of `pieces` pieces of `piece_len` bytes.
    memcpy on both sides and one index each way: what a switch that copies once cannot exceed. The
    memory is shared memory in pages of the same kind as a software guest's. `warm_up_s` seconds go
    before.
    """
    if not length or not slots or not piece_len or not pieces or not 1 <= window <= slots:
        raise ValueError("length, slots, piece_len, pieces and window must be positive")
    if window * ((length + piece_len - 1) // piece_len) > pieces:
        raise ValueError(f"{pieces} pieces of {piece_len} bytes do not hold {window} messages")
    shared = _Shared()
    pattern = bytes(range(256)) * (length // 256 + 1)
    with mmap.mmap(-1, length * slots) as source, mmap.mmap(-1, piece_len * pieces) as target:
        def copy():
            shared.copy(memoryview(source), memoryview(target), length, slots, piece_len)

        with _helper(cpu, copy, shared.close):
            view = memoryview(source)
            try:
                if warm_up_s:
                    shared.write(pattern[:length], view, slots, window, warm_up_s)
                return shared.write(pattern[:length], view, slots, window, seconds)
            finally:
                view.release()
