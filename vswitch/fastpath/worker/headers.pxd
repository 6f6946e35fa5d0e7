"""The headers that a virtio_net_hdr is about, found in the frame's bytes.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from vswitch.fastpath.shared.ethernet cimport ETHERTYPE_IPV4_LE, ETHERTYPE_IPV6_LE, is_tag
from vswitch.fastpath.shared.sizes cimport ETH_HLEN
from vswitch.fastpath.sys.atomics cimport vs_get16


# struct virtio_net_hdr: flags, gso_type, then four little-endian numbers.
cdef enum:
    HDR_FLAGS = 0
    HDR_GSO_TYPE = 1
    HDR_HDR_LEN = 2
    HDR_GSO_SIZE = 4
    HDR_CSUM_START = 6
    HDR_CSUM_OFFSET = 8
    HDR_LEN = 10
    F_NEEDS_CSUM = 1
    F_DATA_VALID = 2
    GSO_TCPV4 = 1
    GSO_UDP = 3
    GSO_TCPV6 = 4
    GSO_UDP_L4 = 5
    GSO_ECN = 0x80

cdef enum:
    IP_FRAGMENT_LE = 0xFF3F  # "more fragments" and the offset, as loaded on a little-endian machine

cdef struct Headers:       # offsets from the first byte of the frame
    uint32_t l3
    uint32_t l4
    uint32_t len           # of all headers: where the payload begins
    uint32_t next_at       # IPv6: the byte that says which header stands at l4
    uint8_t version        # 4 or 6
    uint8_t proto          # 6 or 17


cdef inline uint16_t swap16(uint32_t value) noexcept nogil:
    return <uint16_t>((value & 0xFF) << 8 | (value >> 8 & 0xFF))


cdef inline void put16(char *to, uint32_t value) noexcept nogil:
    cdef uint16_t v = <uint16_t>value
    memcpy(to, &v, 2)


cdef inline bint find_headers(
    const char *data, uint32_t have, uint8_t gso, Headers *found
) noexcept nogil:
    """Find the headers that a gso_type (without GSO_ECN) claims a frame has.

    `have` counts the bytes of the frame in `data`, HEADERS_MAX at most. VLAN tags and IPv6
    extension headers are passed over. False when the frame is something else, or is a fragment.
    """
    cdef uint32_t at = ETH_HLEN, length
    cdef uint16_t ethertype
    cdef uint8_t proto
    if have < at:
        return False
    ethertype = vs_get16(data + 12)
    while is_tag(ethertype):
        if have < at + 4:
            return False
        ethertype = vs_get16(data + at + 2)
        at += 4
    found.l3 = at
    if ethertype == ETHERTYPE_IPV4_LE:
        if have < at + 20 or <uint8_t>data[at] >> 4 != 4:
            return False
        length = 4 * (<uint32_t>data[at] & 0xF)
        if length < 20 or vs_get16(data + at + 6) & IP_FRAGMENT_LE:
            return False
        found.version = 4
        found.next_at = at + 9
        proto = <uint8_t>data[at + 9]
        at += length
    elif ethertype == ETHERTYPE_IPV6_LE:
        if have < at + 40 or <uint8_t>data[at] >> 4 != 6:
            return False
        found.version = 6
        found.next_at = at + 6
        proto = <uint8_t>data[at + 6]
        at += 40
        while proto == 0 or proto == 43 or proto == 60:  # hop-by-hop, routing, destination options
            if have < at + 8:
                return False
            found.next_at = at
            proto = <uint8_t>data[at]
            at += 8 * (<uint32_t><uint8_t>data[at + 1] + 1)
    else:
        return False
    found.l4 = at
    found.proto = proto
    if proto == 6:
        if have < at + 20:
            return False
        length = <uint32_t>(<uint8_t>data[at + 12] >> 4) * 4
        if length < 20:
            return False
    elif proto == 17:
        length = 8
    else:
        return False
    found.len = at + length
    if have < found.len:
        return False
    if gso == GSO_TCPV4:
        return proto == 6 and found.version == 4
    if gso == GSO_TCPV6:
        return proto == 6 and found.version == 6
    return proto == 17
