"""How long one frame takes when no other is under way."""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from vswitch.lab.load.flow cimport FlowC, reap_transmitted, receive_burst, send_burst
from vswitch.lab.load.load cimport Flow

from vswitch.lab.guest.errors import DeviceError


cdef extern from "barriers.h" nogil:
    void guest_pause()
    uint64_t guest_now_ns()


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef enum:
    LOST_S = 5                 # a frame that has not arrived after so long is lost
    YIELD_AFTER = 4096         # looks in vain before the core is offered to others
    # Refusal of notifications need not be renewed within so many frames (see look_after in load.pyx).
    C_MAX_FRAMES = 10000

MAX_FRAMES = C_MAX_FRAMES


def latencies(Flow flow not None, double seconds, *, double gap_s=0.0, uint32_t limit=C_MAX_FRAMES):
    """Send one frame at a time through a flow; how long each took to arrive, in nanoseconds.

    The next one is sent `gap_s` seconds after the last has arrived, for `seconds` and `limit`
    frames at most (1 to MAX_FRAMES). No other frame may be under way to the flow's receiveq. Polls
    all the time, without the GIL. DeviceError when the device breaks a rule or loses a frame.
    """
    cdef FlowC *c = &flow.c
    cdef uint32_t n = 0, vain
    cdef uint64_t start, now, deadline, gap_ns = <uint64_t>(gap_s * 1e9)
    cdef uint64_t *spent
    cdef int rc = 0
    cdef bint lost = False
    if c.tx == NULL or c.rx == NULL:
        raise ValueError("latencies need both a transmitq and a receiveq")
    if not 1 <= limit <= C_MAX_FRAMES:
        raise ValueError(f"{limit} frames, must be 1 to {C_MAX_FRAMES}")
    spent = <uint64_t *>calloc(limit, sizeof(uint64_t))
    if spent == NULL:
        raise MemoryError()
    try:
        flow._begin(1)
        with nogil:
            now = guest_now_ns()
            deadline = now + <uint64_t>(seconds * 1e9)
            while n < limit and now < deadline and rc >= 0 and not lost:
                start = now
                while now - start < gap_ns:
                    guest_pause()
                    now = guest_now_ns()
                c.limit = n + 1
                vain = 0
                start = guest_now_ns()
                send_burst(c)
                while c.received <= n:
                    rc = receive_burst(c)
                    if rc < 0:
                        c.rx_broke = True
                        break
                    vain += 1
                    if vain % YIELD_AFTER == 0:
                        sched_yield()
                        if guest_now_ns() - start > LOST_S * <uint64_t>1000000000:
                            lost = True
                            break
                now = guest_now_ns()
                spent[n] = now - start
                n += 1
                if rc >= 0:
                    rc = reap_transmitted(c)
        flow._end()
        if rc < 0:
            raise flow._broken(rc)
        if lost:
            raise DeviceError(f"{flow.rx.name}: frame {n} did not arrive within {LOST_S} s")
        return [spent[i] for i in range(n)]
    finally:
        free(spent)
