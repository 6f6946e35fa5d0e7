# What a Flow of the load generator does in one round, as inline C without the GIL.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from vswitch.lab.guest.ring cimport (
    ring_add,
    ring_kick_needed,
    ring_prefetch,
    ring_publish,
    ring_reap,
    ring_upcoming,
)
from vswitch.lab.guest.vring cimport Desc, Piece, Ring


cdef extern from "barriers.h" nogil:
    void guest_prefetch(const void *p)


cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *buf, size_t count)


cdef enum:
    BURST = 32
    SCRATCH_LEN = 1 << 17
    MAX_CHAIN_PIECES = 64
    SEQ_LEN = 8
    # What a step returns, besides the rules in vring.pxd.
    RX_LENGTH = -10
    RX_NUM_BUFFERS = -11
    RX_NOT_TOGETHER = -12


cdef struct FlowC:
    Ring *tx                   # NULL: receive only
    Ring *rx                   # NULL: send only
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
    uint8_t header[12]         # virtio-net header of every frame sent
    bint rewrite               # write each frame anew when it is sent
    # Slots of the transmitq that are free, a ring: buffers are used in turn.
    uint32_t *free_slots
    uint8_t *filled            # by slot: holds the header and its frame already
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


cdef inline void put(
    Piece *piece, uint32_t offset, const uint8_t *data, uint32_t length
) noexcept nogil:
    cdef uint32_t room
    while length:
        if offset >= piece.len:
            offset -= piece.len
            piece += 1
            continue
        room = piece.len - offset
        if room > length:
            room = length
        memcpy(piece.ptr + offset, data, room)
        data += room
        length -= room
        offset += room


cdef inline void take(Piece *piece, uint32_t offset, uint8_t *to, uint32_t length) noexcept nogil:
    cdef uint32_t room
    while length:
        if offset >= piece.len:
            offset -= piece.len
            piece += 1
            continue
        room = piece.len - offset
        if room > length:
            room = length
        memcpy(to, piece.ptr + offset, room)
        to += room
        length -= room
        offset += room


cdef inline void kick(int fd) noexcept nogil:
    cdef uint64_t one = 1
    write(fd, &one, 8)


cdef inline int reap_transmitted(FlowC *flow) noexcept nogil:
    cdef uint32_t slot = 0, length = 0, at
    cdef int rc = 0
    cdef uint16_t n = 0
    ring_prefetch(flow.tx)
    while True:
        rc = ring_reap(flow.tx, &slot, &length)
        if rc <= 0:
            if n:
                flow.tx.burst = n
            return rc
        n += 1
        at = flow.free_at + flow.free_count
        if at >= flow.n_slots:
            at -= flow.n_slots
        flow.free_slots[at] = slot
        flow.free_count += 1


cdef inline uint32_t send_burst(FlowC *flow) noexcept nogil:
    """Up to BURST frames, as window, slots and descriptors allow. Returns how many."""
    cdef uint32_t n = BURST, i, slot, left, pieces, kind
    cdef Piece *piece
    cdef Piece[MAX_CHAIN_PIECES] chain
    cdef uint64_t gpa = 0
    cdef Desc *table = NULL
    if flow.window:
        left = flow.window - <uint32_t>flow.in_flight if flow.in_flight < flow.window else 0
        if n > left:
            n = left
    if n > flow.free_count:
        n = flow.free_count
    if flow.rewrite and n > 1:
        # As a driver does with long frames: the device has work while the next one is written.
        n = 1
    if n > flow.limit - flow.sent:
        n = <uint32_t>(flow.limit - flow.sent)
    for i in range(n):
        slot = flow.free_slots[flow.free_at]
        piece = flow.tx_pieces + slot * flow.tx_max_pieces
        if flow.n_frames == 1:
            kind = 0
        else:
            kind = <uint32_t>(flow.seq % flow.n_frames) if flow.verify else slot % flow.n_frames
        left = flow.header_len + flow.frame_lens[kind]
        pieces = 0
        while left:
            chain[pieces] = piece[pieces]
            if chain[pieces].len > left:
                chain[pieces].len = left
            left -= chain[pieces].len
            pieces += 1
        if flow.tx_tables != NULL:
            table = flow.tx_tables[slot]
            gpa = flow.tx_table_gpas[slot]
        elif pieces > flow.tx.num_free:
            n = i
            break
        if not flow.filled[slot]:
            # Once a run, when the slot is first used: before, the device may have had it.
            put(piece, 0, flow.header, flow.header_len)
            put(piece, flow.header_len, flow.frames[kind], flow.frame_lens[kind])
            flow.filled[slot] = not flow.rewrite
        if flow.verify:
            put(piece, flow.header_len, flow.frames[kind], flow.frame_lens[kind] - SEQ_LEN)
            put(
                piece, flow.header_len + flow.frame_lens[kind] - SEQ_LEN,
                <const uint8_t *>&flow.seq, SEQ_LEN,
            )
        if ring_add(flow.tx, chain, pieces, 0, slot, table, gpa) < 0:
            n = i
            break
        flow.seq += 1
        flow.free_at += 1
        if flow.free_at == flow.n_slots:
            flow.free_at = 0
        flow.free_count -= 1
    if n:
        flow.sent += n
        flow.in_flight += n
        ring_publish(flow.tx)
        if ring_kick_needed(flow.tx):
            flow.tx_kicks += 1
            kick(flow.tx_kick_fd)
    return n


