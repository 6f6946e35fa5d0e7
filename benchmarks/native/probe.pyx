"""How long a cache line takes from one CPU to another and back.

Everything two CPUs do over shared memory is made of such transfers, so a benchmark of rings means
little without this number. On a virtual machine it may change from one second to the next.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free

import os
import threading


cdef extern from "barriers.h" nogil:
    int guest_load_relaxed_int(const int *p)
    void guest_store_relaxed_int(int *p, int value)
    uint64_t guest_now_ns()


cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef enum:
    # Two lines of 64 bytes: neighbours are fetched together.
    ALIGNMENT = 128
    CLOSED = -1
    CLOCK_EVERY = 1 << 16      # looks in vain between two looks at the clock
    MAX_BATCHES = 1000
    MAX_ROUNDS = 1000000


cdef class _Line:
    """One int alone in its cache line: odd says that `serve` is to answer, even that it has."""

    cdef int *turn

    def __cinit__(self):
        self.turn = <int *>aligned_alloc(ALIGNMENT, ALIGNMENT)
        if self.turn == NULL:
            raise MemoryError()
        self.turn[0] = 0

    def __dealloc__(self):
        free(self.turn)

    def close(self):
        guest_store_relaxed_int(self.turn, CLOSED)

    def serve(self, int cpu):
        """Answer from this CPU until `close`."""
        cdef int seen
        cdef uint32_t vain = 0
        os.sched_setaffinity(0, {cpu})
        with nogil:
            while True:
                # Relaxed is enough on both sides: nothing but this int is handed over.
                seen = guest_load_relaxed_int(self.turn)
                if seen == CLOSED:
                    break
                if seen & 1:
                    guest_store_relaxed_int(self.turn, seen + 1)
                    vain = 0
                    continue
                vain += 1
                if vain % CLOCK_EVERY == 0:
                    sched_yield()

    def batch(self, int rounds, uint64_t deadline):
        """Nanoseconds for `rounds` round trips; 0 if they were not done at the deadline."""
        cdef int i, turn = 0
        cdef uint32_t vain = 0
        cdef uint64_t start, end
        cdef bint late = False
        with nogil:
            start = guest_now_ns()
            for i in range(rounds):
                turn = 2 * i + 2
                guest_store_relaxed_int(self.turn, turn - 1)
                while guest_load_relaxed_int(self.turn) != turn:
                    vain += 1
                    if vain % CLOCK_EVERY == 0:
                        if guest_now_ns() >= deadline:
                            late = True
                            break
                        sched_yield()
                if late:
                    break
            end = guest_now_ns()
        return 0 if late else end - start


def round_trip_ns(
    int cpu_a, int cpu_b, *, int batches=25, int rounds=400, double timeout_s=2.0
):
    """Nanoseconds for a cache line from `cpu_a` to `cpu_b` and back, by two threads that poll it.

    The median of `batches` means over `rounds` round trips, so a thread that loses its CPU for a
    moment does no harm. The calling thread runs on `cpu_a` meanwhile. ValueError if both CPUs are
    the same or may not be used; TimeoutError if the other thread did not get its CPU in time.
    """
    allowed = os.sched_getaffinity(0)
    if cpu_a == cpu_b:
        raise ValueError(f"a round trip needs two CPUs, both are {cpu_a}")
    if not 1 <= batches <= MAX_BATCHES or not 1 <= rounds <= MAX_ROUNDS:
        raise ValueError(
            f"{batches} batches of {rounds} rounds: 1 to {MAX_BATCHES} and 1 to {MAX_ROUNDS}"
        )
    line = _Line()
    failed = []

    def serve():
        try:
            line.serve(cpu_b)
        except OSError as error:
            failed.append(error)

    other = threading.Thread(target=serve, name=f"probe on CPU {cpu_b}", daemon=True)
    try:
        os.sched_setaffinity(0, {cpu_a})
    except OSError as error:
        raise ValueError(f"CPU {cpu_a} cannot be used: {error.strerror}") from error
    try:
        deadline = guest_now_ns() + <uint64_t>(timeout_s * 1e9)
        other.start()
        try:
            spent = [line.batch(rounds, deadline) for _ in range(batches)]
        finally:
            line.close()
            other.join()
    finally:
        os.sched_setaffinity(0, allowed)
    if failed:
        raise ValueError(f"CPU {cpu_b} cannot be used: {failed[0].strerror}")
    if 0 in spent:
        raise TimeoutError(
            f"CPUs {cpu_a} and {cpu_b}: no {batches * rounds} round trips within {timeout_s:g} s"
        )
    spent.sort()
    return spent[batches // 2] / rounds
