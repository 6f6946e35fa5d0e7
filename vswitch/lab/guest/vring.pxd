# What a driver keeps about a virtqueue, whatever its format; ring.pxd has what is done with it.
#
# The device may write the used ring (of a packed ring: the descriptors it was given) and nothing else
# that we rely on: free lists, chain lengths and indices live in private memory, and what the device
# says is held against them.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef enum:
    DESC_F_NEXT = 1
    DESC_F_WRITE = 2
    DESC_F_INDIRECT = 4
    # What reap returns when the device broke a rule; `bad_value` of the ring says more.
    USED_IDX_RAN_AHEAD = -1
    USED_ID_RANGE = -2
    USED_ID_NOT_OUTSTANDING = -3
    USED_OUT_OF_ORDER = -4
    USED_NOTHING_OUTSTANDING = -5


cdef struct Desc:              # VIRTIO 1.2, 2.7.5
    uint64_t addr
    uint32_t len
    uint16_t flags
    uint16_t next


cdef struct PackedDesc:        # VIRTIO 1.2, 2.8.13
    uint64_t addr
    uint32_t len
    uint16_t id
    uint16_t flags


cdef struct Piece:
    # A run of guest memory that one descriptor describes; `ptr` is where we have it mapped.
    uint64_t gpa
    uint8_t *ptr
    uint32_t len


cdef struct Ring:
    uint16_t size
    bint event_idx
    bint in_order
    bint packed
    # Shared with the device.
    Desc *desc                 # split
    PackedDesc *packed_desc    # packed
    uint16_t *avail            # split: flags, idx, ring[size], used_event
                               # packed: driver event suppression: offset and wrap, flags
    uint16_t *used             # split: flags, idx, elem[size], avail_event
                               # packed: device event suppression
    # Ours. An "id" is the head of a split ring's chain, the buffer id of a packed one's.
    uint16_t avail_idx         # chains ever added, modulo 65536
    uint16_t published_idx     # chains ever shown to the device
    uint16_t used_idx          # chains ever reaped
    uint16_t outstanding       # chains the device holds or may take
    uint16_t num_free          # ring entries
    uint16_t free_head         # first free descriptor, or buffer id
    bint calls_wanted
    uint16_t *next             # links of the free list, and of a split ring's chains
    uint16_t *chain_size       # by id: ring entries of the chain; 0 = not outstanding
    uint32_t *token            # by id: the caller's number for the chain
    uint32_t *posted_len       # by id: bytes that the device may write; with IN_ORDER only
    uint32_t bad_value
    # With IN_ORDER the device may use several chains by naming the last of them.
    uint16_t batch_left        # chains of such a batch, or the one chain, still to be reaped
    uint32_t batch_len         # what was written into its last chain
    uint64_t skipped           # chains that were not named, ever
    uint16_t burst             # chains reaped the last time that there were some; for prefetching
    # Split rings only.
    uint16_t kicked_idx        # avail.idx at the last decision about a notification
    uint16_t seen_used_idx     # used.idx as last read
    uint16_t oldest            # head that was added first of those outstanding; with IN_ORDER only
    # Packed rings only.
    uint16_t avail_at          # position and wrap counter of the next entry to make available ...
    uint16_t avail_wrap
    uint16_t used_at           # ... and of the next one that the device will use
    uint16_t used_wrap
    uint16_t first_at          # position of the first chain that is not published ...
    uint16_t first_flags       # ... and the flags that publish it
    uint32_t unpublished       # ring entries added and not published
    uint32_t unkicked          # ring entries published since the last decision about a notification
    uint16_t *id_at            # by position: buffer id of the chain that begins there
