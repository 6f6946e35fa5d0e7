"""The forwarding database: (VLAN, MAC) to port.

Buckets of four entries, one cache line each; every key has two buckets it may live in. Lookups take
no lock: see `fdb_read`. Inserting, moving and deleting take `lock`, which workers only ever try: who
does not get it learns with the next frame instead.

An empty place has a key that no frame is looked up by, a group address, for all zeros is an address
like any other in a destination. Its value stays what it was, but for the round that it counts: the
next address in this place gets the next one, so that a reader who was held up between two loads cannot
take the value of one address for that of another. tests/model/test_fdb_entry.py tries all that can come
between, and each order that is asked for here.
"""

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

from vswitch.fastpath.shared.fdb cimport FdbBucket, FdbC, FdbEntryC, FdbTable
from vswitch.fastpath.sys.atomics cimport (
    vs_cas64,
    vs_likely,
    vs_load32,
    vs_load64,
    vs_load_acquire64,
    vs_load_acquire_ptr,
    vs_lowest_bit,
    vs_prefetch,
    vs_store32,
    vs_store64,
    vs_store_release64,
    vs_trylock,
    vs_unlikely,
    vs_unlock,
)

cdef extern from * nogil:
    """
    /* The key of an empty place: the broadcast address in VLAN 4095. */
    #define VS_FDB_EMPTY UINT64_MAX
    /* The round of a place: 19 bits between port and flag, which are what a value has to tell, and the
     * tick. That a place is emptied and filled half a million times in the course of one look-up is not
     * to be feared: the main thread alone empties places. */
    #define VS_FDB_ROUND 0xFFFFE000ULL
    #define VS_FDB_NEXT_ROUND 0x2000ULL
    #define VS_FDB_STATIC 0x1000ULL
    #define VS_FDB_PORT 0xFFFULL
    """
    const uint64_t FDB_EMPTY "VS_FDB_EMPTY"
    const uint64_t FDB_ROUND "VS_FDB_ROUND"
    const uint64_t FDB_NEXT_ROUND "VS_FDB_NEXT_ROUND"
    const uint64_t FDB_VAL_STATIC "VS_FDB_STATIC"
    const uint64_t FDB_VAL_PORT "VS_FDB_PORT"

cdef enum FdbResult:
    FDB_KNOWN      # nothing to do
    FDB_LEARNED    # a new entry
    FDB_MOVED      # the entry pointed elsewhere
    FDB_NO_ROOM    # table or both buckets full
    FDB_PORT_FULL  # the port has as many as it may
    FDB_BUSY       # somebody else is writing


cdef inline uint64_t fdb_pack(uint64_t round, uint16_t port, bint pinned, uint32_t tick) noexcept nogil:
    return round & FDB_ROUND | port | (FDB_VAL_STATIC if pinned else 0) | <uint64_t>tick << 32


cdef inline uint16_t fdb_port(uint64_t val) noexcept nogil:
    return <uint16_t>(val & FDB_VAL_PORT)


cdef inline bint fdb_pinned(uint64_t val) noexcept nogil:
    """Whether an entry is static: never aged, never moved."""
    return (val & FDB_VAL_STATIC) != 0


cdef inline uint32_t fdb_tick(uint64_t val) noexcept nogil:
    return <uint32_t>(val >> 32)


cdef inline uint64_t fdb_hash(const FdbC *fdb, uint64_t key) noexcept nogil:
    """Multiply and fold; the seed is random so that no guest can choose colliding addresses."""
    cdef uint64_t h = (key ^ fdb.seed) * <uint64_t>0x9E3779B97F4A7C15
    h ^= h >> 32
    h *= <uint64_t>0xD6E8FEB86659FD93
    return h ^ (h >> 29)


cdef inline const FdbTable *fdb_table(const FdbC *fdb) noexcept nogil:
    """The present table. Acquire: with its entries; pairs with the release store in Fdb.grow."""
    return <const FdbTable *>vs_load_acquire_ptr(&fdb.table)


cdef inline FdbBucket *fdb_bucket(const FdbTable *table, uint64_t h, int which) noexcept nogil:
    """The first or second bucket for a hash; a larger table has the same lower bits of its number."""
    if which:
        h = (h >> 32) ^ (h << 7)
    return &table.buckets[h & table.mask]


cdef inline void fdb_prefetch(const FdbC *fdb, uint64_t key) noexcept nogil:
    """Fetch the line in which an address is most likely, a stage ahead of looking it up."""
    vs_prefetch(fdb_bucket(fdb_table(fdb), fdb_hash(fdb, key), 0))


cdef inline FdbEntryC *fdb_find(const FdbC *fdb, uint64_t key) noexcept nogil:
    cdef const FdbTable *table = fdb_table(fdb)
    cdef uint64_t h = fdb_hash(fdb, key)
    cdef FdbBucket *bucket
    cdef uint32_t found, which
    for which in range(2):
        bucket = fdb_bucket(table, h, which)
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


cdef inline bint fdb_read(const FdbEntryC *entry, uint64_t key, uint64_t *val) noexcept nogil:
    """The value of an entry that was found to have `key`; False if it is another's by now.

    The key once more: who has the value of a later address sees that this one was deleted before (acquire;
    pairs with the release store of the value in fdb_insert). The round once more: should the first
    address be back, it is in a later round than that value (acquire; pairs with the release store
    of the key in fdb_insert).
    """
    val[0] = vs_load_acquire64(&entry.val)
    if vs_unlikely(vs_load_acquire64(&entry.key) != key):
        return False
    return (vs_load64(&entry.val) ^ val[0]) & FDB_ROUND == 0


