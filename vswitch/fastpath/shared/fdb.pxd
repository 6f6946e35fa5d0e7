"""The FDB's table. The package says what *main* and *atomic* mean."""

from libc.stdint cimport uint32_t, uint64_t

cdef struct FdbEntryC:
    uint64_t key           # atomic; MAC in wire order in the low 48 bits, VLAN above, or FDB_EMPTY
    uint64_t val           # atomic; port, static, round and tick: see worker/fdb.pxd

cdef struct FdbBucket:     # one cache line
    FdbEntryC entries[4]

cdef struct FdbTable:      # main; never changed, but replaced by a larger one
    FdbBucket *buckets
    uint64_t mask          # of their numbers
    uint32_t grow_at       # entries with which there is to be a larger one; 0: never

cdef struct FdbC:          # one a network
    void *table            # atomic; FdbTable *
    uint64_t seed
    uint32_t limit         # most entries
    uint32_t count         # under lock
    uint32_t lock
    uint32_t generation    # atomic; grows whenever an entry changes its port or goes
    uint32_t tick          # atomic; seconds
    uint32_t crowded       # atomic; an address found no place in the present table
    uint32_t asked         # atomic; main was told that the table is to grow
    uint64_t full          # under lock; addresses that found no place
    # By port, for all networks together: a port is in one of them at a time.
    uint32_t *learned      # under lock; dynamic entries of each port ...
    uint32_t *learned_max  # atomic; ... and the most it may have
