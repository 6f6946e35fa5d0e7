"""Guest memory, mapped from the file descriptors that a frontend hands over."""

from libc.errno cimport ENOSPC, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

import os
import stat

from vswitch.fastpath.shared.memory cimport MemTable, uva_to_host
from vswitch.fastpath.shared.sizes cimport MAX_REGIONS
from vswitch.fastpath.sys.atomics cimport vs_load32

cdef extern from "sigbus.h" nogil:
    int vs_watch_sigbus()
    int vs_add_region(char *base, size_t len, uint32_t *lost)
    void vs_remove_region(int slot)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int madvise(void *addr, size_t length, int advice)
    int mincore(void *addr, size_t length, unsigned char *vec)
    int PROT_NONE, PROT_READ, PROT_WRITE
    int MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE
    int MADV_DONTDUMP, MADV_DONTNEED
    void *MAP_FAILED

cdef extern from "<sys/vfs.h>" nogil:
    struct statfs_t "statfs":
        long f_type
        long f_bsize
    int fstatfs(int fd, statfs_t *buf)

PAGE = os.sysconf("SC_PAGE_SIZE")
# Magic numbers of linux/magic.h.
TMPFS_MAGIC = 0x01021994
HUGETLBFS_MAGIC = 0x958458F6
# A page of these comes from memory: on others a worker could wait for a disk, a network (NFS) or
# somebody's process (FUSE).
FILESYSTEMS = frozenset({TMPFS_MAGIC, HUGETLBFS_MAGIC})
U64_END = 1 << 64
cdef uint64_t HUGE_PAGE = 2 << 20
cdef uint64_t FORGET_LEN = 16 << 20
SLOTS = MAX_REGIONS  # the most regions at a time


def _size_and_page(what, int fd, kept):
    """Bytes of a memory file, and of what comes together in it.

    `kept` has them as `size` and `block` where somebody else has looked at the file. Raises ValueError
    for a file whose pages somebody may keep back.
    """
    cdef statfs_t told
    if kept is not None:
        return kept.size, kept.block
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(
            f"{what}: its file descriptor is not a file of shared memory "
            f"(file type {stat.S_IFMT(info.st_mode):#o})"
        )
    if fstatfs(fd, &told) < 0:
        raise OSError(errno, os.strerror(errno))
    kind = told.f_type & 0xFFFFFFFF
    if kind not in FILESYSTEMS:
        raise ValueError(
            f"{what}: its file is on a file system of type {kind:#x}, not tmpfs or hugetlbfs: "
            "use memfd, /dev/shm or hugetlbfs"
        )
    return info.st_size, info.st_blksize


def page_size(int fd):
    """Bytes that come to be, or are missing, together in a memory file."""
    cdef statfs_t info
    if fstatfs(fd, &info) < 0:
        raise OSError(errno, os.strerror(errno))
    return info.f_bsize if info.f_type & 0xFFFFFFFF == HUGETLBFS_MAGIC else PAGE


def tells_pages(int fd):
    """Whether Memory.has_page is right about a file.

    Not about one of hugetlbfs, where mincore(2) looks at our page tables alone; and to whom may not
    write a file by its mode, whatever the descriptor is, it says that all of it is there.
    """
    cdef statfs_t info
    if fstatfs(fd, &info) < 0:
        raise OSError(errno, os.strerror(errno))
    if info.f_type & 0xFFFFFFFF != TMPFS_MAGIC:
        return False
    return os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=True)


def _check_region(index, region, fd, earlier, kept):
    """Raise ValueError unless the region can be mapped and addressed without surprises.

    Returns the bytes of a page of its file.
    """
    gpa, size, uva, offset = region
    if size == 0:
        raise ValueError(f"region {index}: size is 0")
    for name, start in (("guest address", gpa), ("user address", uva), ("mmap offset", offset)):
        # Nor may it end there: an address that runs out of it is 0, which is another region's.
        if start + size >= U64_END:
            how = "wraps past" if start + size > U64_END else "reaches"
            raise ValueError(f"region {index}: {name} {start:#x} plus size {size:#x} {how} 2^64")
    for other, (o_gpa, o_size, o_uva, _) in enumerate(earlier):
        if gpa < o_gpa + o_size and o_gpa < gpa + size:
            raise ValueError(f"region {index}: guest address {gpa:#x} overlaps region {other}")
        if uva < o_uva + o_size and o_uva < uva + size:
            raise ValueError(f"region {index}: user address {uva:#x} overlaps region {other}")
    len_file, page = _size_and_page(f"region {index}", fd, kept)
    if offset + size > len_file:
        raise ValueError(
            f"region {index}: mmap offset {offset:#x} plus size {size:#x} is beyond "
            f"the end of its file ({len_file:#x} bytes)"
        )
    return page


