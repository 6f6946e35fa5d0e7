"""The structures that the main thread and the workers share, and who may touch what.

"Main" is the thread that runs the event loop. Fields marked *main* change only while no worker can
see the structure (before it is published, or after every worker has passed a quiescent point).
Fields marked *worker* belong to the worker that owns the ring, or to whoever holds `lock`. Fields
marked *atomic* may be read by anyone at any time through atomics.h.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from vswitch.fastpath.shared.turns cimport Turns
from vswitch.fastpath.sys.notify cimport vs_notifier
from vswitch.fastpath.sys.uring cimport VS_URING_SLOTS, iovec, vs_uring

cdef enum:
    MAX_PORTS = 1024
    MAX_WORKERS = 64
    MAX_QUEUE_PAIRS = 128
    MAX_RING_SIZE = 32768  # entries (VIRTIO 1.2, 2.7 and 2.8.10.1)
    BURST = 64             # frames taken from one ring before the next ring has its turn, and
                           # copies that a turn may cost without others being waited for
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
    LAST_NONE = 0xFFFF
    USED_BATCH = 1024      # used descriptors of a packed ring written in one go; a frame's go together
    LINEAR_LEN = 65664     # MAX_FRAME_LEN, rounded up to a cache line
    FINISH_BATCH = 32      # segments that are made before they are delivered
    TAP_SHORT_LEN = 256    # frames with their header up to this are written to a TAP in one piece
    TAP_IOVECS = 2048      # pieces of longer ones that are written together; above MAX_CHAIN
    VARIANTS = BURST       # frames of a burst that leave somewhere with another head than they came with
    VARIANT_SEGS = VARIANTS + MAX_CHAIN  # what is left of them; of any single one it has room
    HEAD_LEN = 12          # the addresses, bytes
    HEADERS_MAX = 512      # Ethernet, IP and TCP or UDP headers of a frame to be segmented, bytes

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

cdef struct Region:
    uint64_t gpa           # guest physical address of the first byte, behind an IOMMU its IOVA
    uint64_t size          # bytes
    uint64_t uva           # the same byte in the frontend's address space
    char *host             # the same byte in ours

cdef struct MemTable:      # main; immutable once made
    uint32_t count
    uint16_t is_sorted     # by address, as those of an IOTLB are
    uint16_t physical      # of an IOTLB: its addresses are guest-physical, and pages may be missing
    uint64_t serial        # of an IOTLB's tables: another one for every change
    MemTable *read         # for what the device reads, where this one is for what it writes
    MemTable *known        # of an IOTLB: all there is in it, readable or writable or neither
    Region regions[MAX_REGIONS]  # or more: as many as were allocated

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

# What storm control tells apart.
cdef enum StormKind:
    STORM_BROADCAST
    STORM_MULTICAST
    STORM_UNKNOWN          # unicast to an address that is not known
    N_STORM

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

# What frames from a port pass besides being forwarded: nothing for most ports.
cdef enum IngressStage:
    INGRESS_STORM = 0x01   # storm.pxd: some kind of frame is limited

cdef enum PortKind:
    KIND_VHOST
    KIND_TAP

cdef struct PortC:
    uint16_t id            # main
    uint8_t kind           # main
    uint8_t link_down      # atomic; switched off by the user
    uint32_t max_len       # atomic; longest Ethernet frame without FCS and second VLAN tag, bytes
    int tap_fd             # main
    uint32_t offloads      # main; OFFLOAD_* that a TAP takes and may ask for, 0 for guests
    uint32_t tap_lost      # atomic; the interface was deleted under us
    uint8_t mac_limit_told # atomic; main heard that addresses are refused
    uint8_t ingress        # atomic; INGRESS_*, looked at for each burst
    # A token bucket a kind, see storm.pxd.
    uint64_t storm_period_ns[N_STORM]  # atomic; time that a frame takes up, 0: not limited
    uint64_t storm_burst_ns[N_STORM]   # atomic; ... and that the bucket holds
    uint64_t storm_full_ns[N_STORM]    # atomic; when the bucket is full again

cdef struct UsedChain:     # what giving a chain of a packed ring back takes
    uint16_t id
    uint16_t count         # ring entries
    uint32_t len           # bytes written into it

cdef struct Cursor:        # a place among what a ring's driver has offered
    uint16_t position      # of a split ring: an avail index
    uint8_t wrap

cdef struct JournalBatch:  # chains of a packed ring that are being used, in their order
    uint16_t n             # how many
    uint16_t position      # ring entry and wrap counter of the first
    uint8_t wrap
    uint8_t last_wrap
    uint16_t last          # ring entry of the used descriptor before them, LAST_NONE: there is none
    UsedChain chains[USED_BATCH]

cdef struct JournalC:      # of one ring; outlives the process, see journal.pyx
    uint64_t identity      # main; of the ring this is about
    uint32_t taken         # split transmitq: chains before this avail index were taken; above it,
                           # in the high half, the used index from before they are given back
    uint16_t current       # which of the two batches counts
    uint16_t told          # packed: position and wrap counter that the frontend told
    JournalBatch batches[2]

cdef struct LogC:          # main; immutable once made
    uint8_t *bits          # one a page of 4096 bytes
    uint64_t len           # bytes of it

cdef struct RingC:
    # main
    VringDesc *desc
    uint16_t *avail        # flags, idx, ring[size], used_event; packed: driver event suppression
    uint16_t *used_hdr     # flags, idx; packed: device event suppression
    VringUsedElem *used    # ring[size], avail_event
    uint16_t *used_event
    uint16_t *avail_event
    MemTable *mem          # atomic; what buffer addresses are translated by
    PortC *port
    JournalC *journal
    MemTable *own_mem      # atomic; where the ring itself lies, for the log: guest_mem, or its pieces
    LogC *log              # atomic; NULL unless writes are to be logged
    uint64_t log_gpa       # what the first byte of the used ring is logged as ...
    uint8_t log_used       # ... if its writes are to be logged
    uint16_t size
    uint16_t mask
    uint16_t index         # vring index: even receiveq, odd transmitq
    uint8_t hdr_len        # 10 or 12
    uint8_t event_idx
    uint8_t indirect
    uint8_t mergeable
    uint8_t poll_only      # no kick eventfd: the worker may not sleep for long
    uint8_t packed
    uint8_t offloads       # OFFLOAD_*: what a receiveq takes, what a transmitq may ask for
    # atomic
    uint8_t enabled
    uint32_t fault         # a Fault; nonzero stops the ring
    int call_fd            # -1: the driver polls
    # worker
    MemTable *guest_mem    # the memory itself, by guest address; the same as `mem` without IOMMU
    # What follows up to `debt` is written at every burst: cache lines of its own, see layout.pxd.
    uint32_t lock          # receiveq only, and only with more than one worker
    uint16_t last_avail    # next avail entry to take; packed: a position
    uint16_t last_used     # next used entry to write; packed: a position
    uint16_t published     # split: used.idx as the driver sees it
    uint16_t cached_avail  # avail.idx as last read
    uint16_t signalled     # used.idx at the last notification decision
    uint8_t signalled_valid
    uint8_t armed          # the driver will kick
    uint8_t avail_wrap     # packed: wrap counters of the two positions
    uint8_t used_wrap
    uint8_t last_wrap      # packed: the used descriptor written last ...
    uint16_t last_used_at  # ... LAST_NONE if there is none
    uint16_t walk_id       # of the chain walked last: head or buffer id ...
    uint16_t walk_count    # ... and ring entries
    uint16_t region_hint
    uint16_t burst         # packed: chains taken when there were any last
    uint16_t quota         # chains to be taken in a turn, up to BURST: fewer when they are much work
    uint16_t walked        # descriptors of the chain walked last
    uint32_t empty_polls
    uint32_t debt          # what a turn cost beyond BURST copies, to be waited for
    uint64_t taken         # chains of a transmitq since it was made
    uint64_t fault_value
    uint64_t fault_detail
    uint64_t src_key       # last source learned from this ring ...
    uint64_t dst_key       # last destination looked up ...
    uint16_t lookups       # of the last burst, in the FDB itself
    uint32_t src_tick
    uint32_t src_generation
    uint32_t dst_generation
    int32_t dst_port       # ... and where it went

cdef struct Seg:
    char *ptr
    uint32_t len

cdef struct Frame:
    Seg seg                # first piece of the Ethernet frame
    uint32_t len           # whole Ethernet frame, bytes
    uint16_t more          # pool index of the second piece
    uint16_t nseg          # pieces
    uint16_t head          # ring entry the chain begins at
    uint16_t id            # head or buffer id, to be given back ...
    uint16_t count         # ... with so many ring entries
    uint8_t drop           # a Drop + 1 when the frame is not to be forwarded
    uint16_t needs         # OFFLOAD_* that a receiver must have to take it as it is
    uint32_t wire_len      # its length, or that of its longest segment, without a second VLAN tag
    const char *vnet       # the sender's virtio_net_hdr
    uint8_t hdr[VNET_HDR_MAX]  # what receivers get

cdef struct WorkerC

# Fills in a frame from the chain at `frame.head`, of which `first` is the first descriptor; -1 after
# faulting the ring.
ctypedef int (*FrameTaker)(WorkerC *w, RingC *ring, Frame *frame, const VringDesc *first) noexcept nogil

cdef struct PortView:
    PortC *port
    RingC **receiveqs      # enabled and started; NULL for a TAP
    uint16_t n_receiveqs
    uint8_t forwarding     # takes frames: has a receiveq, or is a TAP that is up
    RingC **rings          # by vring index, NULL where there is none
    uint16_t n_rings

cdef struct WorkerView:
    RingC **transmitqs
    uint32_t n_transmitqs
    PortC **taps
    uint32_t n_taps
    uint8_t poll_only

cdef struct View:          # main; immutable once published
    uint32_t n_workers
    uint32_t n_flood
    uint16_t *flood        # ids of the forwarding ports
    PortView ports[MAX_PORTS]
    WorkerView workers[MAX_WORKERS]

# What a worker tells the main thread. words.pyx has a row for each.
cdef enum EventKind:
    EVENT_MAC_LEARNED
    EVENT_MAC_MOVED
    EVENT_RING_FAULT
    EVENT_TAP_LOST
    EVENT_MAC_LIMIT
    EVENT_IOTLB_MISS
    N_EVENTS

cdef struct EventC:
    uint64_t key           # MAC and VLAN
    uint32_t kind
    uint16_t port
    uint16_t other         # old port of a move, vring index of a fault or miss

cdef struct Inject:        # a frame made by the switch itself (RARP), handed to worker 0
    Inject *next
    uint32_t done          # atomic; set by the worker, after which main may free it
    uint16_t port
    uint32_t len
    char data[64]

cdef struct FdbEntryC:
    uint64_t key           # atomic; MAC in wire order in the low 48 bits, VLAN above, or FDB_EMPTY
    uint64_t val           # atomic; port, static, round and tick: see fdb.pxd

cdef struct FdbBucket:     # one cache line
    FdbEntryC entries[4]

cdef struct FdbC:
    FdbBucket *buckets     # main
    uint64_t mask
    uint64_t seed
    uint32_t limit         # most entries
    uint32_t count         # under lock
    uint32_t lock
    uint32_t generation    # atomic; grows whenever an entry changes its port or goes
    uint32_t tick          # atomic; seconds
    uint64_t full          # under lock; addresses that found no place
    uint32_t learned[MAX_PORTS]      # under lock; dynamic entries of each port ...
    uint32_t learned_max[MAX_PORTS]  # atomic; ... and the most it may have

cdef struct Shared:        # one an engine
    void *view             # atomic; View *
    void *inject           # atomic; Inject *, newest first
    uint64_t pad0[6]
    FdbC *fdb              # main
    uint64_t idle_ns       # main; UINT64_MAX: never sleep
    uint32_t n_workers
    uint32_t report_macs   # atomic; somebody wants to hear of learned and moved addresses
    int event_fd

cdef enum WorkerState:
    STATE_STOPPED
    STATE_RUNNING
    STATE_SLEEPING

cdef struct WorkerC:
    # read by main
    uint64_t epoch         # atomic; grows at each quiescent point
    uint32_t state         # atomic; a WorkerState
    uint32_t stop          # atomic; set by main
    uint64_t loops
    uint64_t bursts
    uint64_t frames_total
    uint64_t sleeps
    uint64_t wakeups
    uint64_t busy_ns
    uint64_t idle_ns
    uint64_t pad0[6]
    Shared *shared
    uint32_t id
    int epoll_fd
    int wake_fd
    vs_notifier notifier
    uint32_t tap_debt      # of its TAPs, as that of a ring
    uint64_t mark_ns       # when the present busy or idle spell began
    uint8_t busy
    Turns turns            # of its loop
    Counters *counters     # [MAX_PORTS]
    # events for main: a ring with one writer (worker) and one reader (main)
    EventC *events
    uint32_t event_head    # atomic; written by the worker
    uint32_t event_tail    # atomic; written by main
    uint32_t events_lost   # atomic
    uint32_t event_armed   # atomic; main wants to be woken
    # scratch of one burst
    uint16_t heads[BURST]
    # After those of a burst: segments made of one of them, then variants; their pieces likewise.
    Frame frames[BURST + FINISH_BATCH + VARIANTS]
    Seg segs[SEG_POOL + FINISH_BATCH + VARIANT_SEGS]
    char heads_out[VARIANTS][HEAD_LEN]  # first pieces of variants
    uint32_t n_variants
    uint32_t n_variant_segs
    uint32_t n_segs
    uint32_t copies        # of the burst
    uint32_t work          # ... besides a copy a frame: see turn_cost
    uint32_t burst_calls   # ... drivers notified, and writes to a TAP, TAP_CALLS each
    uint64_t copied        # ... bytes
    uint32_t needs         # of all frames of the burst together
    uint16_t lookups       # of destinations in the FDB, in this burst
    uint16_t touched[MAX_PORTS]
    uint32_t n_touched
    uint16_t egress_n[MAX_PORTS]
    uint8_t egress[MAX_PORTS][BURST]  # which of `frames`, as each leaves there
    uint16_t queue_n[MAX_QUEUE_PAIRS]
    uint8_t queue[MAX_QUEUE_PAIRS][BURST]
    VringDesc rx_desc[BURST]
    char *rx_host[BURST]   # where a plain receive buffer lies, NULL when it is not plain
    Seg rx_segs[2 * MAX_CHAIN]
    uint16_t rx_heads[2 * MAX_CHAIN]
    uint32_t rx_lens[2 * MAX_CHAIN]
    uint16_t rx_counts[2 * MAX_CHAIN]
    UsedChain used[USED_BATCH]
    uint32_t n_used
    char *staging          # frames read from a TAP
    vs_uring uring         # writes to a TAP; opened by main
    uint32_t tap_lens[VS_URING_SLOTS]  # of the frames that are queued in it, without header
    char tap_short[VS_URING_SLOTS][TAP_SHORT_LEN]
    iovec tap_iovecs[TAP_IOVECS]
    uint32_t n_tap_iovecs
    char *linear           # [LINEAR_LEN]; a frame being finished in software
    char headers[FINISH_BATCH][HEADERS_MAX + 64]  # of its segments
    uint32_t fragment_id   # of the next IPv6 datagram to be fragmented
