"""What a ring's driver has offered, looked through before a worker comes to it."""

from libc.stdint cimport uint16_t, uint32_t

from vswitch.fastpath.ring.dispatch cimport (
    cursor_of,
    has_work,
    next_offered,
    step_over,
    take_up_to,
    walk_chain,
    want_kicks,
)
from vswitch.fastpath.ring.packed cimport read_packed
from vswitch.fastpath.shared.memory cimport MemTable, Seg
from vswitch.fastpath.shared.ring cimport Cursor, RingC
from vswitch.fastpath.shared.sizes cimport MAX_CHAIN
from vswitch.fastpath.shared.virtio cimport VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VringDesc
from vswitch.fastpath.shared.words cimport FAULT_IOTLB_MISS, FAULT_NONE
from vswitch.fastpath.sys.atomics cimport vs_fence, vs_load_acquire16


cdef uint16_t chain_entries(const RingC *ring, uint32_t index, const VringDesc *first) noexcept:
    """How many entries of a packed ring a chain takes that was not walked to its end; else 1."""
    cdef VringDesc desc = first[0]
    cdef uint16_t count = 1
    while ring.packed and desc.flags & VRING_DESC_F_NEXT and count < ring.size:
        index = index + 1 if index + 1 < ring.size else 0
        read_packed(&desc, &ring.desc[index])
        count += 1
    return count


cdef list untranslated(const RingC *ring, MemTable *table, int most, int ahead):
    """The I/O virtual addresses among the offered buffers that `table` lacks, at most `most`.

    As Ring.untranslated has them.
    """
    cdef RingC probe = ring[0]
    cdef Seg segs[MAX_CHAIN]
    cdef VringDesc desc
    cdef Cursor place
    cdef bint transmits = ring.index & 1
    cdef uint16_t want = 0 if transmits else VRING_DESC_F_WRITE
    cdef uint16_t head, count
    cdef int got, looked = 0, entries = 0
    cdef int rounds = 2
    found = []
    probe.dirty_log = NULL
    # Acquire: as a worker that goes on from there would. Nothing before this is offered any more.
    probe.last_avail = vs_load_acquire16(&ring.last_avail)
    probe.cached_avail = probe.last_avail
    probe.mem = table
    probe.fault = FAULT_NONE
    while looked < ahead and entries < <int>probe.size and len(found) < most:
        place = cursor_of(&probe)
        if next_offered(&probe, &place, &head, &desc) <= 0:
            if transmits or rounds == 0:
                break
            rounds -= 1
            probe.dirty_log = ring.dirty_log
            want_kicks(&probe)
            probe.dirty_log = NULL
            # Full fence: our wish for kicks before another look. Pairs with the driver's fence
            # between offering buffers and reading what we wish (2.7.10.3).
            vs_fence()
            if not has_work(&probe):
                break
            continue
        got = walk_chain(&probe, head, &desc, want, segs, MAX_CHAIN)
        if got >= 0:
            count = probe.walk_count
        elif probe.fault == FAULT_IOTLB_MISS:
            found.append((probe.fault_value, bool(want) and not probe.fault_detail & 1))
            probe.fault = FAULT_NONE
            count = chain_entries(&probe, head, &desc)
        else:
            break
        step_over(&probe, &place, count)
        take_up_to(&probe, &place)
        looked += max(got, <int>count)
        entries += count
    return found
