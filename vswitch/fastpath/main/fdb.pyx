"""The main thread's side of the forwarding database: static entries, aging, flushing, listing."""

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

import os
import re

from vswitch.fastpath.main.fdb_table cimport ORDER_BITS, Shares, Table, backwards
from vswitch.fastpath.shared.fdb cimport FdbBucket, FdbC, FdbEntryC
from vswitch.fastpath.shared.sizes cimport BURST, MAX_PORTS
from vswitch.fastpath.sys.atomics cimport (
    vs_load32,
    vs_load64,
    vs_load_acquire64,
    vs_pause,
    vs_store32,
    vs_store_release_ptr,
    vs_trylock,
    vs_unlock,
)
from vswitch.fastpath.worker.fdb cimport (
    FDB_EMPTY,
    FDB_NO_ROOM,
    FDB_PORT_FULL,
    FdbResult,
    fdb_bucket,
    fdb_find,
    fdb_hash,
    fdb_insert,
    fdb_learn,
    fdb_lookup,
    fdb_must_grow,
    fdb_pinned,
    fdb_port,
    fdb_prefetch,
    fdb_read,
    fdb_remove,
    fdb_tick,
)

cdef enum:
    FIRST_BUCKETS = 128  # of a table that grows: 8 KiB
    GROWTH = 4  # each table is so many times as large as the one before

GROWS_MAX = 1 << 17
"""Entries; a table for more is made whole, for to copy one would hold up the event loop."""
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
NO_LIMIT = 0xFFFFFFFF  # entries of a port: as many as the table takes
SWEEP = 4096  # places looked at before the lock is given up for a moment
SLOTS_A_TURN = 16384  # places that `page`, `flush_on` and `age_on` look at: 256 KiB of the table
GONE_A_TURN = 256  # entries that `age_on` takes out, for somebody is told of each


def mac_key(mac: str, vlan: int = 0) -> int:
    """The key of an address: MAC in wire order in the low 48 bits, VLAN id above.

    Raises ValueError for what is not a unicast MAC address or not a VLAN id (0 is untagged).
    """
    if not _MAC.fullmatch(mac):
        raise ValueError(f"{mac!r} is not a MAC address (write it as 52:54:00:12:34:56)")
    octets = bytes.fromhex(mac.replace(":", ""))
    if octets[0] & 1 or not any(octets):
        raise ValueError(f"{mac} is not a unicast address")
    if not 0 <= vlan <= 4094:
        raise ValueError(f"VLAN {vlan} is not between 0 (untagged) and 4094")
    return int.from_bytes(octets, "little") | vlan << 48


def key_mac(key: int) -> tuple[str, int]:
    """The address of a key, as text, and its VLAN id."""
    return (key & 0xFFFFFFFFFFFF).to_bytes(6, "little").hex(":"), key >> 48


cdef uint16_t _port(uint16_t port) except? 0xFFFF:
    if port >= MAX_PORTS:
        raise ValueError(f"port number {port} is not below {MAX_PORTS}")
    return port


cdef uint64_t _key(uint64_t key) except? 1:
    # An empty place has the key of a group address.
    if key & 1:
        raise ValueError(f"{key:#x} is the key of a group address")
    return key


