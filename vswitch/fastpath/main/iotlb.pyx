"""The IOTLB of a port behind a virtual IOMMU: I/O virtual addresses to host pointers.

Filled and emptied by the frontend's messages, on the main thread. Workers see immutable tables of
it, in the shape of the memory table, and look nothing else up.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memmove

from vswitch.fastpath.main.mapping cimport Memory
from vswitch.fastpath.shared.memory cimport MemTable, Region, uva_to_host
from vswitch.fastpath.shared.sizes cimport MAX_REGIONS

cdef enum:
    C_READ = 1
    C_WRITE = 2
    C_ENTRIES = 4096
    FIRST_ROOM = 64

ACCESS_READ = C_READ
ACCESS_WRITE = C_WRITE
ENTRIES = C_ENTRIES
"""The most mappings a port's IOTLB holds. A chain of 1023 descriptors in as many pages fits
several times, so a ring gets on however small its mappings are."""

cdef uint64_t U64_LAST = <uint64_t>-1
cdef uint64_t serials = 0


cdef class IotlbTables:
    """What workers translate by. Whoever gave one to a ring keeps it until quiescence."""

    def __dealloc__(self):
        if self.write != self.read:
            free(self.write)
        if self.known != self.read:
            free(self.known)
        free(self.read)

    cdef MemTable *for_ring(self, bint writing) noexcept:
        return self.write if writing else self.read


cdef class Iotlb:
    """Mappings of I/O virtual addresses, at most ENTRIES, into `memory`.

    Addresses and sizes are bytes, `access` is ACCESS_READ | ACCESS_WRITE. Nothing has to be aligned.
    With `physical`, addresses are guest-physical, and mappings say which parts of the memory are there.
    """

    def __cinit__(self, Memory memory not None, bint physical=False):
        self.memory = memory
        self.physical = physical

    def __dealloc__(self):
        free(self.entries)

    def __len__(self):
        return self.count

    def update(self, uint64_t iova, uint64_t size, uint64_t uva, uint32_t access):
        """Map a range, in place of what it overlaps. `access` 0: it may not be touched.

        Raises ValueError, and then nothing has changed, for a range that is empty, wraps past 2^64
        or does not lie in one region of the memory.
        """
        cdef Entry entry
        cdef char *host
        if size == 0:
            raise ValueError("size is 0")
        for name, start in (("iova", iova), ("user address", uva)):
            if size - 1 > U64_LAST - <uint64_t>start:
                raise ValueError(f"{name} {start:#x} plus size {size:#x} wraps past 2^64")
        host = uva_to_host(self.memory.table, uva, size)
        if host == NULL:
            raise ValueError(
                f"user address {uva:#x} with size {size:#x} is in no region of the memory table"
            )
        entry.iova = iova
        entry.last = iova + (size - 1)
        entry.uva = uva
        entry.host = host
        entry.access = access
        self._cut(entry.iova, entry.last)
        self._insert(entry)

    def deny(self, uint64_t iova):
        """Note that nothing is mapped at this one address: the frontend was asked."""
        cdef Entry entry
        entry.iova = entry.last = iova
        entry.uva = 0
        entry.host = NULL
        entry.access = 0
        self._cut(iova, iova)
        self._insert(entry)

    def forget_denials(self):
        """Ask the frontend again for what it did not know."""
        cdef uint32_t i = 0
        while i < self.count:
            if self.entries[i].access == 0:
                self._remove(i)
            else:
                i += 1

    def invalidate(self, uint64_t iova, uint64_t size):
        """Forget a range. Size 0 stands for 2^64, as for QEMU; a sum beyond that ends there."""
        cdef uint64_t last = U64_LAST
        if size and size - 1 < U64_LAST - iova:
            last = iova + (size - 1)
        self._cut(iova if size else 0, last)

    def clear(self):
        self.count = 0
        self.made = None

    def use_memory(self, Memory memory not None):
        """Go on with another memory table; mappings to what is not in it any more are forgotten."""
        cdef Entry *entry
        cdef uint32_t i = 0
        self.memory = memory
        self.made = None
        while i < self.count:
            entry = &self.entries[i]
            if entry.access:
                entry.host = uva_to_host(memory.table, entry.uva, entry.last - entry.iova + 1)
                if entry.host == NULL:
                    self._remove(i)
                    continue
            i += 1

    def find(self, uint64_t iova):
        """(access, user address, bytes from there to the mapping's end), or None if not known."""
        cdef uint32_t at = self._first(iova)
        cdef Entry *entry
        if at == self.count or self.entries[at].iova > iova:
            return None
        entry = &self.entries[at]
        return entry.access, entry.uva + (iova - entry.iova), <object>(entry.last - iova) + 1

    def tables(self):
        """The present mappings as workers see them."""
        global serials
        cdef IotlbTables made = self.made
        cdef uint32_t i, everywhere = C_READ | C_WRITE
        if made is not None:
            return made
        made = IotlbTables()
        made.memory = self.memory
        # Never again the same, whatever table takes this one's place in memory: a waiting ring tells
        # by it that something has changed. 0 is for none.
        serials += 1
        for i in range(self.count):
            everywhere &= self.entries[i].access
        made.read = self._table(C_READ, C_READ, serials)
        if everywhere == C_READ | C_WRITE:
            made.write = made.known = made.read
        else:
            made.write = self._table(C_WRITE, C_WRITE, serials)
            made.known = self._table(0, 0, serials)
        made.read.read = made.write.read = made.read
        made.read.known = made.write.known = made.known
        self.made = made
        return made

    cdef MemTable *_table(self, uint32_t wanted, uint32_t mask, uint64_t serial) except NULL:
        """The entries with the wanted permissions; neighbours that go on in our memory are joined."""
        # At least as long as any table before it: rings keep an index into those as their hint.
        cdef size_t extra = self.widest - MAX_REGIONS if self.widest > MAX_REGIONS else 0
        cdef MemTable *table = <MemTable *>calloc(1, sizeof(MemTable) + extra * sizeof(Region))
        cdef Region *region = NULL
        cdef Entry *entry
        cdef uint32_t i
        if table == NULL:
            raise MemoryError
        table.is_sorted = True
        table.physical = self.physical
        table.serial = serial
        for i in range(self.count):
            entry = &self.entries[i]
            if entry.access & mask != wanted:
                continue
            if (
                region != NULL and entry.access and region.gpa + region.size == entry.iova
                and region.host + region.size == entry.host
            ):
                region.size += entry.last - entry.iova + 1
                continue
            region = &table.regions[table.count]
            region.gpa = entry.iova
            region.size = entry.last - entry.iova + 1
            region.uva = entry.uva
            region.host = entry.host
            table.count += 1
        return table

    cdef uint32_t _first(self, uint64_t address) noexcept:
        """The first entry that does not end before an address."""
        cdef uint32_t low = 0, high = self.count, i
        while low < high:
            i = (low + high) >> 1
            if self.entries[i].last < address:
                low = i + 1
            else:
                high = i
        return low

    cdef int _cut(self, uint64_t iova, uint64_t last) except -1:
        """Take a range away; entries that reach beyond it keep what is outside."""
        cdef uint32_t at = self._first(iova)
        cdef Entry rest
        cdef Entry *entry
        self.made = None
        while at < self.count and self.entries[at].iova <= last:
            entry = &self.entries[at]
            rest = entry[0]
            if entry.iova < iova:
                entry.last = iova - 1
                at += 1
            else:
                self._remove(at)
            if rest.last > last:
                rest.uva += last + 1 - rest.iova
                if rest.host != NULL:
                    rest.host += last + 1 - rest.iova
                rest.iova = last + 1
                self._insert(rest)
                break
        return 0

    cdef int _insert(self, Entry entry) except -1:
        """Put an entry where it belongs; nothing overlaps it. The oldest goes if there is no room."""
        cdef uint32_t at, i, oldest = 0
        cdef Entry *grown
        if self.count == C_ENTRIES:
            for i in range(self.count):
                if self.entries[i].stamp < self.entries[oldest].stamp:
                    oldest = i
            self._remove(oldest)
        if self.count == self.room:
            i = self.room * 2 if self.room else FIRST_ROOM
            grown = <Entry *>realloc(self.entries, i * sizeof(Entry))
            if grown == NULL:
                raise MemoryError
            self.entries = grown
            self.room = i
        self.stamp += 1
        entry.stamp = self.stamp
        at = self._first(entry.iova)
        memmove(&self.entries[at + 1], &self.entries[at], (self.count - at) * sizeof(Entry))
        self.entries[at] = entry
        self.count += 1
        self.made = None
        if self.count > self.widest:
            self.widest = self.count
        return 0

    cdef void _remove(self, uint32_t at) noexcept:
        self.count -= 1
        self.made = None
        memmove(&self.entries[at], &self.entries[at + 1], (self.count - at) * sizeof(Entry))
