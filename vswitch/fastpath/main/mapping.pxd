from libc.stdint cimport uint32_t, uint64_t

from vswitch.fastpath.shared.memory cimport MemTable, Region
from vswitch.fastpath.shared.ring cimport LogC


cdef class SharedFile:
    cdef void *guard_base     # what munmap() gets: the mapping, and address space around it
    cdef uint64_t guard_len
    cdef void *map_base
    cdef uint64_t map_len
    cdef uint32_t lost        # atomic; its file was truncated under us
    cdef int slot             # in the table of sigbus.h
    cdef object kept          # whatever keeps our mapping from being the last use of the file
    cdef char *_map(self, what, int fd, uint64_t page, size, offset) except NULL
    cdef int _watch(self, what, char *base, uint64_t length, uint32_t *lost) except -1


cdef class Mapped(SharedFile):
    cdef Region c
    cdef uint64_t page        # bytes of the smallest piece that can be mapped by itself
    cdef tuple row            # guest address, size, user address, mmap offset


cdef class Memory:
    cdef MemTable *table
    cdef list mapped          # Mapped, in the table's order
    cdef Memory _copy(self)
    cdef _enter(self, Mapped one)
    cdef _map(self, tuple region, int fd, kept)


cdef class DirtyLog(SharedFile):
    cdef LogC c
