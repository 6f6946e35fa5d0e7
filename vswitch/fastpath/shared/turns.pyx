"""The longest turns of a thread's loop, for people; and the turns of the main thread's event loop."""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

import os

from cpython.pycapsule cimport PyCapsule_GetPointer

from vswitch.fastpath.sys.atomics cimport vs_cycles, vs_load32, vs_load64, vs_load_acquire32, vs_now_ns

cdef extern from "<dlfcn.h>" nogil:
    void *dlopen(const char *path, int flags)
    void *dlsym(void *handle, const char *symbol)
    int dlclose(void *handle)
    int RTLD_LAZY, RTLD_NOLOAD

WINDOWS = (("last_10_s", 10), ("last_minute", 60), ("since_start", None))


cdef dict describe_turns(const Turns *t, uint64_t now_ns, uint64_t unfinished_ns):
    """The longest turns by window, as api.TurnsInfo has them.

    `unfinished_ns` is how long the present one lasts, 0 if it is not to count.
    """
    cdef uint32_t now = <uint32_t>(now_ns // SECOND_NS), second
    cdef Longest longest
    cdef uint64_t delay = 0
    cdef int i
    if unfinished_ns >= DELAY_NS:
        delay = run_delay_ns(t)
        delay = min(unfinished_ns, delay - min(delay, vs_load64(&t.delay_ns)))
    found = {}
    for name, seconds in WINDOWS:
        longest.turn = longest.own = 0
        keep_longest(&longest, to_us(unfinished_ns), to_us(delay))
        if seconds is None:
            keep_both(&longest, &t.since_start)
        else:
            for i in range(TURN_SLOTS):
                # Acquire: pairs with the release in note_turn.
                second = vs_load_acquire32(&t.slots[i].second)
                if second and now - second < <uint32_t>seconds:
                    keep_both(&longest, &t.slots[i].longest)
        found[name] = {
            "longest_ns": 1000 * (longest.turn >> 32),
            "run_delay_ns": None if t.schedstat < 0 else 1000 * (longest.turn & 0xFFFFFFFF),
            "own_ns": 1000 * <uint64_t>longest.own,
        }
    return found


cdef void keep_both(Longest *longest, const Longest *other) noexcept:
    cdef uint64_t turn = vs_load64(&other.turn)
    cdef uint32_t own = vs_load32(&other.own)
    if turn >> 32 >= longest.turn >> 32:
        longest.turn = turn
    if own > longest.own:
        longest.own = own


def cycles():
    """The machine's time-stamp counter, and nanoseconds of CLOCK_MONOTONIC at the same moment.

    The counter is 0 where there is none that a program can read.
    """
    return vs_cycles(), vs_now_ns()


def open_schedstat():
    """A descriptor of the calling thread's schedstat, -1 where the kernel keeps none."""
    try:
        return os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


cdef class Record:
    """Turns that are told and not measured, at times that are told: for tests."""

    cdef Turns turns

    def __cinit__(self):
        self.turns.schedstat = -1

    def note(self, uint64_t turn_ns, uint64_t now_ns):
        """A turn ended at a time of CLOCK_MONOTONIC."""
        note_turn(&self.turns, turn_ns, now_ns, False)

    def info(self, uint64_t now_ns):
        """The longest ones by window, as LoopTurns has them."""
        return describe_turns(&self.turns, now_ns, 0)


# What of libuv is used. uvloop brings its own, whose functions it exports; nothing of the layout of
# their structures is taken for granted.
ctypedef int (*uv_prepare_init_t)(void *loop, void *handle) noexcept nogil
ctypedef int (*uv_prepare_start_t)(void *handle, void (*callback)(void *) noexcept nogil) noexcept nogil
ctypedef void (*uv_close_t)(void *handle, void (*callback)(void *) noexcept nogil) noexcept nogil
ctypedef void (*uv_unref_t)(void *handle) noexcept nogil
ctypedef int (*uv_loop_configure_t)(void *loop, int option, ...) noexcept nogil
ctypedef uint64_t (*uv_metrics_idle_time_t)(void *loop) noexcept nogil

cdef enum:
    UV_METRICS_IDLE_TIME = 1
    HANDLE_LEN = 1024  # of a uv_prepare_t, which has some 120 bytes

cdef struct Watch:
    char handle[HANDLE_LEN]  # uv_prepare_t; first, so that its address is the structure's
    void *loop
    uv_metrics_idle_time_t idle_time
    uint64_t begun_ns      # when the turn before ended ...
    uint64_t idle_ns       # ... and how long the loop had waited for events until then
    Turns turns


cdef void _end_of_turn(void *handle) noexcept nogil:
    """Called by libuv right before it waits for events."""
    cdef Watch *watch = <Watch *>handle
    cdef Turns *t = &watch.turns
    cdef uint64_t now_ns = vs_now_ns(), idle_ns = watch.idle_time(watch.loop)
    cdef uint64_t turn_ns = (now_ns - watch.begun_ns) - (idle_ns - watch.idle_ns)
    if watch.begun_ns:
        # A look at the end of a turn is one before the next. Between two that are close together
        # no turn can have been delayed for long.
        note_turn(t, turn_ns, now_ns, now_ns - t.seen_ns >= DELAY_NS)
    else:
        t.seen_ns = now_ns
        t.delay_ns = run_delay_ns(t)
    watch.begun_ns = now_ns
    watch.idle_ns = idle_ns


cdef void _closed(void *handle) noexcept nogil:
    free(handle)


cdef class LoopTurns:
    """Measures the turns of a running uvloop, from when it is made to `close`.

    What counts is the time in which the loop does not wait for events: callbacks, waits for the GIL, and
    whatever sleeps in the kernel. libuv says when it begins to wait and how long it has waited, so
    nothing wakes up a loop that has nothing to do. To be made and closed on the loop's thread, while
    it runs. Raises TypeError for another kind of loop, OSError where uvloop does not show its libuv.
    """

    cdef Watch *watch
    cdef void *library
    cdef bint measuring

    def __cinit__(self, loop):
        import uvloop.loop as module

        cdef uv_prepare_init_t prepare_init
        cdef uv_prepare_start_t prepare_start
        cdef uv_unref_t unref
        cdef uv_loop_configure_t configure
        if not isinstance(loop, module.Loop):
            raise TypeError(f"{type(loop).__name__} is no uvloop")  # which itself does not look
        self.library = dlopen(os.fsencode(module.__file__), RTLD_LAZY | RTLD_NOLOAD)
        if self.library == NULL:
            raise OSError("uvloop is not loaded")
        prepare_init = <uv_prepare_init_t>self._find(b"uv_prepare_init")
        prepare_start = <uv_prepare_start_t>self._find(b"uv_prepare_start")
        unref = <uv_unref_t>self._find(b"uv_unref")
        configure = <uv_loop_configure_t>self._find(b"uv_loop_configure")
        self._find(b"uv_close")
        self.watch = <Watch *>calloc(1, sizeof(Watch))
        if self.watch == NULL:
            raise MemoryError
        self.watch.turns.schedstat = -1
        self.watch.idle_time = <uv_metrics_idle_time_t>self._find(b"uv_metrics_idle_time")
        self.watch.loop = PyCapsule_GetPointer(module.libuv_get_loop_t_ptr(loop), NULL)
        if configure(self.watch.loop, UV_METRICS_IDLE_TIME) < 0:
            raise OSError("libuv does not tell how long it waits")
        self.watch.turns.schedstat = open_schedstat()
        prepare_init(self.watch.loop, self.watch.handle)
        prepare_start(self.watch.handle, _end_of_turn)
        # The loop may end whether this goes on or not.
        unref(self.watch.handle)
        self.measuring = True

    cdef void *_find(self, bytes name) except NULL:
        cdef void *found = dlsym(self.library, name)
        if found == NULL:
            raise OSError(f"uvloop does not export {name.decode()}")
        return found

    def close(self):
        """Measure no more. The loop gives the rest free, when it has its next turn."""
        cdef uv_close_t close_handle
        if self.measuring:
            self.measuring = False
            if self.watch.turns.schedstat >= 0:
                os.close(self.watch.turns.schedstat)
            close_handle = <uv_close_t>self._find(b"uv_close")
            close_handle(self.watch.handle, _closed)
            self.watch = NULL

    def __dealloc__(self):
        if self.watch != NULL and not self.measuring:
            if self.watch.turns.schedstat >= 0:
                os.close(self.watch.turns.schedstat)
            free(self.watch)
        if self.library != NULL:
            dlclose(self.library)

    def info(self):
        """The longest turns by window; None after `close`."""
        return describe_turns(&self.watch.turns, vs_now_ns(), 0) if self.measuring else None
