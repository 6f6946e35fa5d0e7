"""The forwarding database: (VLAN, MAC) to port.

Buckets of four entries, one cache line each; every key has two buckets it may live in. Lookups take
no lock: a reader loads the key, then the value, then the key again. Inserting, moving and deleting
take `lock`, which workers only ever try: who does not get it learns with the next frame instead.
"""

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

from vswitch.fastpath.atomics cimport (
    vs_cas64,
    vs_likely,
    vs_load32,
    vs_load64,
    vs_load_acquire64,
    vs_lowest_bit,
    vs_prefetch,
    vs_store32,
    vs_store64,
    vs_store_release64,
    vs_trylock,
    vs_unlock,
)
from vswitch.fastpath.types cimport FdbBucket, FdbC, FdbEntryC

cdef enum:
    FDB_STATIC = 1

cdef enum FdbResult:
    FDB_KNOWN      # nothing to do
    FDB_LEARNED    # a new entry
    FDB_MOVED      # the entry pointed elsewhere
    FDB_NO_ROOM    # table or both buckets full
    FDB_PORT_FULL  # the port has as many as it may
    FDB_BUSY       # somebody else is writing


cdef inline uint64_t fdb_pack(uint16_t port, uint32_t flags, uint32_t tick) noexcept nogil:
    return <uint64_t>port | (<uint64_t>flags << 16) | (<uint64_t>tick << 32)


cdef inline uint64_t fdb_hash(const FdbC *fdb, uint64_t key) noexcept nogil:
    """Multiply and fold; the seed is random so that no guest can choose colliding addresses."""
    cdef uint64_t h = (key ^ fdb.seed) * <uint64_t>0x9E3779B97F4A7C15
    h ^= h >> 32
    h *= <uint64_t>0xD6E8FEB86659FD93
    return h ^ (h >> 29)


cdef inline FdbBucket *fdb_bucket(const FdbC *fdb, uint64_t h, int which) noexcept nogil:
    if which:
        h = (h >> 32) ^ (h << 7)
    return &fdb.buckets[h & fdb.mask]


cdef inline void fdb_prefetch(const FdbC *fdb, uint64_t key) noexcept nogil:
    """Fetch the line in which an address is most likely, a stage ahead of looking it up."""
    vs_prefetch(fdb_bucket(fdb, fdb_hash(fdb, key), 0))


cdef inline FdbEntryC *fdb_find(const FdbC *fdb, uint64_t key) noexcept nogil:
    cdef uint64_t h = fdb_hash(fdb, key)
    cdef FdbBucket *bucket
    cdef uint32_t found, which
    for which in range(2):
        bucket = fdb_bucket(fdb, h, which)
        # All four, without a branch that would depend on an address. Acquire: pairs with the release
        # store of the key in fdb_insert.
        found = (
            <uint32_t>(vs_load_acquire64(&bucket.entries[0].key) == key)
            | <uint32_t>(vs_load_acquire64(&bucket.entries[1].key) == key) << 1
            | <uint32_t>(vs_load_acquire64(&bucket.entries[2].key) == key) << 2
            | <uint32_t>(vs_load_acquire64(&bucket.entries[3].key) == key) << 3
        )
        if vs_likely(found):
            return &bucket.entries[vs_lowest_bit(found)]
    return NULL


cdef inline int32_t fdb_lookup(const FdbC *fdb, uint64_t key) noexcept nogil:
    """The port of an address, or -1."""
    cdef FdbEntryC *entry = fdb_find(fdb, key)
    cdef uint64_t val
    if entry == NULL:
        return -1
    val = vs_load_acquire64(&entry.val)
    if vs_load64(&entry.key) != key:
        return -1  # deleted between the two reads
    return <int32_t>(val & 0xFFFF)


