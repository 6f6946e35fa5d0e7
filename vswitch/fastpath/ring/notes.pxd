"""What a ring's worker notes so that another process can go on where this one was killed.

Nobody but a successor reads it, and a killed process has executed its stores in program order up to
some point and none after. So it takes no fences, only an order of the stores that the compiler keeps.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from vswitch.fastpath.shared.ring cimport JournalBatch, RingC, UsedChain
from vswitch.fastpath.sys.atomics cimport vs_compiler_barrier, vs_store16, vs_store32


cdef inline void note_taken(RingC *ring) noexcept nogil:
    """Split transmitq: frames up to `last_avail` are about to be forwarded."""
    vs_store32(&ring.journal.taken, ring.last_avail | <uint32_t>ring.last_used << 16)
    vs_compiler_barrier()


cdef inline void note_batch(
    RingC *ring, uint16_t position, uint8_t wrap, const UsedChain *chains, uint32_t n
) noexcept nogil:
    """Packed ring: these chains are about to be used; what they hold is in its place."""
    cdef uint16_t other = ring.journal.current ^ 1
    cdef JournalBatch *batch = &ring.journal.batches[other & 1]
    batch.position = position
    batch.wrap = wrap
    batch.last = ring.last_used_at
    batch.last_wrap = ring.last_wrap
    if n:
        memcpy(batch.chains, chains, n * sizeof(UsedChain))
    batch.n = <uint16_t>n
    vs_compiler_barrier()
    vs_store16(&ring.journal.current, other & 1)
    vs_compiler_barrier()
