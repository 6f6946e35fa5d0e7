"""VIRTIO's numbers and structures (VIRTIO 1.2), and offloads as Linux numbers them."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

# What a frame may leave to its receiver, and a receiver may take. The values are those of TUN_F_*
# in linux/if_tun.h, but for the last.
cdef enum:
    OFFLOAD_CSUM = 0x01
    OFFLOAD_TSO4 = 0x02
    OFFLOAD_TSO6 = 0x04
    OFFLOAD_ECN = 0x08
    OFFLOAD_UFO = 0x10
    OFFLOAD_USO4 = 0x20
    OFFLOAD_USO6 = 0x40
    OFFLOAD_VALID = 0x80   # its checksum was verified already: a hint, nothing is left to do
    OFFLOAD_NEVER = 0x100  # nobody has it: the frame is always finished here ...
    OFFLOAD_NEVER_CSUM = 0x200  # ... and its checksum is not left to the receiver even then

cdef enum:
    VRING_DESC_F_NEXT = 1
    VRING_DESC_F_WRITE = 2
    VRING_DESC_F_INDIRECT = 4
    VRING_AVAIL_F_NO_INTERRUPT = 1
    VRING_USED_F_NO_NOTIFY = 1
    VRING_PACKED_DESC_F_AVAIL = 0x80
    VRING_PACKED_DESC_F_USED = 0x8000
    RING_EVENT_FLAGS_ENABLE = 0
    RING_EVENT_FLAGS_DISABLE = 1
    RING_EVENT_FLAGS_DESC = 2

cdef struct VringDesc:     # VIRTIO 1.2, 2.7.5; private copies of packed descriptors (2.8.13) too
    uint64_t addr
    uint32_t len
    uint16_t flags
    uint16_t next          # the buffer id of a packed descriptor

cdef struct VringUsedElem: # VIRTIO 1.2, 2.7.8
    uint32_t id
    uint32_t len
