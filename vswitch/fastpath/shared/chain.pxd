"""Descriptors: from guest addresses to pieces of memory, for both ring formats.

Ring memory belongs to the guest: every field is read once, into a private copy, and checked there.
Chains of them are in ring/split.pxd and ring/packed.pxd.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vswitch.fastpath.shared.memory cimport MemTable, Seg, find_region, gpa_to_host
from vswitch.fastpath.shared.ring cimport RingC
from vswitch.fastpath.shared.sizes cimport MAX_RING_SIZE
from vswitch.fastpath.shared.virtio cimport (
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VringDesc,
)
from vswitch.fastpath.shared.words cimport (
    FAULT_ADDRESS,
    FAULT_CHAIN_LEN,
    FAULT_INDIRECT_LEN,
    FAULT_INDIRECT_NESTED,
    FAULT_INDIRECT_UNOFFERED,
    FAULT_IOTLB_MISS,
    FAULT_NONE,
    FAULT_PERMISSION,
    Fault,
)
from vswitch.fastpath.shared.worker cimport WorkerC
from vswitch.fastpath.sys.atomics cimport (
    vs_get64,
    vs_likely,
    vs_load_acquire_ptr,
    vs_prefetch_write,
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


cdef inline void copy_desc(VringDesc *to, const VringDesc *desc) noexcept nogil:
    """Field by field, as it was written a moment ago: a load of it all would wait for those stores."""
    to.addr = desc.addr
    to.len = desc.len
    to.flags = desc.flags
    to.next = desc.next


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


cdef inline void locate_buffer(WorkerC *w, RingC *ring, uint16_t i) noexcept nogil:
    """Where the receive buffer of `rx_desc[i]` lies, if it is a plain one: one piece in one region."""
    cdef VringDesc *desc = &w.rx_desc[i]
    cdef uint64_t contiguous
    w.rx_host[i] = NULL
    if vs_likely(
        desc.flags & (VRING_DESC_F_WRITE | VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT)
        == VRING_DESC_F_WRITE
    ):
        w.rx_host[i] = gpa_to_host(ring.mem, desc.addr, desc.len, &contiguous, &ring.region_hint)
        if vs_likely(w.rx_host[i] != NULL):
            desc.len = <uint32_t>contiguous
            vs_prefetch_write(w.rx_host[i])
            vs_prefetch_write(w.rx_host[i] + 64)
