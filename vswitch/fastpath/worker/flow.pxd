"""Which of several receiveqs a frame goes to: the same one for a whole flow, both ways.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from vswitch.fastpath.shared.ethernet cimport ETHERTYPE_IPV4_LE, ETHERTYPE_IPV6_LE, is_tag
from vswitch.fastpath.shared.frame cimport gather_bytes
from vswitch.fastpath.shared.sizes cimport ETH_HLEN
from vswitch.fastpath.shared.worker cimport Frame, WorkerC
from vswitch.fastpath.sys.atomics cimport vs_get16, vs_get32
from vswitch.fastpath.worker.headers cimport IP_FRAGMENT_LE


cdef inline uint32_t flow_hash(WorkerC *w, const Frame *frame) noexcept nogil:
    """A hash that is equal for both directions of a flow.

    IPv4 and IPv6 addresses and, for TCP and UDP that is not fragmented, ports; MAC addresses for
    everything else.
    """
    cdef char data[64]
    cdef uint32_t have = gather_bytes(w, frame, data, 64), at = ETH_HLEN, h, ihl
    cdef uint16_t ethertype
    cdef uint8_t proto
    if have < ETH_HLEN:
        return 0
    ethertype = vs_get16(data + 12)
    if is_tag(ethertype):
        if have < at + 4:
            return 0
        ethertype = vs_get16(data + 16)
        at += 4
    if ethertype == ETHERTYPE_IPV4_LE and have >= at + 20:
        h = vs_get32(data + at + 12) ^ vs_get32(data + at + 16)
        proto = <uint8_t>data[at + 9]
        ihl = 4 * (<uint32_t>data[at] & 0xF)
        # More fragments or an offset: the ports are not in every piece.
        if (proto == 6 or proto == 17) and not vs_get16(data + at + 6) & IP_FRAGMENT_LE and have >= at + ihl + 4:
            h ^= <uint32_t>(vs_get16(data + at + ihl) ^ vs_get16(data + at + ihl + 2))
        h ^= proto
    elif ethertype == ETHERTYPE_IPV6_LE and have >= at + 40:
        h = (
            vs_get32(data + at + 8) ^ vs_get32(data + at + 12) ^ vs_get32(data + at + 16)
            ^ vs_get32(data + at + 20) ^ vs_get32(data + at + 24) ^ vs_get32(data + at + 28)
            ^ vs_get32(data + at + 32) ^ vs_get32(data + at + 36)
        )
        proto = <uint8_t>data[at + 6]
        if (proto == 6 or proto == 17) and have >= at + 44:
            h ^= <uint32_t>(vs_get16(data + at + 40) ^ vs_get16(data + at + 42))
        h ^= proto
    else:
        h = vs_get32(data + 2) ^ vs_get32(data + 8) ^ vs_get16(data) ^ vs_get16(data + 6)
    # Every bit of the sum reaches the low ones, of which few decide: addresses of one lab differ in
    # a byte that may lie anywhere. (The finalizer of MurmurHash3.)
    h ^= h >> 16
    h *= <uint32_t>0x85EBCA6Bu
    h ^= h >> 13
    h *= <uint32_t>0xC2B2AE35u
    return h ^ (h >> 16)
