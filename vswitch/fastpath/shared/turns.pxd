"""How long a thread that serves many takes for one turn of its loop: the longest ones, noted.

A turn is the time between two waits for events, or for a worker that does not sleep between two
passes of the top of its loop. Each thread notes its own; the main thread reads them at any time.

Of a long turn it is noted how much of it the thread was runnable and no CPU ran it, which is the
machine's doing: the kernel counts that in /proc/thread-self/schedstat. It is read when a turn of DELAY_NS
or more is noted, and every LOOK_NS between, so that what is told belongs to that turn or to the
LOOK_NS before it.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from vswitch.fastpath.sys.atomics cimport (
    vs_load32,
    vs_load64,
    vs_now_ns,
    vs_store32,
    vs_store64,
    vs_store_release32,
    vs_unlikely,
)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buf, size_t count, long offset)

cdef extern from "<stdlib.h>" nogil:
    unsigned long long strtoull(const char *text, char **end, int base)

cdef enum:
    TURN_SLOTS = 64        # of a second each; more than a minute
    DELAY_NS = 1000000     # turns below are noted without asking the kernel
    LOOK_NS = 10000000
    SECOND_NS = 1000000000

cdef struct Longest:       # atomic, each of them
    uint64_t turn          # microseconds of the longest turn << 32 | of these runnable and not run
    uint32_t own           # microseconds of the longest one without that time

cdef struct TurnSlot:
    uint32_t second        # atomic; of CLOCK_MONOTONIC
    Longest longest

cdef struct Turns:         # written by one thread
    uint64_t mark          # atomic; when the present turn began, in ticks
    uint64_t limit         # what is longer is noted at its end, ticks
    uint64_t look          # when to look at clock and schedstat again, ticks
    uint64_t ticks         # the counter and ...
    uint64_t first_ns      # ... the clock at the first look
    uint64_t seen_ns       # clock at the last one
    uint64_t scale         # atomic; nanoseconds of 2^20 ticks
    uint64_t delay_ns      # atomic; schedstat's second number at the last look
    int schedstat          # main; -1: the kernel has none
    Longest since_start
    TurnSlot slots[TURN_SLOTS]


cdef inline uint64_t run_delay_ns(const Turns *t) noexcept nogil:
    """How long the thread of `schedstat` has been runnable without running, since its start."""
    cdef char text[96]
    cdef char *rest
    cdef ssize_t n
    if t.schedstat < 0:
        return 0
    n = pread(t.schedstat, text, sizeof(text) - 1, 0)
    if n <= 0:
        return 0
    text[n] = 0
    strtoull(text, &rest, 10)
    return strtoull(rest, NULL, 10)


cdef inline uint32_t to_us(uint64_t ns) noexcept nogil:
    ns //= 1000
    return <uint32_t>ns if ns <= <uint32_t>-1 else <uint32_t>-1


cdef inline void keep_longest(Longest *longest, uint32_t turn, uint32_t delay) noexcept nogil:
    if turn >= vs_load64(&longest.turn) >> 32:
        vs_store64(&longest.turn, <uint64_t>turn << 32 | delay)
    if turn - delay >= vs_load32(&longest.own):
        vs_store32(&longest.own, turn - delay)


cdef inline void note_turn(
    Turns *t, uint64_t turn_ns, uint64_t now_ns, bint look
) noexcept nogil:
    """Note a turn that ends now; `look`: read schedstat, for this one or for the next."""
    cdef uint32_t second = <uint32_t>(now_ns // SECOND_NS)
    cdef TurnSlot *slot = &t.slots[second % TURN_SLOTS]
    cdef uint64_t before = t.delay_ns, delay = 0
    cdef uint32_t turn = to_us(turn_ns)
    if look or turn_ns >= DELAY_NS:
        vs_store64(&t.delay_ns, run_delay_ns(t))
        t.seen_ns = now_ns
        if turn_ns >= DELAY_NS and t.delay_ns > before:
            delay = t.delay_ns - before
    if delay > turn_ns:
        delay = turn_ns  # it had been waiting before this turn began
    if slot.second != second:
        vs_store64(&slot.longest.turn, 0)
        vs_store32(&slot.longest.own, 0)
        # Release: emptied before it counts for another second. Pairs with the acquire in
        # describe_turns.
        vs_store_release32(&slot.second, second)
    keep_longest(&slot.longest, turn, to_us(delay))
    keep_longest(&t.since_start, turn, to_us(delay))


cdef inline uint64_t ticks_to_ns(const Turns *t, uint64_t ticks) noexcept nogil:
    # In floating point: products have more than 64 bits after some hours.
    return <uint64_t>(<double>ticks * <double>vs_load64(&t.scale) / (1 << 20))


cdef inline uint64_t ns_to_ticks(const Turns *t, uint64_t ns) noexcept nogil:
    return <uint64_t>(<double>ns * (1 << 20) / <double>t.scale) if t.scale else 0


cdef inline void look_at_turn(Turns *t, uint64_t now) noexcept nogil:
    """The part of `end_turn` that is seldom needed."""
    cdef uint64_t now_ns = vs_now_ns(), turn_ns, most
    if t.first_ns == 0:
        t.first_ns = t.seen_ns = now_ns
        t.ticks = t.mark = now
    elif now > t.ticks and now_ns > t.first_ns:
        vs_store64(
            &t.scale, <uint64_t>(<double>(now_ns - t.first_ns) / <double>(now - t.ticks) * (1 << 20))
        )
    turn_ns = ticks_to_ns(t, now - t.mark) if <int64_t>(now - t.mark) > 0 else 0
    # A counter that jumps is nobody's turn: none is longer than the time since the last look.
    most = now_ns - t.seen_ns
    note_turn(t, turn_ns if turn_ns < most else most, now_ns, now >= t.look)
    t.limit = ns_to_ticks(
        t, (t.slots[<uint32_t>(now_ns // SECOND_NS) % TURN_SLOTS].longest.own + 1) * <uint64_t>1000
    )
    t.look = now + ns_to_ticks(t, LOOK_NS)


cdef inline void end_turn(Turns *t, uint64_t now) noexcept nogil:
    """A turn ends at `now`, in ticks (vs_ticks), and the next one begins."""
    if vs_unlikely(now - t.mark > t.limit or now >= t.look):
        look_at_turn(t, now)
    vs_store64(&t.mark, now)


cdef dict describe_turns(const Turns *t, uint64_t now_ns, uint64_t unfinished_ns)
