
from vswitch.fastpath.main.mapping cimport Memory, SharedFile
from vswitch.fastpath.shared.memory cimport MemTable


cdef class Joined(SharedFile):
    cdef tuple regions        # Mapped, kept for as long as there are other mappings of theirs
    cdef char *host           # the part's first byte
    cdef readonly int pieces  # that it was made of


cdef class RingPlace:
    cdef char *hosts[3]       # first bytes of the ring's parts, in their order
    cdef MemTable *table      # guest-physical addresses of all of them, for the log
    cdef Memory memory
    cdef tuple joined