cdef inline int32_t fdb_lookup(const FdbC *fdb, uint64_t key) noexcept nogil:
    """The port of an address, or -1."""
    cdef const FdbEntryC *entry = fdb_find(fdb, key)
    cdef uint64_t val
    if entry == NULL or not fdb_read(entry, key, &val):
        return -1
    return fdb_port(val)


cdef inline FdbResult fdb_insert(
    FdbC *fdb, uint64_t key, uint16_t port, bint pinned, uint32_t tick, int32_t *old_port
) noexcept nogil:
    """Add or change an entry; the caller holds `fdb.lock`, so that the table stays.

    Static entries do not count towards what a port may have.
    """
    cdef const FdbTable *table = fdb_table(fdb)
    cdef FdbEntryC *entry = fdb_find(fdb, key)
    cdef FdbEntryC *free_entry = NULL
    cdef FdbBucket *bucket
    cdef uint64_t h, val
    cdef int which, i, used, best = 5
    cdef bint counts = not pinned
    cdef bint port_full = counts and fdb.learned[port] >= vs_load32(&fdb.learned_max[port])
    if entry != NULL:
        # Workers refresh the tick without the lock, and nothing else.
        val = vs_load64(&entry.val)
        if fdb_pinned(val) and not pinned:
            return FDB_KNOWN  # pinned between the look without the lock and this one
        old_port[0] = fdb_port(val)
        if port_full and old_port[0] != port:
            return FDB_PORT_FULL
        if not fdb_pinned(val):
            fdb.learned[old_port[0]] -= 1
        fdb.learned[port] += counts
        # The same round: who reads the old value and who reads the new one are both right.
        vs_store_release64(&entry.val, fdb_pack(val, port, pinned, tick))
        if old_port[0] == port:
            return FDB_KNOWN
        vs_store32(&fdb.generation, fdb.generation + 1)
        return FDB_MOVED
    if port_full:
        return FDB_PORT_FULL
    if fdb.count < fdb.limit:
        h = fdb_hash(fdb, key)
        for which in range(2):
            bucket = fdb_bucket(table, h, which)
            used = 0
            for i in range(4):
                if bucket.entries[i].key != FDB_EMPTY:
                    used += 1
            if used < 4 and used < best:  # the emptier one keeps both open for longer
                best = used
                for i in range(4):
                    if bucket.entries[i].key == FDB_EMPTY:
                        free_entry = &bucket.entries[i]
                        break
            if best < 3:
                break  # with room left here, the first bucket is where look-ups begin
    if free_entry == NULL:
        fdb.full += 1
        if fdb.count < fdb.limit:
            vs_store32(&fdb.crowded, 1)
        return FDB_NO_ROOM
    # Release: who sees this value sees that the address before it is deleted. Pairs with fdb_read.
    vs_store_release64(
        &free_entry.val,
        fdb_pack(vs_load64(&free_entry.val) + FDB_NEXT_ROUND, port, pinned, tick),
    )
    # Release: who sees the key sees the value. Pairs with the acquire loads in fdb_find and fdb_read.
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
        if fdb_pinned(val):
            return FDB_KNOWN
        if fdb_port(val) == port:
            # Compare and swap: should the entry have become another address's meanwhile, its value
            # is of another round. Of a deleted one it stays unread.
            vs_cas64(&entry.val, val, fdb_pack(val, port, False, tick))
            return FDB_KNOWN
    # Whoever cycles through addresses contends for the lock as long as some are learned, no longer.
    if vs_load32(&fdb.learned[port]) >= vs_load32(&fdb.learned_max[port]):
        return FDB_PORT_FULL
    if not vs_trylock(&fdb.lock):
        return FDB_BUSY
    result = fdb_insert(fdb, key, port, False, tick, old_port)
    vs_unlock(&fdb.lock)
    return result


cdef inline bint fdb_must_grow(const FdbC *fdb) noexcept nogil:
    """Whether there is to be a larger table: this one is half full, or has no place for an address."""
    cdef uint32_t grow_at = fdb_table(fdb).grow_at
    return grow_at != 0 and (vs_load32(&fdb.count) >= grow_at or vs_load32(&fdb.crowded))


cdef inline bint fdb_asks(FdbC *fdb) noexcept nogil:
    """The same, if the main thread was not told before."""
    if vs_likely(not fdb_must_grow(fdb)) or vs_load32(&fdb.asked):
        return False
    vs_store32(&fdb.asked, 1)
    return True


cdef inline void fdb_remove(FdbC *fdb, FdbEntryC *entry) noexcept nogil:
    """Delete an entry; the caller holds `fdb.lock`."""
    cdef uint64_t val = vs_load64(&entry.val)
    if not fdb_pinned(val):
        fdb.learned[fdb_port(val)] -= 1
    # The value stays, with its round. Whoever reads it by the key that was there is as right as a
    # moment ago.
    vs_store64(&entry.key, FDB_EMPTY)
    fdb.count -= 1
    vs_store32(&fdb.generation, fdb.generation + 1)
