from vswitch.fastpath.types cimport MemTable, Region


cdef class Memory:
    cdef MemTable *table
    cdef readonly list regions
    cdef list huge_empty      # a bool a region: in hugetlbfs, and no page of its file exists
    cdef list is_huge
    cdef void _unmap(self, Region *region) noexcept
