"""The main thread's side of the forwarding database: static entries, aging, flushing, listing."""

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

import os
import re

from vswitch.fastpath.atomics cimport (
    vs_load32,
    vs_load64,
    vs_load_acquire64,
    vs_pause,
    vs_store32,
    vs_trylock,
    vs_unlock,
)
from vswitch.fastpath.fdb cimport (
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
from vswitch.fastpath.types cimport BURST, MAX_PORTS, FdbBucket, FdbC, FdbEntryC

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)
    int MADV_HUGEPAGE

cdef enum:
    HUGE_PAGE = 2 << 20

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
NO_LIMIT = 0xFFFFFFFF  # entries of a port: as many as the table takes
SWEEP = 4096  # buckets looked at before the lock is given up for a moment


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

    def add_static(self, uint64_t key, uint16_t port):
        """Pin an address to a port: never aged, never moved. False when the table is full."""
        cdef int32_t old = -1
        cdef FdbResult result
        port = _port(port)
        key = _key(key)
        self._lock()
        result = fdb_insert(self.c, key, port, True, vs_load32(&self.c.tick), &old)
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
            fdb_remove(self.c, entry)
        vs_unlock(&self.c.lock)
        return entry != NULL

    def flush(self, port=None, statics=False):
        """Remove the dynamic entries of one port or of all; returns how many.

        `statics` removes the static ones too.
        """
        cdef int32_t only = -1 if port is None else port
        return self._sweep(only, statics, 0, None)

    def age(self, uint32_t limit):
        """Remove dynamic entries not seen for `limit` ticks; returns a list of (key, port)."""
        gone = []
        self._sweep(-1, False, limit, gone)
        return gone

    cdef _sweep(self, int32_t port, bint statics, uint32_t limit, list gone):
        cdef uint64_t i, val, start = 0, end
        cdef uint32_t tick = vs_load32(&self.c.tick), removed = 0
        cdef int k
        cdef FdbEntryC *entry
        while start <= self.c.mask:
            end = min(start + SWEEP, self.c.mask + 1)
            self._lock()
            for i in range(start, end):
                for k in range(4):
                    entry = &self.c.buckets[i].entries[k]
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
                    fdb_remove(self.c, entry)
                    removed += 1
            vs_unlock(&self.c.lock)
            start = end
        return removed

    def entries(self):
        """All entries as (key, port, static, age in ticks), in no order."""
        cdef uint64_t i, key, val
        cdef uint32_t tick = vs_load32(&self.c.tick)
        cdef int k
        cdef FdbEntryC *entry
        found = []
        for i in range(self.c.mask + 1):
            for k in range(4):
                entry = &self.c.buckets[i].entries[k]
                key = vs_load_acquire64(&entry.key)
                if key != FDB_EMPTY and fdb_read(entry, key, &val):
                    found.append((
                        key, fdb_port(val), bool(fdb_pinned(val)),
                        max(0, <int32_t>(tick - fdb_tick(val))),
                    ))
        return found
