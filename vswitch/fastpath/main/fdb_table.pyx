"""What an FDB looks into, how that is walked through, and what all FDBs have in common."""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from vswitch.fastpath.shared.fdb cimport FdbBucket, FdbC, FdbEntryC
from vswitch.fastpath.worker.fdb cimport FDB_EMPTY, fdb_bucket, fdb_hash

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)
    int MADV_HUGEPAGE

cdef enum:
    HUGE_PAGE = 2 << 20


cdef uint64_t backwards(uint64_t at, int bits) noexcept:
    """The bucket, of 2**bits, that is at a place of the order in which they are listed."""
    cdef uint64_t number = 0
    cdef int bit
    for bit in range(bits):
        number |= (at >> (ORDER_BITS - 1 - bit) & 1) << bit
    return number


cdef class Shares:
    """How many addresses each port has in the network that it is in, and how many it may have."""

    def __cinit__(self):
        memset(self.learned, 0, sizeof(self.learned))
        memset(self.statics, 0, sizeof(self.statics))
        memset(self.learned_max, 0xFF, sizeof(self.learned_max))  # NO_LIMIT


cdef class Table:
    """What an Fdb looks into, of `buckets` buckets, a power of two."""

    def __cinit__(self, uint64_t buckets, uint32_t grow_at):
        # A bucket is a cache line, and lies in one.
        cdef size_t length = buckets * sizeof(FdbBucket)
        cdef bint huge = length >= HUGE_PAGE
        self.c.buckets = <FdbBucket *>aligned_alloc(HUGE_PAGE if huge else sizeof(FdbBucket), length)
        if self.c.buckets == NULL:
            raise MemoryError
        if huge:
            madvise(self.c.buckets, length, MADV_HUGEPAGE)  # without it, it is slower and that is all
        memset(self.c.buckets, 0xFF, length)  # FDB_EMPTY
        self.c.mask = buckets - 1
        self.c.grow_at = grow_at

    def __dealloc__(self):
        free(self.c.buckets)

    cdef bint take(self, const FdbC *fdb, const FdbEntryC *entry, int which) noexcept nogil:
        """Copy an entry of a smaller table, from a bucket for its hash; False if there is no room.

        Nobody else sees this table yet.
        """
        cdef FdbBucket *bucket = fdb_bucket(&self.c, fdb_hash(fdb, entry.key), which)
        cdef int i
        for i in range(4):
            if bucket.entries[i].key == FDB_EMPTY:
                bucket.entries[i] = entry[0]
                return True
        return False
