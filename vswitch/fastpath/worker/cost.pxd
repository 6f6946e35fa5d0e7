"""What a turn has cost, and who pays for it: in copies of short frames.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vswitch.fastpath.shared.ring cimport RingC
from vswitch.fastpath.shared.sizes cimport BURST
from vswitch.fastpath.shared.worker cimport WorkerC
from vswitch.fastpath.sys.atomics cimport vs_likely, vs_unlikely

cdef enum:
    CALL_COPIES = 16       # what a notification costs; it is a system call
    LONGEST_TURN = 4       # times what an ordinary turn costs


cdef inline void begin_turn(WorkerC *w) noexcept nogil:
    w.n_segs = w.work = w.burst_calls = 0
    w.copied = 0


cdef inline uint32_t extra_work(const WorkerC *w, uint32_t copies) noexcept nogil:
    """What a burst has cost besides its `copies`, in copies of short frames; 0 for an ordinary one.

    Eight descriptors or pieces make a copy, and 2 KiB do. Ordinary are up to 16 descriptors and pieces
    a copy, a descriptor being one and what is copied from or to it another, and 64 frames of 2 KiB.
    """
    cdef uint64_t pieces = w.work >> 3, lines = w.copied >> 11
    if vs_likely(pieces <= 2 * BURST or pieces <= 2 * copies):
        pieces = 0
    if vs_likely(lines <= BURST):
        return <uint32_t>pieces
    return <uint32_t>(pieces + lines)


cdef inline uint32_t turn_cost(const WorkerC *w, uint32_t copies, uint32_t extra) noexcept nogil:
    """What a turn has cost, in copies of short frames; a notification is CALL_COPIES."""
    if vs_unlikely(w.burst_calls * CALL_COPIES > BURST and w.burst_calls * CALL_COPIES > copies):
        copies = w.burst_calls * CALL_COPIES
    return copies + extra


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
