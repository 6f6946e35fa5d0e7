"""Descriptor chains: from guest addresses to pieces of memory, for both ring formats.

VIRTIO 1.2, sections 2.7.5 (split) and 2.8.5 to 2.8.7 (packed). Ring memory belongs to the guest:
every field is read once, into a private copy, and checked there.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vswitch.fastpath.shared.memory cimport find_region, gpa_to_host
from vswitch.fastpath.shared.types cimport (
    FAULT_ADDRESS,
    FAULT_CHAIN_LEN,
    FAULT_DIRECTION,
    FAULT_INDIRECT_LEN,
    FAULT_INDIRECT_NESTED,
    FAULT_INDIRECT_UNOFFERED,
    FAULT_IOTLB_MISS,
    FAULT_NEXT,
    FAULT_NONE,
    FAULT_PERMISSION,
    MAX_CHAIN,
    MAX_RING_SIZE,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    Fault,
    MemTable,
    RingC,
    Seg,
    VringDesc,
)
from vswitch.fastpath.sys.atomics cimport (
    vs_get64,
    vs_likely,
    vs_load_acquire_ptr,
    vs_store_release32,
    vs_unlikely,
)


cdef inline void ring_fault(
    RingC *ring, Fault fault, uint64_t value, uint64_t detail
) noexcept nogil:
    """Stop a ring for good; the worker loop reports it to the main thread."""
    ring.fault_value = value
    ring.fault_detail = detail
    # Release: whoever sees the fault sees its value. Pairs with the acquire in Ring.fault.
    vs_store_release32(&ring.fault, fault)


cdef inline void bad_address(
    RingC *ring, bint reading, uint64_t at, uint64_t addr, uint64_t length
) noexcept nogil:
    """Nothing is at `at`, in the buffer that begins at `addr`.

    That is a fault, unless the frontend was not asked yet: then the ring waits for its answer.
    Where pages may be missing only what lies outside of the memory is a fault.
    `reading`: the device was going to read there, whatever it does with this ring's buffers.
    """
    # Loaded once: the main thread may put another one in its place at any time. Pairs with
    # Ring.use_memory and Ring.use_iotlb.
    cdef const MemTable *mem = <const MemTable *>vs_load_acquire_ptr(<void **>&ring.mem)
    cdef uint64_t serial = mem.serial
    cdef uint16_t hint
    if mem.known == NULL or (
        # Pairs with Ring.use_memory.
        mem.physical and find_region(
            <const MemTable *>vs_load_acquire_ptr(<void **>&ring.guest_mem), at, &hint
        ) == NULL
    ):
        ring_fault(ring, FAULT_ADDRESS, addr, length)
        return
    if find_region(mem.read if reading else mem, at, &hint) != NULL:
        serial = 0  # it has come meanwhile
    elif find_region(mem.known, at, &hint) != NULL:
        ring_fault(ring, FAULT_PERMISSION, at, 0)
        return
    ring_fault(ring, FAULT_IOTLB_MISS, at, serial << 1 | reading)


cdef inline bint miss_answered(RingC *ring) noexcept nogil:
    """Whether a ring that is not running may go on: it waited for another table, and has one."""
    cdef const MemTable *mem
    if ring.fault != FAULT_IOTLB_MISS:
        return False
    mem = <const MemTable *>vs_load_acquire_ptr(<void **>&ring.mem)
    if mem.serial == ring.fault_detail >> 1:
        return False
    ring_fault(ring, FAULT_NONE, 0, 0)
    return True


cdef inline void read_desc(VringDesc *out, const VringDesc *desc) noexcept nogil:
    """A private copy, each half read once."""
    cdef uint64_t tail
    out.addr = vs_get64(&desc.addr)
    tail = vs_get64(&desc.len)
    out.len = <uint32_t>tail
    out.flags = <uint16_t>(tail >> 32)
    out.next = <uint16_t>(tail >> 48)


cdef inline void read_packed(VringDesc *out, const VringDesc *desc) noexcept nogil:
    """The same of a packed ring's descriptor, where the buffer id comes before the flags."""
    cdef uint64_t tail
    out.addr = vs_get64(&desc.addr)
    tail = vs_get64(&desc.len)
    out.len = <uint32_t>tail
    out.next = <uint16_t>(tail >> 32)
    out.flags = <uint16_t>(tail >> 48)


cdef inline int add_segment(
    RingC *ring, const VringDesc *desc, Seg *segs, uint32_t *n_segs, uint32_t limit
) noexcept nogil:
    """Append the host pieces of one descriptor's buffer; -1 after faulting the ring."""
    cdef uint64_t gpa = desc.addr, left = desc.len, contiguous
    cdef char *host
    while left:
        host = gpa_to_host(ring.mem, gpa, left, &contiguous, &ring.region_hint)
        if vs_unlikely(host == NULL):
            bad_address(ring, False, gpa, desc.addr, desc.len)
            return -1
        if vs_unlikely(n_segs[0] >= limit):
            ring_fault(ring, FAULT_CHAIN_LEN, n_segs[0], ring.size)
            return -1
        segs[n_segs[0]].ptr = host
        segs[n_segs[0]].len = <uint32_t>contiguous
        n_segs[0] += 1
        gpa += contiguous
        left -= contiguous
    return 0


cdef inline void copy_bytes(char *to, const char *source, uint32_t length) noexcept nogil:
    """For the few bytes that lie across a border; one read a byte."""
    cdef uint32_t i
    for i in range(length):
        to[i] = source[i]


