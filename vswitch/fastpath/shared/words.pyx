"""What words.pxd counts by numbers, in words: one row a number, checked when this is imported."""

from vswitch.fastpath.shared.port cimport N_STORM, STORM_BROADCAST, STORM_MULTICAST, STORM_UNKNOWN
from vswitch.fastpath.shared.sizes cimport MAX_MTU, MAX_QUEUE_PAIRS, MAX_RING_SIZE, MAX_WORKERS


def rows(count, *table):
    """The rows of a table without their numbers, which are their places; `count` of them."""
    if [number for number, *_ in table] != list(range(count)):
        raise ImportError(f"a row is missing, or not in the place of its number: {table}")
    return tuple([words[0] if len(words) == 1 else tuple(words) for _, *words in table])


# A Drop: its name, and what it means.
DROP_REASONS = rows(
    N_DROPS,
    (DROP_RUNT, "runt", "shorter than an Ethernet header (14 bytes)"),
    (DROP_OVERSIZE, "oversize", "longer than the port's MTU allows"),
    (DROP_BAD_SOURCE, "bad-source", "source address is a group address or all zeros"),
    (DROP_DISABLED, "disabled", "the guest's queue is disabled"),
    (DROP_SAME_PORT, "same-port", "destination is behind the port it came from"),
    (DROP_NO_DESTINATION, "no-destination", "nobody else is there to take it"),
    (DROP_EGRESS_DOWN, "egress-down", "the destination's port has no running receive queue"),
    (DROP_RING_FAULT, "ring-fault", "the receiving guest's ring is broken"),
    (DROP_NO_BUFFER, "no-buffer", "the receiving guest had no receive buffer posted"),
    (DROP_BUFFER_SMALL, "buffer-small", "the receiving guest's buffer is too small and not mergeable"),
    (DROP_EGRESS_MTU, "egress-mtu", "longer than the egress port's MTU allows"),
    (DROP_TAP_BUSY, "tap-busy", "the TAP's queue is full"),
    (DROP_TAP_DOWN, "tap-down", "the TAP interface is down"),
    (DROP_TAP_ERROR, "tap-error", "the kernel refused the frame"),
    (DROP_LINK_DOWN, "link-down", "the link of the port it came from was set down"),
    (DROP_OFFLOAD_UNNEGOTIATED, "offload-unnegotiated", "asks for an offload that was not negotiated"),
    (
        DROP_BAD_CSUM, "bad-csum",
        "the checksum to be filled in is not in the frame, or not where its kind has it",
    ),
    (
        DROP_BAD_GSO, "bad-gso",
        "is to be segmented and is no such frame, or gso_size makes no sense",
    ),
    (
        DROP_STORM_BROADCAST, "storm-broadcast",
        "more broadcast frames a second than the port may send",
    ),
    (
        DROP_STORM_MULTICAST, "storm-multicast",
        "more multicast frames a second than the port may send",
    ),
    (
        DROP_STORM_UNKNOWN, "storm-unknown",
        "more frames a second to unknown addresses than the port may send",
    ),
    (
        DROP_IOTLB_MISS, "iotlb-miss",
        "the receiving guest's frontend has not yet told where its buffer lies",
    ),
    (
        DROP_PAGE_MISSING, "page-missing",
        "the receiving guest is in postcopy migration and its buffer has not yet come",
    ),
    (
        DROP_BUFFER_PIECES, "buffer-pieces",
        "the receiving guest's buffers are in so many pieces that it sits out some turns",
    ),
)

# A StormKind. What limits it is storm_ and this, what is counted storm- and this.
STORM_KINDS = rows(
    N_STORM,
    (STORM_BROADCAST, "broadcast"),
    (STORM_MULTICAST, "multicast"),
    (STORM_UNKNOWN, "unknown"),
)

# A Fault: its name, and a text for value and detail.
RING_FAULTS = rows(
    N_FAULTS,
    (FAULT_NONE, "", ""),
    (FAULT_AVAIL_IDX, "avail-index", "avail index {0} is more than the ring's size ahead of {1}"),
    (FAULT_HEAD, "bad-head", "the avail ring names descriptor {0}, the ring has {1}"),
    (FAULT_NEXT, "bad-next", "a descriptor's next is {0}, its table has {1} entries"),
    (
        FAULT_CHAIN_LEN, "chain-too-long",
        "a chain of {0} or more descriptors, its table has {1} entries",
    ),
    (
        FAULT_ADDRESS, "bad-address",
        "buffer address {0:#x}, length {1}, is outside the guest memory",
    ),
    (
        FAULT_DIRECTION, "bad-direction",
        "descriptor {1} has flags {0:#x}: wrong direction for this queue",
    ),
    (
        FAULT_INDIRECT_LEN, "indirect-length",
        "descriptor {1} points to an indirect table of {0} bytes",
    ),
    (
        FAULT_INDIRECT_NESTED, "indirect-nested",
        "descriptor {1} has flags {0:#x}: an indirect table inside a chain",
    ),
    (
        FAULT_INDIRECT_UNOFFERED, "indirect-unoffered",
        "descriptor {1} has flags {0:#x}: indirect without negotiation",
    ),
    (
        FAULT_EMPTY_BUFFER, "empty-buffer",
        "the receive chain at descriptor {0} has no room at all",
    ),
    (
        FAULT_SHORT_BUFFER, "short-buffer",
        "a receive buffer has {0} bytes, and each must hold the virtio-net header's {1}",
    ),
    (
        FAULT_PERMISSION, "iommu-permission",
        "the IOMMU does not let the device have I/O virtual address {0:#x} this way",
    ),
    # Waits for its frontend to translate an address, which is no fault.
    (FAULT_IOTLB_MISS, "", ""),
)

# An EventKind.
EVENT_NAMES = rows(
    N_EVENTS,
    (EVENT_MAC_LEARNED, "mac-learned"),
    (EVENT_MAC_MOVED, "mac-moved"),
    (EVENT_RING_FAULT, "ring-fault"),
    (EVENT_TAP_LOST, "tap-lost"),
    (EVENT_MAC_LIMIT, "mac-limit"),
    (EVENT_IOTLB_MISS, "iotlb-miss"),
    (EVENT_FDB_GROWS, "fdb-grows"),
)

# What vswitch/bounds.py has for those who know nothing of the fast path.
BOUNDS = {
    "MTU_MAX": MAX_MTU,
    "QUEUE_PAIRS_MAX": MAX_QUEUE_PAIRS,
    "RING_SIZE_MAX": MAX_RING_SIZE,
    "WORKERS_MAX": MAX_WORKERS,
}