def watch_lost_memory():
    """Survive memory files that are truncated; returns an eventfd that is signalled when one was.

    Once a process; the descriptor is never closed. Threads that touch guest memory must not block
    SIGBUS.
    """
    cdef int fd = vs_watch_sigbus()
    if fd < 0:
        raise OSError(errno, os.strerror(errno))
    return fd


cdef class SharedFile:
    """A piece of a file of somebody else's, mapped and watched for its truncation."""

    @property
    def length(self):
        """Bytes that are mapped."""
        return self.map_len

    def forget_pages(self):
        """Take all pages out of our page tables, so that little is left to be done when it is unmapped.

        Whoever touches one has it back, with what is in the file. For any thread: without the GIL, and
        in pieces, between which others may map and unmap.
        """
        cdef uint64_t at = 0, left
        with nogil:
            while at < self.map_len:
                left = self.map_len - at
                madvise(
                    <char *>self.map_base + at, left if left < FORGET_LEN else FORGET_LEN,
                    MADV_DONTNEED,
                )
                at += FORGET_LEN

    cdef char *_map(self, what, int fd, uint64_t page, size, offset) except NULL:
        """Map `size` bytes from `offset` of a file that has pages of `page`; returns the first of them.

        Raises OSError. Unmapped with the object, of which nobody may have a pointer any more. Address
        space that nobody can use lies on both sides: an access that runs out of the mapping, which
        no guest should be able to cause, ends the process and reaches nobody else's memory.
        """
        page = max(PAGE, page)
        # hugetlbfs wants file offset and length in whole huge pages; st_blksize tells their size.
        cdef uint64_t start = offset - offset % page
        cdef uint64_t length = (offset - start + size + page - 1) // page * page
        # Huge pages of other files, too, need addresses that agree with offsets in the file.
        cdef uint64_t align = max(page, HUGE_PAGE) if length >= HUGE_PAGE else page
        cdef void *reserved
        cdef void *base
        with nogil:
            self.guard_len = length + align + 2 * page
            reserved = mmap(
                NULL, self.guard_len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
            )
            if reserved != MAP_FAILED:
                self.guard_base = reserved
                base = <char *>reserved + page
                base = <char *>base + (start - <uint64_t>base) % align
                base = mmap(
                    base, length, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd, <long>start,
                )
        if reserved == MAP_FAILED or base == MAP_FAILED:
            raise OSError(errno, f"{what}: mmap of {size:#x} bytes: {os.strerror(errno)}")
        self.map_base = base
        self.map_len = length
        self._watch(what, <char *>base, length, &self.lost)
        return <char *>base + <uint64_t>(offset - start)

    cdef int _watch(self, what, char *base, uint64_t length, uint32_t *lost) except -1:
        """Have zero pages put over a mapping when its file was truncated, and `lost` set."""
        self.slot = vs_add_region(base, length, lost)
        if self.slot < 0:
            raise OSError(ENOSPC, f"{what}: too many regions are mapped")
        return 0

    def __dealloc__(self):
        if self.map_base != NULL:
            vs_remove_region(self.slot)
        if self.guard_base != NULL:
            munmap(self.guard_base, self.guard_len)


cdef class Mapped(SharedFile):
    """One region in our address space; unmapped when nobody holds it any more."""

    def __cinit__(self, index, region, int fd, earlier, kept):
        page = _check_region(index, region, fd, earlier, kept)
        self.kept = kept
        self.c.gpa, self.c.size, self.c.uva, offset = region
        self.c.host = self._map(f"region {index}", fd, page, region[1], offset)
        # Guest memory is of no use in a core dump of the switch, and is somebody else's secret.
        madvise(self.map_base, self.map_len, MADV_DONTDUMP)
        self.page = page_size(fd)
        self.row = region