cdef inline int read_indirect(
    RingC *ring, VringDesc *desc, uint64_t table_gpa, uint32_t index
) noexcept nogil:
    """A private copy of one entry of an indirect table; -1 after faulting the ring.

    An entry may lie across the border of two regions.
    """
    cdef VringDesc raw
    cdef uint64_t gpa = table_gpa + 16 * <uint64_t>index, contiguous
    cdef uint32_t have = 0
    cdef char *host
    while have < 16:
        host = gpa_to_host(ring.mem.read, gpa + have, 16 - have, &contiguous, &ring.region_hint)
        if vs_unlikely(host == NULL):
            bad_address(ring, True, gpa + have, gpa, 16)
            return -1
        if vs_likely(contiguous == 16):
            read_desc(desc, <VringDesc *>host)
            return 0
        copy_bytes(<char *>&raw + have, host, <uint32_t>contiguous)
        have += <uint32_t>contiguous
    desc[0] = raw
    return 0


cdef inline int check_indirect(RingC *ring, const VringDesc *desc, uint32_t index) noexcept nogil:
    """Whether a descriptor may point to an indirect table of that length; -1 after faulting."""
    if desc.flags & VRING_DESC_F_NEXT:
        ring_fault(ring, FAULT_INDIRECT_NESTED, desc.flags, index)
        return -1
    if not ring.indirect:
        ring_fault(ring, FAULT_INDIRECT_UNOFFERED, desc.flags, index)
        return -1
    if desc.len == 0 or desc.len & 15 or desc.len > 16 * MAX_RING_SIZE:
        ring_fault(ring, FAULT_INDIRECT_LEN, desc.len, index)
        return -1
    return 0


cdef inline int walk_split(
    RingC *ring, uint32_t index, const VringDesc *first, uint16_t want_write, Seg *segs, uint32_t limit
) noexcept nogil:
    cdef VringDesc desc = first[0]
    cdef uint32_t n_segs = 0, table_size = ring.size, walked = 0
    cdef uint64_t table_gpa = 0
    cdef bint indirect = False
    while True:
        walked += 1
        ring.walked += 1
        if vs_unlikely(walked > table_size or walked > MAX_CHAIN):
            ring_fault(ring, FAULT_CHAIN_LEN, walked, table_size)
            return -1
        if desc.flags & VRING_DESC_F_INDIRECT:
            if indirect:
                ring_fault(ring, FAULT_INDIRECT_NESTED, desc.flags, index)
                return -1
            if check_indirect(ring, &desc, index) < 0:
                return -1
            indirect = True
            table_gpa = desc.addr
            table_size = desc.len >> 4
            walked = 0
            index = 0
        else:
            if vs_unlikely((desc.flags & VRING_DESC_F_WRITE) != want_write):
                ring_fault(ring, FAULT_DIRECTION, desc.flags, index)
                return -1
            if add_segment(ring, &desc, segs, &n_segs, limit) < 0:
                return -1
            if not desc.flags & VRING_DESC_F_NEXT:
                return n_segs
            index = desc.next
            if vs_unlikely(index >= table_size):
                ring_fault(ring, FAULT_NEXT, index, table_size)
                return -1
        if not indirect:
            read_desc(&desc, &ring.desc[index])
        elif read_indirect(ring, &desc, table_gpa, index) < 0:
            return -1


cdef inline int walk_packed(
    RingC *ring, uint32_t index, const VringDesc *first, uint16_t want_write, Seg *segs, uint32_t limit
) noexcept nogil:
    """Leaves the buffer id and the number of ring entries in `walk_id` and `walk_count`."""
    cdef VringDesc desc = first[0]
    cdef uint32_t n_segs = 0, count = 1, i, entries
    cdef uint64_t table_gpa
    while not desc.flags & VRING_DESC_F_INDIRECT:
        if vs_unlikely((desc.flags & VRING_DESC_F_WRITE) != want_write):
            ring_fault(ring, FAULT_DIRECTION, desc.flags, index)
            return -1
        ring.walked += 1
        if add_segment(ring, &desc, segs, &n_segs, limit) < 0:
            return -1
        if not desc.flags & VRING_DESC_F_NEXT:
            break
        count += 1
        if vs_unlikely(count > ring.size or count > MAX_CHAIN):
            ring_fault(ring, FAULT_CHAIN_LEN, count, ring.size)
            return -1
        index += 1
        if index == ring.size:
            index = 0
        # The driver wrote these before it made the first one available (2.8.6).
        read_packed(&desc, &ring.desc[index])
    else:
        if check_indirect(ring, &desc, index) < 0:
            return -1
        # The id is that of the ring's own descriptor; in the table only address, length and WRITE
        # count, and one entry follows the other (2.8.7).
        table_gpa = desc.addr
        entries = desc.len >> 4
        ring.walk_id = desc.next
        ring.walk_count = <uint16_t>count
        if vs_unlikely(entries > MAX_CHAIN):
            ring_fault(ring, FAULT_CHAIN_LEN, entries, MAX_CHAIN)
            return -1
        ring.walked = <uint16_t>(count + entries)
        for i in range(entries):
            if read_indirect(ring, &desc, table_gpa, i) < 0:
                return -1
            # read_desc() took it for a split ring's: flags and id are the other way round.
            if vs_unlikely((desc.next & VRING_DESC_F_WRITE) != want_write):
                ring_fault(ring, FAULT_DIRECTION, desc.next, i)
                return -1
            if add_segment(ring, &desc, segs, &n_segs, limit) < 0:
                return -1
        return n_segs
    ring.walk_id = desc.next
    ring.walk_count = <uint16_t>count
    return n_segs


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
