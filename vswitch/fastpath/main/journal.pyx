"""Journals: memory of a port's rings that outlives the switch.

A split ring says itself how far it was used. Two things it does not say: whether frames that were
taken and not given back were delivered already, and, for a packed ring, where anything is. Workers
note both, and who starts the ring again with the same memory reads it:

- chains of a transmitq that were taken are given back without forwarding them. A frame that was in
  the switch when it was killed may be lost, as on a wire; none is delivered twice.
- buffers of a receiveq that were not given back are filled again. In a packed ring, those whose giving
  back had begun hold their frames already, and it is brought to its end.

While there is no switch, QEMU empties transmitqs itself and throws the frames away. In a packed ring it
begins where it was told last that the ring is, and that was when the guest booted: what it has used lies
anywhere in the ring. So the base that a frontend told is noted, too, and what it tells next shows what it has
used.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t

import os

from vswitch.fastpath.ring.notes cimport note_batch
from vswitch.fastpath.ring.packed cimport packed_ready, packed_step, write_used, write_used_entry
from vswitch.fastpath.shared.ring cimport LAST_NONE, JournalBatch, JournalC, RingC, UsedChain
from vswitch.fastpath.shared.sizes cimport BURST, USED_BATCH
from vswitch.fastpath.shared.virtio cimport (
    VRING_DESC_F_NEXT,
    VRING_PACKED_DESC_F_AVAIL,
    VRING_PACKED_DESC_F_USED,
)
from vswitch.fastpath.sys.atomics cimport (
    vs_compiler_barrier,
    vs_load16,
    vs_load_acquire16,
    vs_store_release16,
)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_ANONYMOUS, MAP_PRIVATE, MAP_FIXED, MAP_NORESERVE
    void *MAP_FAILED

cdef enum:
    C_SLOT_LEN = 20480

SLOT_LEN = C_SLOT_LEN
"""Bytes a ring takes in a journal."""


cdef class Journal:
    """Notes of `size` rings, in a file or, with `fd` -1, in memory that dies with the process.

    The file must have `size` * SLOT_LEN bytes; the descriptor stays the caller's and may be closed.
    Raises OSError.
    """

    def __cinit__(self, int size, int fd=-1, long offset=0):
        self.size = size
        assert sizeof(JournalC) <= C_SLOT_LEN
        self.length = <size_t>size * C_SLOT_LEN
        self.base = mmap(
            NULL, self.length, PROT_READ | PROT_WRITE,
            MAP_SHARED if fd >= 0 else MAP_PRIVATE | MAP_ANONYMOUS, fd, offset,
        )
        if self.base == MAP_FAILED:
            self.base = NULL
            raise OSError(errno, f"journal: mmap of {self.length} bytes: {os.strerror(errno)}")

    def release(self):
        """Let go of the file now, whoever still has this object: rings, in cycles of references.

        No worker may make notes here any more. What is noted by others goes to empty memory that
        dies with the object.
        """
        mmap(
            self.base, self.length, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0,
        )

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.length)

    cdef JournalC *slot(self, int index) noexcept:
        return <JournalC *>(<char *>self.base + <size_t>C_SLOT_LEN * index)


cdef bint was_used(RingC *ring, uint16_t index, uint8_t wrap) noexcept:
    """Whether an entry was used in the round of that wrap counter, the last or the present one.

    USED alone says it: it stays what it was when the driver makes the entry available for the next
    round, as drivers do with receive buffers at once (2.8.1).
    """
    return vs_load_acquire16(<uint16_t *>&ring.desc[index] + 7) >> 15 == wrap


cdef bint is_fresh(RingC *ring) noexcept:
    """Whether no device has used an entry since the driver zeroed the ring.

    The driver's first round sets AVAIL and not USED. What was used has USED, or neither bit where
    the wrap counter was 0, and then the address of its buffer still.
    """
    cdef uint32_t i
    cdef uint16_t flags
    for i in range(ring.size):
        flags = vs_load16(<uint16_t *>&ring.desc[i] + 7)
        if flags & VRING_PACKED_DESC_F_USED:
            return False
        if not flags & VRING_PACKED_DESC_F_AVAIL and ring.desc[i].addr:
            return False
    return True


cdef bint may_look_fresh(RingC *ring, const JournalBatch *journal, bint finished) noexcept:
    """Whether a ring that was used can look fresh where the notes say it is.

    It does at the beginning of every second round when the driver has filled it; also when the last
    chain of a round reaches into that one. If a batch was on its way, its chains must be there: they
    would be forwarded once more.
    """
    cdef uint16_t at = journal.position, before = journal.last, end, i
    cdef uint8_t wrap = journal.wrap & 1, end_wrap
    for i in range(journal.n):
        end = at
        end_wrap = wrap
        packed_step(ring, &end, &end_wrap, journal.chains[i].count - 1)
        # The id comes where a split ring's descriptor has its flags.
        if not finished and vs_load16(&ring.desc[end].flags) != journal.chains[i].id:
            return False
        if finished:
            before = at
        packed_step(ring, &at, &wrap, journal.chains[i].count)
    if not finished:
        at = journal.position
        wrap = journal.wrap & 1
    return wrap == 1 and (at == 0 or before != LAST_NONE and before >= at)


cdef inline uint32_t place(const RingC *ring, uint16_t index, uint8_t wrap) noexcept:
    """A position, counted over two rounds."""
    return index + (0 if wrap else ring.size)


cdef uint32_t distance(
    const RingC *ring, uint16_t index, uint8_t wrap, uint16_t told
) noexcept:
    """Entries from the place that a frontend told on to a position."""
    cdef uint32_t start = place(ring, told & 0x7FFF, told >> 15)
    return (place(ring, index, wrap) + 2 * <uint32_t>ring.size - start) % (2 * <uint32_t>ring.size)


cdef bint recover_packed(RingC *ring, uint16_t base) noexcept:
    """Set the ring's positions from its journal; False, and nothing changed, if that is not possible.

    `base` is what the frontend tells now: a position, and its wrap counter in bit 15. The journal may
    come from a frontend: what it says is checked like a message.
    """
    cdef JournalBatch journal = ring.journal.batches[ring.journal.current & 1]  # read once ...
    cdef uint16_t n = journal.n, last = journal.last, position = journal.position, i
    cdef uint8_t wrap = journal.wrap & 1, last_wrap = journal.last_wrap & 1
    cdef uint16_t told = ring.journal.told
    cdef uint32_t entries = 0, dropped = 0
    cdef bint finished, interrupted
    vs_compiler_barrier()  # ... and not again: a frontend may be rewriting it
    if n > USED_BATCH or position >= ring.size or (last >= ring.size and last != LAST_NONE):
        return False
    for i in range(n):
        if not 1 <= journal.chains[i].count <= ring.size - entries:
            return False
        entries += journal.chains[i].count
    if ring.index & 1 and told & 0x7FFF < ring.size and was_used(ring, told & 0x7FFF, told >> 15):
        dropped = distance(ring, base & 0x7FFF, base >> 15, told)
        if dropped > ring.size:
            dropped = 0
    # The first is written last (flush_packed). The frontend may have written it before us, or used it
    # once more in the next round.
    interrupted = distance(ring, position, wrap, told) < dropped
    finished = (
        n == 0
        or was_used(ring, position, wrap) and not interrupted
        or distance(ring, position, wrap ^ 1, told) < dropped
    )
    if is_fresh(ring) and not may_look_fresh(ring, &journal, finished):
        return False
    if (
        last != LAST_NONE
        and not was_used(ring, last, last_wrap)
        and distance(ring, last, last_wrap ^ 1, told) >= dropped
    ):
        # Unless the batch goes all around to it, and has used it once more.
        if <uint32_t>(last - position if last >= position else last + ring.size - position) >= entries:
            return False
    if not finished and not interrupted:
        write_used(ring, position, wrap, journal.chains, n)
    for i in range(n):
        if not finished and interrupted and packed_ready(ring, position, wrap):
            write_used_entry(ring, position, wrap, &journal.chains[i])
        last = position
        last_wrap = wrap
        packed_step(ring, &position, &wrap, journal.chains[i].count)
    ring.last_used_at = last
    ring.last_wrap = last_wrap
    ring.last_avail = ring.last_used = position
    ring.avail_wrap = ring.used_wrap = wrap
    if dropped:
        skip_dropped(ring, told, base, dropped)
    return True


cdef uint32_t next_chain(
    RingC *ring, uint16_t at, uint8_t wrap, uint32_t limit, UsedChain *chain
) noexcept:
    """The chain that the driver made available at a position; returns its entries, 0 if there is none.

    It has at most `limit` entries. What goes on after that lost its flags to somebody who took the rest for
    a chain; the buffer id is there all the same.
    """
    cdef uint32_t count = 0
    cdef uint16_t flags
    if not packed_ready(ring, at, wrap):
        return 0
    while True:
        # The id comes where a split ring's descriptor has its flags.
        chain.id = vs_load16(&ring.desc[at].flags)
        if count == limit:
            break
        flags = vs_load16(<uint16_t *>&ring.desc[at] + 7)
        count += 1
        if not flags & VRING_DESC_F_NEXT:
            break
        packed_step(ring, &at, &wrap, 1)
    chain.count = <uint16_t>count
    chain.len = 0
    return count


cdef bint give_back(RingC *ring, uint32_t entries) noexcept:
    """Use so many entries of a packed transmitq without forwarding them; False if they are not there.

    As flush_packed does it, so that this process may be killed here as well.
    """
    cdef UsedChain chains[USED_BATCH]
    cdef uint32_t left = entries, n, count, i
    cdef uint16_t at = ring.last_used
    cdef uint8_t wrap = ring.used_wrap
    while left:
        count = next_chain(ring, at, wrap, left, &chains[0])
        if count == 0:
            return False
        packed_step(ring, &at, &wrap, <uint16_t>count)
        left -= count
    left = entries
    while left:
        n = 0
        at = ring.last_used
        wrap = ring.used_wrap
        while left and n < USED_BATCH:
            count = next_chain(ring, at, wrap, left, &chains[n])
            if count == 0:
                return False
            packed_step(ring, &at, &wrap, <uint16_t>count)
            left -= count
            n += 1
        note_batch(ring, ring.last_used, ring.used_wrap, chains, n)
        write_used(ring, ring.last_used, ring.used_wrap, chains, n)
        for i in range(n):
            ring.last_used_at = ring.last_used
            ring.last_wrap = ring.used_wrap
            packed_step(ring, &ring.last_used, &ring.used_wrap, chains[i].count)
        ring.last_avail = ring.last_used
        ring.avail_wrap = ring.used_wrap
    return True


cdef void skip_dropped(RingC *ring, uint16_t told, uint16_t base, uint32_t dropped) noexcept:
    """Step over `dropped` entries that the frontend has used between the bases that it told.

    What lies between here and there is given back: the driver gets to the frontend's only after that.
    """
    cdef uint32_t beyond = distance(ring, ring.last_used, ring.used_wrap, told)
    cdef uint32_t missing = 0 if beyond <= dropped else 2 * <uint32_t>ring.size - beyond
    if missing > ring.size or not give_back(ring, missing):
        return
    ring.last_used_at = told & 0x7FFF
    ring.last_wrap = told >> 15
    ring.last_avail = ring.last_used = base & 0x7FFF
    ring.avail_wrap = ring.used_wrap = base >> 15


cdef void recover_split(RingC *ring) noexcept:
    """Give back the chains of a transmitq that were taken before and may have been forwarded."""
    cdef uint32_t note = ring.journal.taken
    cdef uint16_t taken = <uint16_t>note, idx = ring.last_used
    cdef uint16_t pending = taken - idx, offered = vs_load_acquire16(ring.avail + 1) - idx
    cdef uint16_t head
    if idx != note >> 16 or pending > BURST or pending > offered or offered > ring.size:
        return  # nothing was on its way, or this is a fresh ring in the same place
    while idx != taken:
        head = vs_load16(ring.avail + 2 + (idx & ring.mask))
        ring.used[idx & ring.mask].id = head
        ring.used[idx & ring.mask].len = 0
        idx += 1
    vs_store_release16(ring.used_hdr + 1, taken)
    ring.last_avail = ring.last_used = ring.cached_avail = taken
