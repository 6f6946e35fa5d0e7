"""The software guest's own view of its memory.

All regions are mapped into one reservation of address space at their guest-physical distances, so
that a guest-physical address becomes a pointer by one addition, and a buffer that runs from one
region into the next one is contiguous here (as it is for a guest's CPU).
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memcpy, memset

from vswitch.lab.guest.errors import GuestError


cdef extern from "sys/mman.h" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int PROT_NONE
    int PROT_READ
    int PROT_WRITE
    int MAP_SHARED
    int MAP_PRIVATE
    int MAP_ANONYMOUS
    int MAP_NORESERVE
    int MAP_FIXED
    void *MAP_FAILED


cdef extern from "barriers.h" nogil:
    uint16_t guest_load_acquire_u16(const uint16_t *p)
    void guest_store_release_u16(uint16_t *p, uint16_t value)
    void guest_fence_full()


cdef class Mapping:
    """Guest memory mapped into this process.

    `regions` are tuples (gpa, size in bytes, file descriptor, offset in the file in bytes); sizes,
    offsets and addresses are multiples of the page size. The file descriptors may be closed
    afterwards. The mapping lives as long as this object does.
    """

    def __cinit__(self, list regions):
        cdef uint64_t gpa, size
        cdef int fd
        cdef long offset
        cdef uint64_t end = 0
        cdef void *where
        if not regions:
            raise ValueError("guest memory needs at least one region")
        ordered = sorted(regions)
        self.lowest_gpa = ordered[0][0]
        self.span_len = max([gpa + size for gpa, size, _, _ in ordered]) - self.lowest_gpa
        self.spans = []
        where = mmap(
            NULL, self.span_len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
        )
        if where == MAP_FAILED:
            raise OSError(errno, f"cannot reserve {self.span_len} bytes of address space")
        self.base = <uint8_t *>where
        for gpa, size, fd, offset in ordered:
            if gpa < end:
                raise ValueError(f"region at gpa {gpa:#x} overlaps the one before it")
            where = mmap(
                self.base + (gpa - self.lowest_gpa), size, PROT_READ | PROT_WRITE,
                MAP_SHARED | MAP_FIXED, fd, offset,
            )
            if where == MAP_FAILED:
                raise OSError(errno, f"cannot map the region at gpa {gpa:#x}")
            if self.spans and gpa == end:
                self.spans.append((self.spans.pop()[0], gpa + size))
            else:
                self.spans.append((gpa, gpa + size))
            end = gpa + size

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.span_len)

    cdef uint8_t *at(self, uint64_t gpa, uint64_t length) except NULL:
        cdef uint64_t first, end
        for first, end in self.spans:
            if first <= gpa < end and length <= end - gpa:
                return self.base + (gpa - self.lowest_gpa)
        raise GuestError(
            f"guest memory has nothing at gpa {gpa:#x}, length {length}",
            hint="use an address that allocate() returned or that lies in a region",
        )

    def move(self, uint64_t gpa, uint64_t length, int fd, long offset):
        """Put another part of a file behind an address; pointers into it see that from now on."""
        if mmap(
            self.at(gpa, length), length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, offset
        ) == MAP_FAILED:
            raise OSError(errno, f"cannot map {length} bytes at gpa {gpa:#x}")

    def read(self, uint64_t gpa, uint64_t length):
        """`length` bytes of guest memory from `gpa`. GuestError outside of the regions."""
        return PyBytes_FromStringAndSize(<char *>self.at(gpa, length), <Py_ssize_t>length)

    def write(self, uint64_t gpa, data not None):
        """Put bytes-like `data` at `gpa`. GuestError outside of the regions."""
        cdef const uint8_t[::1] view = data
        cdef uint64_t length = <uint64_t>view.shape[0]
        if length:
            memcpy(self.at(gpa, length), &view[0], length)

    def fill(self, uint64_t gpa, uint64_t length, uint8_t value):
        """Set `length` bytes from `gpa` to `value`. GuestError outside of the regions."""
        memset(self.at(gpa, length), value, length)

    def load_u16(self, uint64_t gpa):
        """Read a 16-bit ring field with acquire order; what the device wrote before it is seen."""
        return guest_load_acquire_u16(<uint16_t *>self.at(gpa, 2))

    def store_u16(self, uint64_t gpa, uint16_t value):
        """Write a 16-bit ring field with release order, and a full fence after it.

        The fence stands for the one a driver has between publishing avail.idx and reading whether
        the device wants a notification.
        """
        guest_store_release_u16(<uint16_t *>self.at(gpa, 2), value)
        guest_fence_full()