cdef inline void check(FlowC *flow, uint32_t length) noexcept nogil:
    """Hold the frame in `scratch` against what was sent."""
    cdef uint64_t seq
    cdef uint32_t kind
    if length < SEQ_LEN:
        flow.corrupt += 1
        return
    memcpy(&seq, flow.scratch + length - SEQ_LEN, SEQ_LEN)
    kind = <uint32_t>(seq % flow.n_frames)
    if (
        length != flow.frame_lens[kind]
        or memcmp(flow.scratch, flow.frames[kind], length - SEQ_LEN) != 0
    ):
        flow.corrupt += 1
        return
    if seq < flow.next_seq:
        flow.misordered += 1
        return
    flow.lost += seq - flow.next_seq
    flow.next_seq = seq + 1


cdef inline void repost(FlowC *flow, uint32_t slot) noexcept nogil:
    cdef Desc *table = NULL
    cdef uint64_t gpa = 0
    if flow.rx_tables != NULL:
        table = flow.rx_tables[slot]
        gpa = flow.rx_table_gpas[slot]
    # It fits: its descriptors have just come back.
    ring_add(
        flow.rx, flow.rx_pieces + slot * flow.rx_max_pieces, 0, flow.rx_max_pieces, slot, table, gpa
    )


cdef inline void prefetch_received(FlowC *flow) noexcept nogil:
    """Fetch the first line of the next buffers, a stage ahead of looking at their headers."""
    cdef uint32_t[BURST] slots
    cdef uint32_t n, i
    ring_prefetch(flow.rx)
    n = ring_upcoming(flow.rx, slots, BURST)
    for i in range(n):
        guest_prefetch(flow.rx_pieces[slots[i] * flow.rx_max_pieces].ptr)


cdef inline int receive_burst(FlowC *flow) noexcept nogil:
    """Take up to BURST frames and post their buffers again. Returns how many, or a broken rule."""
    cdef uint32_t slot = 0, length = 0, num_buffers, gathered, _i
    cdef int rc, n = 0
    cdef uint8_t[12] header
    cdef Piece *piece
    prefetch_received(flow)
    while n < BURST:
        rc = ring_reap(flow.rx, &slot, &length)
        if rc < 0:
            return rc
        if rc == 0:
            break
        if length > flow.rx_slot_len or length < flow.rx_header_len:
            flow.rx.bad_value = length
            return RX_LENGTH
        piece = flow.rx_pieces + slot * flow.rx_max_pieces
        num_buffers = 1
        if flow.mergeable:
            take(piece, 0, header, 12)
            num_buffers = header[10] | (<uint32_t>header[11] << 8)
            if num_buffers == 0:
                flow.rx.bad_value = 0
                return RX_NUM_BUFFERS
        length -= flow.rx_header_len
        if flow.verify:
            take(piece, flow.rx_header_len, flow.scratch, length)
        gathered = length
        repost(flow, slot)
        for _i in range(1, num_buffers):
            rc = ring_reap(flow.rx, &slot, &length)
            if rc < 0:
                return rc
            if rc == 0:
                flow.rx.bad_value = num_buffers
                return RX_NOT_TOGETHER
            if length > flow.rx_slot_len or gathered + length > SCRATCH_LEN:
                flow.rx.bad_value = length
                return RX_LENGTH
            if flow.verify:
                piece = flow.rx_pieces + slot * flow.rx_max_pieces
                take(piece, 0, flow.scratch + gathered, length)
            gathered += length
            repost(flow, slot)
        if flow.verify:
            check(flow, gathered)
        flow.received += 1
        flow.received_bytes += gathered
        n += 1
    if n:
        flow.rx.burst = <uint16_t>n
        flow.in_flight -= n if flow.in_flight > <uint64_t>n else flow.in_flight
        ring_publish(flow.rx)
        if ring_kick_needed(flow.rx):
            flow.rx_kicks += 1
            kick(flow.rx_kick_fd)
    return n


cdef inline int step(FlowC *flow, bint sending) noexcept nogil:
    """One round of a flow: the number of frames moved, or a broken rule."""
    cdef int rc, moved = 0
    if flow.rx != NULL:
        rc = receive_burst(flow)
        if rc < 0:
            flow.rx_broke = True
            return rc
        moved = rc
    if flow.tx != NULL:
        rc = reap_transmitted(flow)
        if rc < 0:
            return rc
        if sending:
            moved += <int>send_burst(flow)
    return moved
