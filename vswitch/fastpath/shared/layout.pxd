"""Where the cache lines of shared structures begin, held to by the compiler.

A line that one thread writes at every burst costs whoever reads something else in it a transfer.
"""

from libc.stdint cimport uint32_t

from vswitch.fastpath.shared.port cimport PortC
from vswitch.fastpath.shared.ring cimport RingC

cdef extern from * nogil:
    """
    #define VS_STATIC_ASSERT(truth) _Static_assert(truth, "a field is not in its cache line")
    """
    void VS_STATIC_ASSERT(bint truth)

cdef enum:
    LINE = 64              # bytes; both structures are allocated at a multiple of it


cdef inline void check_layout() noexcept nogil:
    """Nothing at run time."""
    # A ring: what every thread reads, then what its worker writes, all of a burst's in one line.
    VS_STATIC_ASSERT(<size_t>&(<RingC *>NULL).lock == 2 * LINE)
    VS_STATIC_ASSERT(<size_t>&(<RingC *>NULL).debt + sizeof(uint32_t) <= 3 * LINE)
    # A port: what is looked at for each frame in one line, and what limits write in others.
    VS_STATIC_ASSERT(<size_t>&(<PortC *>NULL).max_len < LINE)
    VS_STATIC_ASSERT(<size_t>&(<PortC *>NULL).ingress < LINE)
    VS_STATIC_ASSERT(<size_t>&(<PortC *>NULL).storm_full_ns >= LINE)
