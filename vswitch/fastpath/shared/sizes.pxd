"""How much there may be of what the fast path has room for."""

cdef enum:
    MAX_PORTS = 4096       # as many numbers as an entry of the FDB has room for
    MAX_WORKERS = 64
    MAX_QUEUE_PAIRS = 128
    MAX_RING_SIZE = 32768  # entries (VIRTIO 1.2, 2.7 and 2.8.10.1)
    BURST = 64             # frames taken from one ring before the next ring has its turn, and
                           # copies that a turn may cost without others being waited for; a power of two
    MAX_CHAIN = 1023       # descriptors in a chain; vhost-net's limit, and fits IOV_MAX with a header
    SEG_POOL = 4096        # segments of a burst beyond the first of each frame
    MAX_REGIONS = 64       # memory regions of a port
    ETH_HLEN = 14
    VLAN_HLEN = 4
    MAX_MTU = 65535
    MAX_FRAME_LEN = MAX_MTU + ETH_HLEN + 2 * VLAN_HLEN
    MAX_WIRE_LEN = MAX_MTU + ETH_HLEN + VLAN_HLEN  # as an MTU counts it: without the second tag
    VNET_HDR_MAX = 12
    EVENT_SLOTS = 1024     # events a worker can have waiting for the main thread
    EVENT_RESERVE = 64     # ... of which so many are for faults only
    USED_BATCH = 1024      # used descriptors of a packed ring written in one go; a frame's go together
    LINEAR_LEN = 65664     # MAX_FRAME_LEN, rounded up to a cache line
    FINISH_BATCH = 32      # segments that are made before they are delivered
    TAP_SHORT_LEN = 256    # frames with their header up to this are written to a TAP in one piece
    TAP_IOVECS = 2048      # pieces of longer ones that are written together; above MAX_CHAIN
    VARIANTS = BURST       # frames of a burst that leave somewhere with another head than they came with
    VARIANT_SEGS = VARIANTS + MAX_CHAIN  # what is left of them; of any single one it has room
    HEAD_LEN = 12          # the addresses, bytes
    HEADERS_MAX = 512      # Ethernet, IP and TCP or UDP headers of a frame to be segmented, bytes