cdef class Fdb:
    """(VLAN, MAC) to port number, of one network. `size` is the most entries it takes.

    Memory is 24 to 48 bytes for each of these, huge pages if the kernel has some, since a look-up among
    a million addresses would miss the TLB each time. It is taken at the start; or, with `grows`,
    8 KiB are, and more by `grow` when they are needed. `shares` is that of all networks together.
    """

    def __cinit__(self, uint64_t size=65536, bint grows=False, Shares shares=None):
        cdef uint64_t buckets = 1
        # Half as many places more than entries: two choices of four places fill a table that far.
        while buckets * 4 < size * 3 // 2:
            buckets *= 2
        self.buckets_max = buckets
        self.c = <FdbC *>calloc(1, sizeof(FdbC))
        if self.c == NULL:
            raise MemoryError
        if grows and size <= GROWS_MAX:
            buckets = min(buckets, <uint64_t>FIRST_BUCKETS)
        self.table = self._of(buckets)
        self.c.table = &self.table.c
        self.shares = Shares() if shares is None else shares
        self.c.learned = self.shares.learned
        self.c.learned_max = self.shares.learned_max
        self.c.limit = size
        self.c.seed = int.from_bytes(os.urandom(8), "little")
        self.c.generation = 1
        self.c.tick = 1

    def __dealloc__(self):
        free(self.c)

    cdef Table _of(self, uint64_t buckets):
        """A table of so many buckets, that is to be replaced when half of its places are taken."""
        return Table(buckets, 2 * buckets if buckets < self.buckets_max else 0)

    @property
    def must_grow(self):
        """Whether it has as many entries as are good for its present table."""
        return bool(fdb_must_grow(self.c))

    def grow(self):
        """Go on with a larger table, if it is time to; returns the old one, which workers may use.

        While it is copied workers learn nothing, as whenever somebody else is writing.
        """
        cdef Table old = self.table, table
        cdef uint64_t buckets = old.c.mask + 1
        if not self.must_grow:
            vs_store32(&self.c.asked, 0)
            return None
        buckets = min(buckets * GROWTH, self.buckets_max)
        self._lock()
        table = self._of(buckets)
        while not self._copy(old, table):
            # Once in the age of the universe: all places of an address are taken.
            buckets *= 2
            table = self._of(buckets)
        # Release: the table with its entries before the pointer to it; pairs with fdb_table.
        vs_store_release_ptr(&self.c.table, &table.c)
        vs_store32(&self.c.crowded, 0)
        vs_store32(&self.c.asked, 0)
        vs_unlock(&self.c.lock)
        self.table = table
        return old

    cdef bint _copy(self, Table old, Table table) noexcept:
        """Copy all entries; False if one found no room."""
        cdef uint64_t i, b
        cdef bint which
        cdef FdbEntryC *entry
        for b in range(old.c.mask + 1):
            for i in range(4):
                entry = &old.c.buckets[b].entries[i]
                if entry.key == FDB_EMPTY:
                    continue
                # In the same of its two buckets: a listing goes on in the order of their lower bits.
                which = fdb_bucket(&old.c, fdb_hash(self.c, entry.key), 0) != &old.c.buckets[b]
                if not table.take(self.c, entry, which) and not table.take(self.c, entry, not which):
                    return False
        return True

    cdef void _lock(self) noexcept nogil:
        # Workers only try the lock and hold it for one insertion, so this wait is short.
        while not vs_trylock(&self.c.lock):
            vs_pause()

    def __len__(self):
        return vs_load32(&self.c.count)

    @property
    def size(self):
        """The most entries it takes."""
        return self.c.limit

    @property
    def full(self):
        """How often an address found no place."""
        return self.c.full

    @property
    def tick(self):
        """The present second, as entries are stamped with."""
        return vs_load32(&self.c.tick)

    @tick.setter
    def tick(self, uint32_t value):
        vs_store32(&self.c.tick, value)

    def learned(self, uint16_t port):
        """How many dynamic entries a port has."""
        return vs_load32(&self.c.learned[_port(port)])

    def pinned(self, uint16_t port):
        """How many static entries a port has."""
        return self.shares.statics[_port(port)]

    @property
    def slots(self):
        """Places of the present table; those of `flush_on` and `age_on` are counted from 0."""
        return 4 * (self.table.c.mask + 1)

    def limit(self, uint16_t port, uint32_t most):
        """Let a port have `most` dynamic entries; those it has beyond that stay until they age."""
        vs_store32(&self.c.learned_max[_port(port)], most)

    def lookup(self, uint64_t key):
        """The port number of a key, or None."""
        cdef int32_t port = fdb_lookup(self.c, _key(key))
        return None if port < 0 else port

    def count_known(self, const uint64_t[::1] keys):
        """How many of these keys are there; looks them up as a worker does, without the GIL."""
        cdef Py_ssize_t start = 0, end, i
        cdef uint32_t found = 0
        with nogil:
            while start < keys.shape[0]:
                end = min(start + BURST, keys.shape[0])
                for i in range(start, end):
                    fdb_prefetch(self.c, keys[i])
                for i in range(start, end):
                    found += fdb_lookup(self.c, keys[i]) >= 0
                start = end
        return found

    @property
    def memory_len(self):
        """Bytes of the present table, whatever is in it."""
        return (self.table.c.mask + 1) * sizeof(FdbBucket)

    def learn(self, uint64_t key, uint16_t port):
        """What a worker does with a source address; False when table or port had no room."""
        cdef int32_t old = -1
        cdef FdbResult result
        result = fdb_learn(self.c, _key(key), _port(port), vs_load32(&self.c.tick), &old)
        return result != FDB_NO_ROOM and result != FDB_PORT_FULL

    def learn_late(self, uint64_t key, uint16_t port):
        """The same where another worker has learned, or main changed, something after the first look.

        For tests: two workers meet there for some nanoseconds.
        """
        cdef int32_t old = -1
        cdef FdbResult result
        key = _key(key)
        port = _port(port)
        self._lock()
        result = fdb_insert(self.c, key, port, False, vs_load32(&self.c.tick), &old)
        vs_unlock(&self.c.lock)
        return result != FDB_NO_ROOM and result != FDB_PORT_FULL

    def find(self, uint64_t key):
        """The port number of a key and whether the entry is static, or None."""
        cdef FdbEntryC *entry
        cdef uint64_t val
        key = _key(key)
        entry = fdb_find(self.c, key)
        if entry == NULL or not fdb_read(entry, key, &val):
            return None
        return fdb_port(val), bool(fdb_pinned(val))

    def add_static(self, uint64_t key, uint16_t port):
        """Pin an address to a port: never aged, never moved. False when the table is full."""
        cdef int32_t old = -1
        cdef FdbEntryC *entry
        cdef FdbResult result
        port = _port(port)
        key = _key(key)
        self._lock()
        entry = fdb_find(self.c, key)
        if entry != NULL and fdb_pinned(entry.val):
            self.shares.statics[fdb_port(entry.val)] -= 1
        result = fdb_insert(self.c, key, port, True, vs_load32(&self.c.tick), &old)
        if result != FDB_NO_ROOM:
            self.shares.statics[port] += 1
        # A worker may have noted the address as its port's own.
        vs_store32(&self.c.generation, self.c.generation + 1)
        vs_unlock(&self.c.lock)
        return result != FDB_NO_ROOM

    def delete(self, uint64_t key):
        """Remove one entry; False when there was none."""
        cdef FdbEntryC *entry
        key = _key(key)
        self._lock()
        entry = fdb_find(self.c, key)
        if entry != NULL:
            self._remove(entry)
        vs_unlock(&self.c.lock)
        return entry != NULL

    cdef void _remove(self, FdbEntryC *entry) noexcept:
        """Delete an entry; the caller holds the lock."""
        if fdb_pinned(entry.val):
            self.shares.statics[fdb_port(entry.val)] -= 1
        fdb_remove(self.c, entry)

    def flush(self, port=None, statics=False):
        """Remove the dynamic entries of one port or of all; returns how many.

        `statics` removes the static ones too. All in one go: who has others to serve meanwhile
        takes `flush_on`.
        """
        removed, start = 0, 0
        while start is not None:
            some, start = self.flush_on(start, port, statics)
            removed += some
        return removed

    def flush_on(self, uint64_t start, port=None, bint statics=False):
        """What `flush` does, from one place on and for SLOTS_A_TURN places.

        Returns how many were removed and where to go on, None at the end, which comes at once when
        there are no more such entries.
        """
        cdef int32_t only = -1 if port is None else _port(port)
        if only >= 0 and not vs_load32(&self.c.learned[only]) and not (statics and self.shares.statics[only]):
            return 0, None
        return self._sweep(start, only, statics, 0, None)

    def age(self, uint32_t limit):
        """Remove dynamic entries not seen for `limit` ticks; returns a list of (key, port)."""
        gone, start = [], 0
        while start is not None:
            some, start = self.age_on(start, limit)
            gone += some
        return gone

    def age_on(self, uint64_t start, uint32_t limit):
        """What `age` does, from one place on: SLOTS_A_TURN places, or fewer with GONE_A_TURN entries.

        Returns what was removed and where to go on, None at the end.
        """
        gone = []
        _, start_again = self._sweep(start, -1, False, limit, gone)
        return gone, start_again

    cdef _sweep(self, uint64_t start, int32_t port, bint statics, uint32_t limit, list gone):
        # Should the table grow between two of these, what was behind `start` still is.
        cdef uint64_t i, val, places = 4 * (self.table.c.mask + 1), end, part
        cdef uint32_t tick = vs_load32(&self.c.tick), removed = 0
        cdef FdbEntryC *entry
        end = min(start + SLOTS_A_TURN, places)
        while start < end and (gone is None or len(gone) < GONE_A_TURN):
            part = min(start + SWEEP, end)
            self._lock()
            for i in range(start, part):
                start = i + 1
                entry = &self.table.c.buckets[i >> 2].entries[i & 3]
                if entry.key == FDB_EMPTY:
                    continue
                val = vs_load64(&entry.val)
                if port >= 0 and fdb_port(val) != port:
                    continue
                if fdb_pinned(val) and not statics:
                    continue
                if limit and tick - fdb_tick(val) < limit:
                    continue
                if gone is not None:
                    gone.append((entry.key, fdb_port(val)))
                self._remove(entry)
                removed += 1
                if gone is not None and len(gone) >= GONE_A_TURN:
                    break
            vs_unlock(&self.c.lock)
        return removed, start if start < places else None

    def entries(self):
        """All entries as (key, port, static, age in ticks), in no order."""
        found, start = [], 0
        while start is not None:
            some, start = self.page(start, self.c.limit)
            found += some
        return found

    def page(self, uint64_t start, uint64_t most):
        """Entries as `entries` has them, from one place on: SLOTS_A_TURN places, `most` entries.

        Returns them and where to go on, None at the end. An entry that is there all the time is found
        once, although the table may grow meanwhile: buckets come in the order of their numbers read
        backwards, so that those that a bucket becomes are next to each other. (Twice, if it
        grows while a page ends within a bucket, which is looked at again then.)
        """
        cdef uint64_t key, val, mask = self.table.c.mask, bucket
        cdef uint64_t at = start >> 2 & (1 << ORDER_BITS) - 1
        cdef uint32_t tick = vs_load32(&self.c.tick)
        cdef uint64_t looked = 0, i = start & 3
        cdef int bits = 0
        cdef FdbEntryC *entry
        found = []
        if start >> (ORDER_BITS + 2) > ORDER_BITS:
            return found, None  # no place of any table
        while mask >> bits:
            bits += 1
        if start >> (ORDER_BITS + 2) != <uint64_t>bits:
            i = 0  # it has grown: the first entries of this bucket may be others than they were
        # `at` has the number backwards in its upper bits: the same place in a table of any size.
        while at >> ORDER_BITS == 0:
            bucket = backwards(at, bits)
            while i < 4:
                if <uint64_t>len(found) >= most or looked >= <uint64_t>SLOTS_A_TURN:
                    return found, <uint64_t>bits << (ORDER_BITS + 2) | at << 2 | i
                entry = &self.table.c.buckets[bucket].entries[i]
                key = vs_load_acquire64(&entry.key)
                if key != FDB_EMPTY and fdb_read(entry, key, &val):
                    found.append((
                        key, fdb_port(val), bool(fdb_pinned(val)),
                        max(0, <int32_t>(tick - fdb_tick(val))),
                    ))
                i += 1
                looked += 1
            i = 0
            at += <uint64_t>1 << (ORDER_BITS - bits)
        return found, None