cdef inline FdbResult fdb_insert(
    FdbC *fdb, uint64_t key, uint16_t port, uint32_t flags, uint32_t tick, int32_t *old_port
) noexcept nogil:
    """Add or change an entry; the caller holds `fdb.lock`.

    Static entries do not count towards what a port may have.
    """
    cdef FdbEntryC *entry = fdb_find(fdb, key)
    cdef FdbEntryC *free_entry = NULL
    cdef FdbBucket *bucket
    cdef uint64_t h
    cdef int which, i, used, best = 5
    cdef bint counts = not flags & FDB_STATIC
    cdef bint port_full = counts and fdb.learned[port] >= vs_load32(&fdb.learned_max[port])
    if entry != NULL:
        if (entry.val >> 16) & FDB_STATIC and not flags & FDB_STATIC:
            return FDB_KNOWN  # pinned between the look without the lock and this one
        old_port[0] = <int32_t>(entry.val & 0xFFFF)
        if port_full and old_port[0] != port:
            return FDB_PORT_FULL
        if not (entry.val >> 16) & FDB_STATIC:
            fdb.learned[old_port[0]] -= 1
        fdb.learned[port] += counts
        vs_store_release64(&entry.val, fdb_pack(port, flags, tick))
        if old_port[0] == port:
            return FDB_KNOWN
        vs_store32(&fdb.generation, fdb.generation + 1)
        return FDB_MOVED
    if port_full:
        return FDB_PORT_FULL
    if fdb.count < fdb.limit:
        h = fdb_hash(fdb, key)
        for which in range(2):
            bucket = fdb_bucket(fdb, h, which)
            used = 0
            for i in range(4):
                if bucket.entries[i].key != 0:
                    used += 1
            if used < 4 and used < best:  # the emptier one keeps both open for longer
                best = used
                for i in range(4):
                    if bucket.entries[i].key == 0:
                        free_entry = &bucket.entries[i]
                        break
            if best < 3:
                break  # with room left here, the first bucket is where look-ups begin
    if free_entry == NULL:
        fdb.full += 1
        return FDB_NO_ROOM
    vs_store64(&free_entry.val, fdb_pack(port, flags, tick))
    # Release: who sees the key sees the value. Pairs with the acquire load in fdb_find.
    vs_store_release64(&free_entry.key, key)
    fdb.count += 1
    fdb.learned[port] += counts
    return FDB_LEARNED


cdef inline FdbResult fdb_learn(
    FdbC *fdb, uint64_t key, uint16_t port, uint32_t tick, int32_t *old_port
) noexcept nogil:
    """Note that `key` was seen as a source on `port` at `tick`. Never waits."""
    cdef FdbEntryC *entry = fdb_find(fdb, key)
    cdef uint64_t val
    cdef FdbResult result
    if entry != NULL:
        val = vs_load_acquire64(&entry.val)
        if (val >> 16) & FDB_STATIC:
            return FDB_KNOWN
        if <uint16_t>(val & 0xFFFF) == port:
            # Compare and swap: should the entry have become another address's meanwhile, its value
            # differs, or is equal and only gets a fresher tick.
            vs_cas64(&entry.val, val, fdb_pack(port, 0, tick))
            return FDB_KNOWN
    # Whoever cycles through addresses contends for the lock as long as some are learned, no longer.
    if vs_load32(&fdb.learned[port]) >= vs_load32(&fdb.learned_max[port]):
        return FDB_PORT_FULL
    if not vs_trylock(&fdb.lock):
        return FDB_BUSY
    result = fdb_insert(fdb, key, port, 0, tick, old_port)
    vs_unlock(&fdb.lock)
    return result


cdef inline void fdb_remove(FdbC *fdb, FdbEntryC *entry) noexcept nogil:
    """Delete an entry; the caller holds `fdb.lock`."""
    if not (entry.val >> 16) & FDB_STATIC:
        fdb.learned[entry.val & 0xFFFF] -= 1
    vs_store_release64(&entry.key, 0)
    vs_store64(&entry.val, 0)
    fdb.count -= 1
    vs_store32(&fdb.generation, fdb.generation + 1)
