"""What workers tell the main thread: a ring of small records a worker, and one eventfd."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vswitch.fastpath.shared.ring cimport RingC
from vswitch.fastpath.shared.sizes cimport EVENT_RESERVE, EVENT_SLOTS
from vswitch.fastpath.shared.words cimport (
    EVENT_IOTLB_MISS,
    EVENT_MAC_LEARNED,
    EVENT_MAC_MOVED,
    EVENT_RING_FAULT,
    FAULT_IOTLB_MISS,
    EventC,
    EventKind,
)
from vswitch.fastpath.shared.worker cimport WorkerC
from vswitch.fastpath.sys.atomics cimport (
    vs_fence,
    vs_load32,
    vs_load_acquire32,
    vs_store32,
    vs_store_release32,
)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, uint64_t value)


cdef inline void post_event(
    WorkerC *w, EventKind kind, uint16_t port, uint16_t other, uint64_t key
) noexcept nogil:
    """Tell the main thread; when it lags behind by EVENT_SLOTS the event is lost and counted."""
    cdef uint32_t head = w.event_head, slots = EVENT_SLOTS
    cdef EventC *event
    if kind == EVENT_MAC_LEARNED or kind == EVENT_MAC_MOVED:
        slots -= EVENT_RESERVE  # guests make as many of these as they like
    # Acquire: the slot is free before it is written. Pairs with the release in Worker._check.
    if head - vs_load_acquire32(&w.event_tail) >= slots:
        w.events_lost += 1
        return
    event = &w.events[head & (EVENT_SLOTS - 1)]
    event.kind = kind
    event.port = port
    event.other = other
    event.key = key
    # Release: the event before the index. Pairs with the acquire in Worker._check.
    vs_store_release32(&w.event_head, head + 1)
    # Full fence: the event is visible before the wish is read. Pairs with the fence in
    # Engine.arm_events.
    vs_fence()
    if vs_load32(&w.event_armed):
        vs_store32(&w.event_armed, 0)
        eventfd_write(w.shared.event_fd, 1)


cdef inline void report_fault(WorkerC *w, const RingC *ring) noexcept nogil:
    """Tell the main thread that a ring is at fault, or waits for a translation."""
    post_event(
        w, EVENT_IOTLB_MISS if ring.fault == FAULT_IOTLB_MISS else EVENT_RING_FAULT,
        ring.port.id, ring.index, 0,
    )
