"""A ring, its journal and its log. The package says what *main*, *worker* and *atomic* mean."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from vswitch.fastpath.shared.memory cimport MemTable
from vswitch.fastpath.shared.port cimport PortC
from vswitch.fastpath.shared.sizes cimport USED_BATCH
from vswitch.fastpath.shared.virtio cimport VringDesc, VringUsedElem

cdef struct UsedChain:     # what giving a chain of a packed ring back takes
    uint16_t id
    uint16_t count         # ring entries
    uint32_t len           # bytes written into it

cdef struct Cursor:        # a place among what a ring's driver has offered
    uint16_t position      # of a split ring: an avail index
    uint8_t wrap

cdef enum:
    LAST_NONE = 0xFFFF     # a ring entry that there is none of

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
    LogC *dirty_log        # atomic; NULL unless writes are to be logged
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
