"""The FDB's table. The package says what *main* and *atomic* mean."""

from libc.stdint cimport uint32_t, uint64_t

from vswitch.fastpath.shared.sizes cimport MAX_PORTS

cdef struct FdbEntryC:
    uint64_t key           # atomic; MAC in wire order in the low 48 bits, VLAN above, or FDB_EMPTY
    uint64_t val           # atomic; port, static, round and tick: see worker/fdb.pxd

cdef struct FdbBucket:     # one cache line
    FdbEntryC entries[4]

cdef struct FdbC:
    FdbBucket *buckets     # main
    uint64_t mask
    uint64_t seed
    uint32_t limit         # most entries
    uint32_t count         # under lock
    uint32_t lock
    uint32_t generation    # atomic; grows whenever an entry changes its port or goes
    uint32_t tick          # atomic; seconds
    uint64_t full          # under lock; addresses that found no place
    uint32_t learned[MAX_PORTS]      # under lock; dynamic entries of each port ...
    uint32_t learned_max[MAX_PORTS]  # atomic; ... and the most it may have
