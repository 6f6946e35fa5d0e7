"""Storm control: how many frames a second of a kind a port may have flooded.

A token bucket of `burst` frames a kind, kept as the time at which it would be full again (GCRA): one
number, so that several workers share it without a lock.
"""

from libc.stdint cimport uint64_t

from vswitch.fastpath.shared.ethernet cimport VS_MAC_MASK
from vswitch.fastpath.shared.port cimport STORM_BROADCAST, STORM_MULTICAST, STORM_UNKNOWN, PortC
from vswitch.fastpath.shared.words cimport DROP_STORM_BROADCAST, Counters
from vswitch.fastpath.sys.atomics cimport vs_cas64, vs_get64, vs_load64, vs_now_ns


cdef inline bint storm_allows(PortC *port, int kind) noexcept nogil:
    """Take a token for a frame of a StormKind; False when there is none."""
    cdef uint64_t period = vs_load64(&port.storm_period_ns[kind])
    cdef uint64_t now, full, start
    if period == 0:
        return True  # this kind is not limited
    now = vs_now_ns()
    while True:
        full = vs_load64(&port.storm_full_ns[kind])
        start = full if full > now else now
        # Full again in `burst` periods means empty now.
        if start - now > vs_load64(&port.storm_burst_ns[kind]) - period:
            return False
        if vs_cas64(&port.storm_full_ns[kind], full, start + period):
            return True


cdef inline bint storm_stage(PortC *port, const char *head, Counters *counters) noexcept nogil:
    """Whether a frame of a port with INGRESS_STORM may be flooded, by its address; it is counted if not."""
    cdef uint64_t dst = vs_get64(head) & VS_MAC_MASK
    cdef int kind = STORM_UNKNOWN
    if dst & 1:
        kind = STORM_BROADCAST if dst == VS_MAC_MASK else STORM_MULTICAST
    if storm_allows(port, kind):
        return True
    counters.drops[DROP_STORM_BROADCAST + kind] += 1
    return False