cdef class Memory:
    """The mapped regions of one frontend (SET_MEM_TABLE, ADD_MEM_REG).

    `regions` is a list of (guest address, size, user address, mmap offset), sizes and offsets in
    bytes; `fds` holds one file descriptor each, which stay the caller's and may be closed
    afterwards. `kept` has, for each, None or an object that tells `size` and `block` of the file (its
    st_size and st_blksize), and is held until the region is unmapped. Raises ValueError naming the
    region, field and value for what no honest frontend sends, OSError when the kernel refuses to map.

    A Memory never changes: `with_region` and `without_region` make another one, in which what stays
    lies where it lay. A region is unmapped when the last Memory that has it is gone.
    """

    def __cinit__(self, regions=(), fds=(), kept=None):
        self.mapped = []
        self.table = <MemTable *>calloc(1, sizeof(MemTable))
        if self.table == NULL:
            raise MemoryError
        self.table.read = self.table

    def __init__(self, regions=(), fds=(), kept=None):
        if len(regions) != len(fds):
            raise ValueError(f"{len(regions)} regions came with {len(fds)} file descriptors")
        if len(regions) > MAX_REGIONS:
            raise ValueError(f"{len(regions)} regions, the most is {MAX_REGIONS}")
        for region, fd, one in zip(regions, fds, kept or [None] * len(fds)):
            self._map(tuple(region), fd, one)

    @property
    def regions(self):
        return [(<Mapped>one).row for one in self.mapped]

    def with_region(self, region, int fd, kept=None):
        """These regions and one more (ADD_MEM_REG). Raises ValueError and OSError like Memory."""
        cdef Memory other = self._copy()
        if other.table.count == MAX_REGIONS:
            raise ValueError(f"all {MAX_REGIONS} memory slots are in use")
        other._map(tuple(region), fd, kept)
        return other

    def without_region(self, uint64_t gpa, uint64_t size, uint64_t uva):
        """These regions without one (REM_MEM_REG). Raises ValueError when it is none of them."""
        cdef Memory other = Memory()
        cdef Mapped one
        for one in self.mapped:
            if not (one.c.gpa == gpa and one.c.size == size and one.c.uva == uva):
                other._enter(one)
        if other.table.count == self.table.count:
            raise ValueError(
                f"no region with guest address {gpa:#x}, size {size:#x} and user address {uva:#x}"
            )
        return other

    cdef Memory _copy(self):
        cdef Memory other = Memory()
        for one in self.mapped:
            other._enter(one)
        return other

    cdef _enter(self, Mapped one):
        self.table.regions[self.table.count] = one.c
        self.table.count += 1
        self.mapped.append(one)

    cdef _map(self, tuple region, int fd, kept):
        self._enter(Mapped(len(self.mapped), region, fd, self.regions, kept))

    def has_page(self, uint64_t gpa):
        """Whether a page of the guest's has contents, if `tells_pages` of its file; else False.

        mincore(2) looks into the page cache: it brings nothing into being and, other than
        lseek(SEEK_DATA), takes no lock that a frontend holds for as long as it punches a hole.
        """
        cdef Mapped one
        cdef uint64_t host
        cdef unsigned char there = 0
        for one in self.mapped:
            if gpa - one.c.gpa < one.c.size:
                host = <uint64_t>one.c.host + (gpa - one.c.gpa)
                host -= host % <uint64_t>PAGE
                return mincore(<void *>host, PAGE, &there) == 0 and bool(there & 1)
        return False

    def in_one_region(self, uint64_t uva, uint64_t length):
        """Whether all of a range of the frontend's address space lies in one region."""
        return uva_to_host(self.table, uva, length) != NULL

    def parts(self, Memory other=None):
        """The mappings of the regions, without those that another one has as well."""
        return [one for one in self.mapped if other is None or one not in other.mapped]

    @property
    def lost(self):
        """True once memory was found missing: its owner truncated the file. It reads as zero now."""
        return any([vs_load32(&(<Mapped>one).lost) for one in self.mapped])

    def close(self):
        """Give the regions up. No worker may know of this memory any more."""
        self.table.count = 0
        self.mapped = []

    def __dealloc__(self):
        free(self.table)


cdef class DirtyLog(SharedFile):
    """The frontend's bitmap of written pages (SET_LOG_BASE), mapped.

    `size` and `offset` are bytes. The descriptor stays the caller's and may be closed afterwards.
    Raises ValueError for a log that cannot be, OSError when the kernel refuses to map. Unmapped when
    the last ring that logs there is done with it.
    """

    def __cinit__(self, int fd, size, offset, kept=None):
        len_file, page = _size_and_page("the log", fd, kept)
        self.kept = kept
        if size == 0:
            raise ValueError("the log's size is 0")
        if offset + size > len_file:
            raise ValueError(
                f"log offset {offset:#x} plus size {size:#x} is beyond "
                f"the end of its file ({len_file:#x} bytes)"
            )
        self.c.bits = <uint8_t *>self._map("log", fd, page, size, offset)
        self.c.len = size
