from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vswitch.guest.driver cimport ReceiveQueue, TransmitQueue
from vswitch.guest.split cimport Desc, Piece, SplitRing


cdef enum:
    BURST = 32
    SCRATCH_LEN = 1 << 17
    # What a step returns, besides the rules in split.pxd.
    RX_LENGTH = -10
    RX_NUM_BUFFERS = -11
    RX_NOT_TOGETHER = -12


cdef struct FlowC:
    SplitRing *tx              # NULL: receive only
    SplitRing *rx              # NULL: send only
    Piece *tx_pieces
    Piece *rx_pieces
    Desc **tx_tables           # NULL: no indirect descriptors
    Desc **rx_tables
    uint64_t *tx_table_gpas
    uint64_t *rx_table_gpas
    uint32_t tx_max_pieces
    uint32_t rx_max_pieces
    uint32_t rx_slot_len
    uint32_t header_len        # of the transmitq
    uint32_t rx_header_len
    bint mergeable
    bint verify
    bint rx_broke              # a broken rule was the receiveq's
    int tx_kick_fd
    int rx_kick_fd
    uint32_t window            # frames in flight at most; 0: what the rings hold
    uint64_t write_off_ns      # a window without an arrival for so long is lost
    uint32_t n_frames          # templates
    uint8_t **frames
    uint32_t *frame_lens
    uint8_t *scratch
    # Slots of the transmitq that are free, a ring: buffers are used in turn.
    uint32_t *free_slots
    uint32_t n_slots
    uint32_t free_at
    uint32_t free_count
    uint16_t calls_off_idx     # used.idx of either ring when calls were last refused
    # What happened.
    uint64_t limit             # frames to send in this run
    uint64_t seq               # next number to send
    uint64_t next_seq          # next number expected
    uint64_t in_flight
    uint64_t sent
    uint64_t received
    uint64_t received_bytes
    uint64_t lost
    uint64_t misordered
    uint64_t corrupt
    uint64_t written_off
    uint64_t tx_kicks
    uint64_t rx_kicks
    uint64_t progress_ns


cdef class Flow:
    cdef FlowC c
    cdef readonly TransmitQueue tx
    cdef readonly ReceiveQueue rx
    cdef readonly list frames


cdef class NullBackend:
    cdef TransmitQueue tx
    cdef ReceiveQueue rx
    cdef uint32_t used_len
    cdef int stopping
    cdef readonly uint64_t forwarded
