"""The main thread's side of the forwarding database: static entries, aging, flushing, listing."""

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

import os
import re

from vswitch.fastpath.shared.fdb cimport FdbBucket, FdbC, FdbEntryC
from vswitch.fastpath.shared.sizes cimport BURST, MAX_PORTS
from vswitch.fastpath.sys.atomics cimport (
    vs_load32,
    vs_load64,
    vs_load_acquire64,
    vs_pause,
    vs_store32,
    vs_trylock,
    vs_unlock,
)
from vswitch.fastpath.worker.fdb cimport (
    FDB_EMPTY,
    FDB_NO_ROOM,
    FDB_PORT_FULL,
    FdbResult,
    fdb_find,
    fdb_insert,
    fdb_learn,
    fdb_lookup,
    fdb_pinned,
    fdb_port,
    fdb_prefetch,
    fdb_read,
    fdb_remove,
    fdb_tick,
)

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)
    int MADV_HUGEPAGE

cdef enum:
    HUGE_PAGE = 2 << 20

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
    """(VLAN, MAC) to port number. `size` is the most entries it takes.

    Memory is 24 to 48 bytes an entry, taken at the start; huge pages if the kernel has some, since a
    look-up among a million addresses would miss the TLB each time.
    """

    def __cinit__(self, size=65536):
        cdef uint64_t buckets = 1
        memset(self.statics, 0, sizeof(self.statics))
        # Half as many places more than entries: two choices of four places fill a table that far.
        while buckets * 4 < <uint64_t>size * 3 // 2:
            buckets *= 2
        self.c = <FdbC *>calloc(1, sizeof(FdbC))
        if self.c == NULL:
            raise MemoryError
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
        self.c.limit = size
        for port in range(MAX_PORTS):
            self.c.learned_max[port] = NO_LIMIT
        self.c.seed = int.from_bytes(os.urandom(8), "little")
        self.c.generation = 1
        self.c.tick = 1

    def __dealloc__(self):
        if self.c != NULL:
            free(self.c.buckets)
            free(self.c)

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
        return self.statics[_port(port)]

    @property
    def slots(self):
        """Places of the table; those of `page` and the like are counted from 0."""
        return 4 * (self.c.mask + 1)

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
        """Bytes of the table, whatever is in it."""
        return (self.c.mask + 1) * sizeof(FdbBucket)

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
            self.statics[fdb_port(entry.val)] -= 1
        result = fdb_insert(self.c, key, port, True, vs_load32(&self.c.tick), &old)
        if result != FDB_NO_ROOM:
            self.statics[port] += 1
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
            self.statics[fdb_port(entry.val)] -= 1
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
        if only >= 0 and not vs_load32(&self.c.learned[only]) and not (statics and self.statics[only]):
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
        cdef uint64_t i, val, places = 4 * (self.c.mask + 1), end, part
        cdef uint32_t tick = vs_load32(&self.c.tick), removed = 0
        cdef FdbEntryC *entry
        end = min(start + SLOTS_A_TURN, places)
        while start < end and (gone is None or len(gone) < GONE_A_TURN):
            part = min(start + SWEEP, end)
            self._lock()
            for i in range(start, part):
                start = i + 1
                entry = &self.c.buckets[i >> 2].entries[i & 3]
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

        Returns them and where to go on, None at the end. An entry keeps its place, so one that is
        there all the time is found once.
        """
        cdef uint64_t i, key, val, places = 4 * (self.c.mask + 1), end
        cdef uint32_t tick = vs_load32(&self.c.tick)
        cdef FdbEntryC *entry
        found = []
        end = min(start + SLOTS_A_TURN, places)
        for i in range(start, end):
            if <uint64_t>len(found) >= most:
                end = i
                break
            entry = &self.c.buckets[i >> 2].entries[i & 3]
            key = vs_load_acquire64(&entry.key)
            if key != FDB_EMPTY and fdb_read(entry, key, &val):
                found.append((
                    key, fdb_port(val), bool(fdb_pinned(val)),
                    max(0, <int32_t>(tick - fdb_tick(val))),
                ))
        return found, end if end < places else None
