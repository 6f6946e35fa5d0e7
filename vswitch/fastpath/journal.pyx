"""Journals: memory of a port's rings that outlives the switch.

A split ring says itself how far it was used. Two things it does not say: whether frames that were
taken and not given back were delivered already, and, for a packed ring, where anything is. Workers
note both, and who starts the ring again with the same memory reads it:

- chains of a transmitq that were taken are given back without forwarding them. A frame that was in
  the switch when it was killed may be lost, as on a wire; none is delivered twice.
- buffers of a receiveq that were not given back are filled again.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

import os

from vswitch.fastpath.atomics cimport (
    vs_load16,
    vs_load_acquire16,
    vs_store_release16,
    vs_store_release64,
)
from vswitch.fastpath.types cimport (
    BURST,
    LAST_NONE,
    USED_BATCH,
    VRING_PACKED_DESC_F_AVAIL,
    VRING_PACKED_DESC_F_USED,
    JournalBatch,
    JournalC,
    RingC,
)
from vswitch.fastpath.virtqueue cimport packed_step

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_ANONYMOUS, MAP_PRIVATE
    void *MAP_FAILED

SLOT_LEN = 2048
"""Bytes a ring takes in a journal."""


cdef class Journal:
    """Notes of `size` rings, in a file or, with `fd` -1, in memory that dies with the process.

    The file must have `size` * SLOT_LEN bytes; the descriptor stays the caller's and may be closed.
    Raises OSError.
    """

    def __cinit__(self, int size, int fd=-1, long offset=0):
        self.size = size
        self.length = <size_t>size * 2048
        self.base = mmap(
            NULL, self.length, PROT_READ | PROT_WRITE,
            MAP_SHARED if fd >= 0 else MAP_PRIVATE | MAP_ANONYMOUS, fd, offset,
        )
        if self.base == MAP_FAILED:
            self.base = NULL
            raise OSError(errno, f"journal: mmap of {self.length} bytes: {os.strerror(errno)}")

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.length)

    cdef JournalC *slot(self, int index) noexcept:
        return <JournalC *>(<char *>self.base + 2048 * index)


cdef bint has_flags(RingC *ring, uint16_t index, uint8_t wrap) noexcept:
    """Whether an entry is marked as used in the round of that wrap counter."""
    cdef uint16_t both = VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED
    return vs_load_acquire16(<uint16_t *>&ring.desc[index] + 7) & both == (both if wrap else 0)


cdef bint is_same_round(RingC *ring, uint16_t last, uint8_t wrap) noexcept:
    """Whether the ring is still the one of the notes, and not a fresh one in the same place.

    A fresh ring has no entry with the USED bit; in one that was used, the entry used last is marked
    so, and in a round with wrap counter 0 some entry has the bit from the round before.
    """
    cdef uint32_t i
    if last == LAST_NONE:
        return True  # at its beginning, where a fresh one is too
    if last >= ring.size or not has_flags(ring, last, wrap):
        return False
    if wrap:
        return True
    for i in range(ring.size):
        if vs_load16(<uint16_t *>&ring.desc[i] + 7) & VRING_PACKED_DESC_F_USED:
            return True
    return False


cdef bint recover_packed(RingC *ring, bint transmit) noexcept:
    """Set the ring's positions from its journal; False, and nothing changed, if that is not possible.

    The journal may come from a frontend: what it says is checked like a message.
    """
    cdef JournalBatch journal = ring.journal.batches[ring.journal.current & 1]
    cdef uint16_t position = journal.position, i
    cdef uint8_t wrap = journal.wrap & 1
    if journal.n > USED_BATCH or position >= ring.size:
        return False
    for i in range(journal.n):
        if not 1 <= journal.counts[i] <= ring.size:
            return False
    if not is_same_round(ring, journal.last, journal.last_wrap & 1):
        return False
    ring.last_used_at = journal.last
    ring.last_wrap = journal.last_wrap & 1
    i = 0
    while i < journal.n and has_flags(ring, position, wrap):
        ring.last_used_at = position
        ring.last_wrap = wrap
        packed_step(ring, &position, &wrap, journal.counts[i])
        i += 1
    while transmit and i < journal.n:
        vs_store_release64(
            <uint64_t *>&ring.desc[position].len,
            <uint64_t>journal.ids[i] << 32
            | <uint64_t>(
                (VRING_PACKED_DESC_F_AVAIL | VRING_PACKED_DESC_F_USED) if wrap else 0
            ) << 48,
        )
        ring.last_used_at = position
        ring.last_wrap = wrap
        packed_step(ring, &position, &wrap, journal.counts[i])
        i += 1
    ring.last_avail = ring.last_used = position
    ring.avail_wrap = ring.used_wrap = wrap
    return True


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
