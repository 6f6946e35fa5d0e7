"""What workers count and tell by numbers, which words.pyx has in words: one row a number."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

# Why a frame went no further. words.pyx has a row for each.
cdef enum:
    DROP_RUNT
    DROP_OVERSIZE
    DROP_BAD_SOURCE
    DROP_DISABLED
    DROP_SAME_PORT
    DROP_NO_DESTINATION
    DROP_EGRESS_DOWN
    DROP_RING_FAULT
    DROP_NO_BUFFER
    DROP_BUFFER_SMALL
    DROP_EGRESS_MTU
    DROP_TAP_BUSY
    DROP_TAP_DOWN
    DROP_TAP_ERROR
    DROP_LINK_DOWN
    DROP_OFFLOAD_UNNEGOTIATED
    DROP_BAD_CSUM
    DROP_BAD_GSO
    DROP_STORM_BROADCAST  # the three in the order of StormKind
    DROP_STORM_MULTICAST
    DROP_STORM_UNKNOWN
    DROP_IOTLB_MISS
    DROP_PAGE_MISSING
    DROP_BUFFER_PIECES
    N_DROPS

# What is wrong with a ring. words.pyx has a row for each.
cdef enum Fault:
    FAULT_NONE
    FAULT_AVAIL_IDX        # value: avail.idx, detail: last avail index seen
    FAULT_HEAD             # value: descriptor index in the avail ring
    FAULT_NEXT             # value: next
    FAULT_CHAIN_LEN        # value: descriptors walked
    FAULT_ADDRESS          # value: gpa, detail: len
    FAULT_DIRECTION        # value: flags
    FAULT_INDIRECT_LEN     # value: len of the table
    FAULT_INDIRECT_NESTED  # value: flags
    FAULT_INDIRECT_UNOFFERED
    FAULT_EMPTY_BUFFER     # a receiveq chain with no room, which would be taken for ever
    FAULT_SHORT_BUFFER     # value: bytes of a receiveq chain, detail: of the virtio_net_hdr
    FAULT_PERMISSION       # value: IOVA; the IOTLB has it without the permission that is needed
    FAULT_IOTLB_MISS       # value: IOVA, detail: serial of the table without it, shifted by one; below
                           # that whether it was to be read, whatever else the ring does. No fault:
                           # the ring waits until there is another table
    N_FAULTS

# One a worker and port; written by that worker only. Engine.stats has them by these names, so that
# nothing but numbers of this size may be here.
cdef struct Counters:
    uint64_t ingress_frames
    uint64_t ingress_bytes
    uint64_t egress_frames
    uint64_t egress_bytes
    uint64_t held_until    # nothing is delivered to the port before this loop of the worker
    uint64_t kicks
    uint64_t calls
    uint64_t stalls
    uint64_t macs_refused  # times that an address was not learned for want of room
    uint64_t drops[N_DROPS]

# What a worker tells the main thread. words.pyx has a row for each.
cdef enum EventKind:
    EVENT_MAC_LEARNED
    EVENT_MAC_MOVED
    EVENT_RING_FAULT
    EVENT_TAP_LOST
    EVENT_MAC_LIMIT
    EVENT_IOTLB_MISS
    EVENT_FDB_GROWS
    N_EVENTS

cdef struct EventC:
    uint64_t key           # MAC and VLAN
    uint32_t kind
    uint16_t port
    uint16_t other         # old port of a move, vring index of a fault or miss
