"""The device's side of a virtqueue, whatever its format: what is offered, giving back, notifications.

Nobody above asks a ring which format it has.
"""

from libc.stdint cimport uint16_t, uint32_t

from vswitch.fastpath.ring.packed cimport (
    flush_packed,
    next_packed,
    packed_ready,
    packed_step,
    packed_wants_call,
    prepare_packed,
    put_used_packed,
    refuse_kicks_packed,
    take_packed,
    walk_packed,
    want_kicks_packed,
)
from vswitch.fastpath.ring.split cimport (
    next_split,
    prepare_split,
    publish_split,
    put_used_split,
    refuse_kicks_split,
    split_wants_call,
    take_split,
    walk_split,
    want_kicks_split,
)
from vswitch.fastpath.shared.memory cimport Seg
from vswitch.fastpath.shared.ring cimport Cursor, RingC
from vswitch.fastpath.shared.sizes cimport USED_BATCH
from vswitch.fastpath.shared.virtio cimport VringDesc
from vswitch.fastpath.shared.words cimport Counters
from vswitch.fastpath.shared.worker cimport FrameTaker, WorkerC
from vswitch.fastpath.sys.atomics cimport vs_fence, vs_likely, vs_load16, vs_load_int
from vswitch.fastpath.sys.notify cimport vs_notify


cdef inline bint has_work(const RingC *ring) noexcept nogil:
    """Whether the driver has offered something that was not taken yet."""
    if ring.packed:
        return packed_ready(ring, ring.last_avail, ring.avail_wrap)
    return vs_load16(ring.avail + 1) != ring.last_avail


cdef inline Cursor cursor_of(const RingC *ring) noexcept nogil:
    """Where the next chain will be."""
    cdef Cursor at
    at.position = ring.last_avail
    at.wrap = ring.avail_wrap
    return at


cdef inline int next_offered(
    RingC *ring, const Cursor *at, uint16_t *head, VringDesc *first
) noexcept nogil:
    """Read the chain at `at`, which is not taken by that: its first entry and descriptor.

    1 if there is one, 0 if the driver has not offered it yet, -1 after faulting the ring.
    """
    if ring.packed:
        return next_packed(ring, at, head, first)
    return next_split(ring, at, head, first)


cdef inline void step_over(const RingC *ring, Cursor *at, uint16_t count) noexcept nogil:
    """Move on behind a chain of `count` ring entries."""
    if ring.packed:
        packed_step(ring, &at.position, &at.wrap, count)
    else:
        at.position += 1


cdef inline void take_up_to(RingC *ring, const Cursor *at) noexcept nogil:
    """Take all chains before `at`."""
    ring.last_avail = at.position
    ring.avail_wrap = at.wrap


cdef inline void take_one(RingC *ring) noexcept nogil:
    """Take a chain of one entry."""
    if ring.packed:
        packed_step(ring, &ring.last_avail, &ring.avail_wrap, 1)
    else:
        ring.last_avail += 1


cdef inline int walk_chain(
    RingC *ring, uint16_t head, const VringDesc *first, uint16_t want_write, Seg *segs, uint32_t limit
) noexcept nogil:
    """Turn the chain that starts at entry `head` into host pieces; `first` is a copy of that entry.

    Returns the number of pieces, none of them empty, or -1 after faulting the ring, or having it
    wait for its frontend to translate an address: a chain longer
    than the ring or MAX_CHAIN (2.7.5), a `next` beyond its table, a buffer outside guest memory, a
    buffer in the wrong direction (`want_write` is VRING_DESC_F_WRITE or 0), a nested, empty, odd or
    unoffered indirect table (2.7.5.3).
    """
    ring.walked = 0
    if ring.packed:
        return walk_packed(ring, head, first, want_write, segs, limit)
    ring.walk_id = head
    ring.walk_count = 1
    return walk_split(ring, head, first, want_write, segs, limit)


cdef inline uint16_t take_chains(WorkerC *w, RingC *ring, FrameTaker take) noexcept nogil:
    """Take up to `quota` chains of a transmitq and have `take` fill in `frames` from them; how many.

    `take` is a constant where this is called, and inlined.
    """
    return take_packed(w, ring, take) if ring.packed else take_split(w, ring, take)


cdef inline uint16_t prepare_buffers(WorkerC *w, RingC *ring, uint16_t n) noexcept nogil:
    """Read the next `n` receive buffers a stage ahead of the copies.

    Only plain ones (a single writable descriptor in one region) get a host pointer. Returns how
    many were read; fewer than `n` when the driver has not offered as many or the ring is at fault,
    and of a packed ring those before the first that is not plain, whose length only its end tells.
    """
    return prepare_packed(w, ring, n) if ring.packed else prepare_split(w, ring, n)


cdef inline bint used_in_place(const RingC *ring) noexcept nogil:
    """Whether giving a buffer back takes write_used_elem and nothing else before publish_used."""
    return not ring.packed and ring.dirty_log == NULL


cdef inline void put_used(
    WorkerC *w, RingC *ring, uint16_t id, uint16_t count, uint32_t length
) noexcept nogil:
    """Give a chain back: `id` is its head or buffer id, `count` its ring entries, `length` what was
    written into it. The driver need not see it before publish_used."""
    if ring.packed:
        put_used_packed(w, ring, id, count, length)
    else:
        put_used_split(ring, id, length)


cdef inline void publish_used(WorkerC *w, RingC *ring) noexcept nogil:
    """Let the driver see what was given back."""
    if ring.packed:
        flush_packed(w, ring)
    else:
        publish_split(ring)


cdef inline void keep_together(WorkerC *w, RingC *ring, uint32_t chains) noexcept nogil:
    """Make sure that the driver gets to see the next `chains` that are given back at once.

    A driver that sees the first buffer of a frame expects to find all of them.
    """
    if ring.packed and w.n_used + chains > USED_BATCH:
        flush_packed(w, ring)


cdef inline bint driver_wants_call(RingC *ring) noexcept nogil:
    """Whether what was published since the last notification calls for one."""
    return packed_wants_call(ring) if ring.packed else split_wants_call(ring)


cdef inline void notify_driver(WorkerC *w, RingC *ring, Counters *counters) noexcept nogil:
    """Signal the call eventfd if the driver wants to hear of what was just published.

    At most one system call, and none while the driver polls.
    """
    cdef int fd
    # Full fence: what is used is visible before the driver's wish is read. Pairs with the driver's
    # fence between stating its wish and looking at the used ring once more.
    vs_fence()
    if vs_likely(not driver_wants_call(ring)):
        return
    fd = vs_load_int(&ring.call_fd)
    if fd >= 0:
        vs_notify(&w.notifier, fd)
        w.burst_calls += 1
        counters.calls += 1


cdef inline void want_kicks(RingC *ring) noexcept nogil:
    """Ask the driver to kick. The caller fences and looks at the ring once more."""
    if ring.packed:
        want_kicks_packed(ring)
    else:
        want_kicks_split(ring)


cdef inline void refuse_kicks(RingC *ring) noexcept nogil:
    """Polling again."""
    if ring.packed:
        refuse_kicks_packed(ring)
    else:
        refuse_kicks_split(ring)
