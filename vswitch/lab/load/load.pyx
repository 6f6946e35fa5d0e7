"""A load generator on the software guest's rings: a loop without the GIL that only polls.

A Flow sends numbered or plain frames from one transmitq and takes what arrives in one receiveq;
Load.run drives several flows from the calling thread.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from vswitch.lab.guest.ring cimport ring_calls_off, ring_kick_needed
from vswitch.lab.load.flow cimport (
    RX_LENGTH,
    RX_NOT_TOGETHER,
    RX_NUM_BUFFERS,
    SCRATCH_LEN,
    SEQ_LEN,
    FlowC,
    kick,
    step,
)

from typing import NamedTuple

from vswitch.lab.guest.errors import DeviceError


cdef extern from "barriers.h" nogil:
    int guest_load_relaxed_int(const int *p)
    void guest_store_relaxed_int(int *p, int value)
    void guest_pause()
    uint64_t guest_now_ns()


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef enum:
    MAX_FLOWS = 64
    CLOCK_EVERY = 64           # loops between two looks at the clock
    YIELD_AFTER = 4096         # loops without work before the core is offered to others
    WHOLE_QUIET_NS = 10000000

SEQUENCE_LEN = SEQ_LEN


class FlowResult(NamedTuple):
    """What one flow did in one run.

    `seconds` is the time in which frames were sent; `received_in_time` counts arrivals in it, from
    which `frames_per_s` comes; `received` includes those that arrived while the run settled. `lost`,
    `misordered` and `corrupt` are found in verified flows only. `written_off` frames were given up
    when a window stayed closed. Kicks are notifications sent.
    """

    seconds: float
    sent: int
    received: int
    received_in_time: int
    received_bytes: int
    lost: int
    misordered: int
    corrupt: int
    written_off: int
    tx_kicks: int
    rx_kicks: int

    @property
    def frames_per_s(self):
        """Arrivals a second; of a flow that only sends, frames sent a second."""
        return self.received_in_time / self.seconds if self.seconds else 0.0


cdef inline void look_after(FlowC *flow, uint64_t now) noexcept nogil:
    """What is due now and then: refuse notifications anew, give up what is lost."""
    cdef uint16_t idx = flow.rx.used_idx if flow.rx != NULL else flow.tx.used_idx
    if <uint16_t>(idx - flow.calls_off_idx) > 16384:
        # Every 16384 of 65536: before the index reaches the event it was told.
        flow.calls_off_idx = idx
        if flow.tx != NULL:
            ring_calls_off(flow.tx)
        if flow.rx != NULL:
            ring_calls_off(flow.rx)
    if flow.window and flow.in_flight >= flow.window and now - flow.progress_ns > flow.write_off_ns:
        flow.written_off += flow.in_flight
        flow.in_flight = 0
        flow.progress_ns = now


cdef int loop(
    FlowC **flows, uint32_t n_flows, uint64_t deadline, bint sending, uint64_t quiet_ns,
    int *stopping, uint32_t *culprit,
) noexcept nogil:
    """Until the deadline, `stopping`, all sent (`sending`), or `quiet_ns` without work (if given).

    Where each flow has received as many frames as it sent, WHOLE_QUIET_NS without work suffice.
    """
    cdef uint32_t i, loops = 0, idle = 0
    cdef uint64_t now = guest_now_ns()
    cdef uint64_t moved_ns = now
    cdef int rc, moved
    cdef bint done, unfinished, whole
    while True:
        moved = 0
        for i in range(n_flows):
            rc = step(flows[i], sending)
            if rc < 0:
                culprit[0] = i
                return rc
            if rc:
                moved = 1
                flows[i].progress_ns = now
        loops += 1
        if moved:
            idle = 0
            moved_ns = now
        else:
            idle += 1
            guest_pause()
            if idle % YIELD_AFTER == 0:
                sched_yield()
        if loops % CLOCK_EVERY:
            continue
        now = guest_now_ns()
        # Over when all senders are done; flows that only receive have no end of their own.
        done = False
        unfinished = False
        whole = quiet_ns > WHOLE_QUIET_NS
        for i in range(n_flows):
            look_after(flows[i], now)
            whole &= (
                flows[i].tx != NULL and flows[i].rx != NULL and flows[i].received >= flows[i].sent
            )
            if sending and flows[i].tx != NULL:
                done = True
                unfinished |= flows[i].sent < flows[i].limit
        done = done and not unfinished
        if done or now >= deadline or guest_load_relaxed_int(stopping):
            return 0
        if quiet_ns and now - moved_ns >= (WHOLE_QUIET_NS if whole else quiet_ns):
            return 0


cdef class Flow:
    """Frames from a transmitq to a receiveq, which may belong to different guests.

    `tx` and `rx` are the queues of SoftwareGuest (GuestQueue); either may be None. `frames` are
    sent in turn, header not included. `window` is the most frames in flight, 0: as many as the
    rings hold; what is in a window where nothing arrives for `write_off_s` is taken for lost. With
    `verify` the last SEQUENCE_LEN bytes of each frame carry a sequence number, and every byte that
    arrives is compared; all frames that come to `rx` must then be this flow's. Without it a frame is
    written once into each buffer and sent from there again and again, unless `rewrite` has it
    written anew each time. `header` is the virtio-net header of them all (up to 12 bytes, zeros if
    not given). Nobody else may use the queues during a run.
    """

    def __init__(
        self, tx, rx, list frames not None, *, uint32_t window=0, bint verify=False,
        double write_off_s=0.1, bint rewrite=False, bytes header=b"",
    ):
        cdef uint32_t i
        cdef bytes frame
        cdef FlowC *c = &self.c
        if tx is None and rx is None:
            raise ValueError("a flow needs a transmitq or a receiveq")
        if c.scratch != NULL:
            raise ValueError("a flow is set up once")
        if not frames:
            raise ValueError("a flow needs a frame to send or to compare with")
        if window and (tx is None or rx is None):
            raise ValueError("a window needs both a transmitq and a receiveq")
        if len(header) > <Py_ssize_t>sizeof(c.header):
            raise ValueError(f"a header of {len(header)} bytes, it has 12 at most")
        memcpy(c.header, PyBytes_AS_STRING(header), len(header))
        c.rewrite = rewrite
        self.frames = [bytes(frame) for frame in frames]
        c.window = window
        c.verify = verify
        c.write_off_ns = <uint64_t>(write_off_s * 1e9)
        c.n_frames = <uint32_t>len(frames)
        c.frames = <uint8_t **>calloc(len(frames), sizeof(uint8_t *))
        c.frame_lens = <uint32_t *>calloc(len(frames), sizeof(uint32_t))
        c.scratch = <uint8_t *>calloc(1, SCRATCH_LEN)
        if c.frames == NULL or c.frame_lens == NULL or c.scratch == NULL:
            raise MemoryError()
        for i in range(c.n_frames):
            frame = self.frames[i]
            c.frames[i] = <uint8_t *>PyBytes_AS_STRING(frame)
            c.frame_lens[i] = <uint32_t>PyBytes_GET_SIZE(frame)
            if c.frame_lens[i] < 14 + SEQ_LEN:
                raise ValueError(f"frames of a flow have at least {14 + SEQ_LEN} bytes")
        if tx is not None:
            self.tx = tx.ring
            c.tx = &self.tx.ring
            c.tx_kick_fd = tx.kick_fd
            c.tx_pieces = self.tx.pieces
            c.tx_max_pieces = self.tx.max_pieces
            c.tx_tables = self.tx.tables
            c.tx_table_gpas = self.tx.table_gpas
            c.header_len = self.tx.header_len
            c.n_slots = self.tx.slots
            longest = max([len(frame) for frame in self.frames])
            if longest > self.tx.slot_len - c.header_len:
                raise ValueError(
                    f"{self.tx.name}: a frame of {longest} bytes, "
                    f"slots hold {self.tx.slot_len - c.header_len}"
                )
            c.free_slots = <uint32_t *>calloc(c.n_slots, sizeof(uint32_t))
            c.filled = <uint8_t *>calloc(c.n_slots, 1)
            if c.free_slots == NULL or c.filled == NULL:
                raise MemoryError()
        if rx is not None:
            self.rx = rx.ring
            c.rx = &self.rx.ring
            c.rx_kick_fd = rx.kick_fd
            c.rx_pieces = self.rx.pieces
            c.rx_max_pieces = self.rx.max_pieces
            c.rx_tables = self.rx.tables
            c.rx_table_gpas = self.rx.table_gpas
            c.rx_header_len = self.rx.header_len
            c.rx_slot_len = self.rx.slot_len
            c.mergeable = self.rx.mergeable

    def __dealloc__(self):
        free(self.c.frames)
        free(self.c.frame_lens)
        free(self.c.scratch)
        free(self.c.free_slots)
        free(self.c.filled)

    def _begin(self, limit):
        """Take the slots from the queue; counters start at zero."""
        cdef FlowC *c = &self.c
        cdef uint32_t i, slot
        c.limit = limit if limit else <uint64_t>-1
        c.in_flight = 0
        c.sent = c.received = c.received_bytes = 0
        c.lost = c.misordered = c.corrupt = c.written_off = 0
        c.tx_kicks = c.rx_kicks = 0
        c.next_seq = c.seq
        c.progress_ns = guest_now_ns()
        if self.tx is not None:
            c.free_at = 0
            c.free_count = self.tx.num_free_slots
            memset(c.filled, 0, c.n_slots)
            for i in range(c.free_count):
                slot = self.tx.free_slots[c.free_count - 1 - i]
                c.free_slots[i] = slot
            self.tx.num_free_slots = 0
            ring_calls_off(c.tx)
        if self.rx is not None:
            self.rx.post()
            ring_calls_off(c.rx)
            if ring_kick_needed(c.rx):
                kick(c.rx_kick_fd)
        c.calls_off_idx = c.rx.used_idx if c.rx != NULL else c.tx.used_idx

    def _end(self):
        """Give the slots back to the queues."""
        cdef FlowC *c = &self.c
        cdef uint32_t i
        if self.tx is not None:
            for i in range(c.free_count):
                self.tx.free_slots[i] = c.free_slots[
                    (c.free_at + c.free_count - 1 - i) % c.n_slots
                ]
            self.tx.num_free_slots = c.free_count
            self.tx.frames += c.sent
            self.tx.kicks += c.tx_kicks
            c.free_count = 0
        if self.rx is not None:
            self.rx.frames += c.received
            self.rx.bytes += c.received_bytes
            self.rx.kicks += c.rx_kicks

    def _broken(self, int rule):
        cdef FlowC *c = &self.c
        if rule == RX_LENGTH:
            return DeviceError(
                f"{self.rx.name}: used length {c.rx.bad_value} does not suit buffers of "
                f"{c.rx_slot_len} bytes"
            )
        if rule == RX_NUM_BUFFERS:
            return DeviceError(f"{self.rx.name}: num_buffers is 0")
        if rule == RX_NOT_TOGETHER:
            return DeviceError(
                f"{self.rx.name}: num_buffers is {c.rx.bad_value}, but not as many were used together"
            )
        return self.rx.broken(rule) if c.rx_broke else self.tx.broken(rule)

    def _result(self, double seconds, uint64_t in_time):
        cdef FlowC *c = &self.c
        return FlowResult(
            seconds, c.sent, c.received, in_time, c.received_bytes, c.lost, c.misordered,
            c.corrupt, c.written_off, c.tx_kicks, c.rx_kicks,
        )


cdef class Load:
    """Several flows driven from one thread; `run` as often as wanted."""

    cdef list flows
    cdef int stopping

    def __init__(self, flows not None):
        self.flows = [<Flow?>flow for flow in flows]
        if not 1 <= len(self.flows) <= MAX_FLOWS:
            raise ValueError(f"{len(self.flows)} flows, must be 1 to {MAX_FLOWS}")

    def stop(self):
        """End the present run soon; for another thread. The next run is not affected by it."""
        guest_store_relaxed_int(&self.stopping, 1)

    def run(self, double seconds, *, uint64_t frames=0, double settle_s=0.0, double quiet_s=0.01):
        """Send for `seconds`, or until each flow has sent `frames` (0: no limit).

        After that, frames under way are received until none has come for `quiet_s` (if all have
        come that were sent, for 10 ms), for `settle_s` at most; 0 leaves them in the rings. Polls
        all the time, without the GIL. Returns a FlowResult for each flow. DeviceError when the
        device breaks a rule.
        """
        cdef FlowC *pointers[MAX_FLOWS]
        cdef uint64_t[MAX_FLOWS] in_time
        cdef uint32_t i, culprit = 0
        cdef uint32_t n = <uint32_t>len(self.flows)
        cdef uint64_t start, end, deadline
        cdef uint64_t quiet_ns = <uint64_t>(quiet_s * 1e9)
        cdef uint64_t settle_ns = <uint64_t>(settle_s * 1e9)
        cdef int rc
        cdef Flow flow
        guest_store_relaxed_int(&self.stopping, 0)
        for i in range(n):
            flow = self.flows[i]
            flow._begin(frames)
            pointers[i] = &flow.c
        start = guest_now_ns()
        deadline = start + <uint64_t>(seconds * 1e9)
        with nogil:
            rc = loop(pointers, n, deadline, True, 0, &self.stopping, &culprit)
            end = guest_now_ns()
            for i in range(n):
                in_time[i] = pointers[i].received
            if rc == 0 and settle_ns:
                rc = loop(
                    pointers, n, end + settle_ns, False, quiet_ns, &self.stopping, &culprit
                )
        for i in range(n):
            flow = self.flows[i]
            flow._end()
        if rc < 0:
            flow = self.flows[culprit]
            raise flow._broken(rc)
        results = []
        for i in range(n):
            flow = self.flows[i]
            results.append(
                flow._result(
                    (end - start) / 1e9, in_time[i] if flow.rx is not None else flow.c.sent
                )
            )
        return results
