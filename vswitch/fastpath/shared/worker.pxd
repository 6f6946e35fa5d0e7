"""A worker, the frames of its burst, and what all workers share.

The package says what *main* and *atomic* mean.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vswitch.fastpath.shared.memory cimport Seg
from vswitch.fastpath.shared.ring cimport RingC, UsedChain
from vswitch.fastpath.shared.sizes cimport (
    BURST,
    FINISH_BATCH,
    HEADERS_MAX,
    HEAD_LEN,
    MAX_CHAIN,
    MAX_PORTS,
    MAX_QUEUE_PAIRS,
    SEG_POOL,
    TAP_IOVECS,
    TAP_SHORT_LEN,
    USED_BATCH,
    VARIANTS,
    VARIANT_SEGS,
    VNET_HDR_MAX,
)
from vswitch.fastpath.shared.turns cimport Turns
from vswitch.fastpath.shared.virtio cimport VringDesc
from vswitch.fastpath.shared.words cimport Counters, EventC
from vswitch.fastpath.sys.notify cimport vs_notifier
from vswitch.fastpath.sys.uring cimport VS_URING_SLOTS, iovec, vs_uring

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

cdef struct Inject:        # a frame made by the switch itself (RARP), handed to worker 0
    Inject *next
    uint32_t done          # atomic; set by the worker, after which main may free it
    uint16_t port
    uint32_t len
    char data[64]

cdef struct Shared:        # one an engine
    void *view             # atomic; View *
    void *inject           # atomic; Inject *, newest first
    uint64_t pad0[6]
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
    uint8_t stages         # INGRESS_* of the port that it came from
    char head[24]          # first bytes of the frame that is looked at: what its way is decided on
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
