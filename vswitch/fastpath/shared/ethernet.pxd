"""Ethernet: what the header says, as it is loaded on a little-endian machine.
"""

from libc.stdint cimport uint8_t, uint16_t, uint64_t


cdef extern from * nogil:
    """
    #define VS_MAC_MASK 0xFFFFFFFFFFFFULL
    #if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "vswitch supports little-endian machines only"
    #endif
    """
    const uint64_t VS_MAC_MASK


cdef enum:
    ETHERTYPE_VLAN_LE = 0x0081      # 0x8100
    ETHERTYPE_QINQ_LE = 0xA888      # 0x88a8
    ETHERTYPE_IPV4_LE = 0x0008
    ETHERTYPE_IPV6_LE = 0xDD86


cdef inline bint is_tag(uint16_t ethertype) noexcept nogil:
    """Whether a VLAN tag follows: what Linux takes for one, which 0x9100 is not."""
    return ethertype == ETHERTYPE_VLAN_LE or ethertype == ETHERTYPE_QINQ_LE


cdef inline uint64_t vlan_bits(const char *head) noexcept nogil:
    """The part of a key that tells the VLAN, from the first 18 bytes of a tagged frame."""
    return <uint64_t>((<uint8_t>head[14] & 0xF) << 8 | <uint8_t>head[15]) << 48
