"""The TAP uplink, with a virtio_net_hdr before each frame (Linux tun.h).

A write to a TAP is one frame. io_uring does those of a burst in one system call, which saves a third
of what a short one costs. Where there is none each has its own.
"""

from libc.errno cimport EAGAIN, EBADFD, EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from vswitch.fastpath.shared.frame cimport gather_bytes
from vswitch.fastpath.shared.port cimport PortC
from vswitch.fastpath.shared.sizes cimport (
    BURST,
    FINISH_BATCH,
    MAX_CHAIN,
    MAX_FRAME_LEN,
    TAP_IOVECS,
    TAP_SHORT_LEN,
    VNET_HDR_MAX,
)
from vswitch.fastpath.shared.words cimport (
    DROP_BAD_GSO,
    DROP_EGRESS_MTU,
    DROP_TAP_BUSY,
    DROP_TAP_DOWN,
    DROP_TAP_ERROR,
    Counters,
)
from vswitch.fastpath.shared.worker cimport Frame, WorkerC
from vswitch.fastpath.sys.atomics cimport vs_load32, vs_unlikely
from vswitch.fastpath.sys.uring cimport (
    VS_URING_SLOTS,
    iovec,
    vs_uring_submit,
    vs_uring_write,
    vs_uring_writev,
    writev,
)
from vswitch.fastpath.worker.finish cimport Finish, finish_begin, finish_next, finish_work

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buf, size_t count)
    ssize_t write(int fd, const void *buf, size_t count)

cdef enum:
    STAGING_LEN = 262144  # bytes a worker reads ahead from a TAP in one burst
    TAP_SLOT_MAX = 65664  # the longest frame with its header, rounded up to a cache line
    TAP_CALLS = 2         # what a write to a TAP costs, in notifications


cdef inline void tap_written(Counters *counters, uint32_t length, int error) noexcept nogil:
    """Count a frame that was given to the kernel; `error` is an errno, or 0."""
    if error == 0:
        counters.egress_frames += 1
        counters.egress_bytes += length
    elif error == EAGAIN or error == EINTR:
        counters.drops[DROP_TAP_BUSY] += 1
    elif error == EIO or error == EBADFD:
        counters.drops[DROP_TAP_DOWN] += 1
    else:
        counters.drops[DROP_TAP_ERROR] += 1


cdef inline void tap_flush(WorkerC *w, Counters *counters) noexcept nogil:
    """Write what is queued."""
    cdef uint32_t i, n = w.uring.queued
    if n == 0:
        return
    w.burst_calls += TAP_CALLS * n
    vs_uring_submit(&w.uring)
    for i in range(n):
        tap_written(counters, w.tap_lens[i], -min(w.uring.results[i], 0))
    w.n_tap_iovecs = 0


cdef inline void tap_write(
    WorkerC *w, PortC *port, const Frame *frame, bint queue, Counters *counters
) noexcept nogil:
    """Write one frame with its header, at once or (`queue`) with others at the next `tap_flush`.

    The kernel does the copy of a long one, straight from where it lies; memory that a frontend has
    taken away meanwhile is EFAULT there, not a signal. A short one goes through memory of our own:
    that costs less than telling the kernel of two pieces. So does one in more pieces than the kernel takes
    with a header (IOV_MAX): a variant of one with MAX_CHAIN.
    """
    cdef bint gathered = frame.nseg > MAX_CHAIN
    cdef bint small = frame.nseg == 1 and frame.len <= TAP_SHORT_LEN - VNET_HDR_MAX
    cdef uint32_t slot, k
    cdef char *whole
    cdef iovec *iov
    cdef ssize_t done
    if (
        w.uring.queued == VS_URING_SLOTS or w.n_tap_iovecs + 1 + frame.nseg > TAP_IOVECS
        or vs_unlikely(gathered)
    ):
        tap_flush(w, counters)
    w.copied += frame.len
    w.work += frame.nseg
    slot = w.uring.queued
    whole = w.tap_short[slot]
    iov = &w.tap_iovecs[w.n_tap_iovecs]
    if small:
        memcpy(whole, frame.hdr, VNET_HDR_MAX)
        memcpy(whole + VNET_HDR_MAX, frame.seg.ptr, frame.len)
    elif vs_unlikely(gathered):
        whole = w.linear  # where a frame that is being finished is in two pieces at most
        memcpy(whole, frame.hdr, VNET_HDR_MAX)
        gather_bytes(w, frame, whole + VNET_HDR_MAX, frame.len)
    else:
        iov[0].iov_base = <void *>frame.hdr
        iov[0].iov_len = VNET_HDR_MAX
        iov[1].iov_base = frame.seg.ptr
        iov[1].iov_len = frame.seg.len
        for k in range(<uint32_t>(frame.nseg - 1)):
            iov[2 + k].iov_base = w.segs[frame.more + k].ptr
            iov[2 + k].iov_len = w.segs[frame.more + k].len
    if queue and not gathered:
        w.tap_lens[slot] = frame.len
        if small:
            vs_uring_write(&w.uring, port.tap_fd, whole, VNET_HDR_MAX + frame.len)
        else:
            vs_uring_writev(&w.uring, port.tap_fd, iov, 1 + frame.nseg)
            w.n_tap_iovecs += 1 + frame.nseg
        return
    w.burst_calls += TAP_CALLS
    if small or gathered:
        done = write(port.tap_fd, whole, VNET_HDR_MAX + frame.len)
    else:
        done = writev(port.tap_fd, iov, 1 + frame.nseg)
    tap_written(counters, frame.len, errno if done < 0 else 0)


cdef inline void tap_send(
    WorkerC *w, PortC *port, const uint8_t *which, uint16_t n, Counters *counters
) noexcept nogil:
    """Write frames to the TAP; those that the kernel cannot finish are finished here."""
    cdef Finish f
    cdef const Frame *frame
    cdef uint32_t slot
    cdef uint16_t i
    cdef bint able = w.uring.fd >= 0 and not w.uring.refused, queue = able and n > 1
    for i in range(n):
        frame = &w.frames[which[i]]
        if frame.wire_len > vs_load32(&port.max_len):
            counters.drops[DROP_EGRESS_MTU] += 1
        elif not frame.needs & ~port.offloads:
            tap_write(w, port, frame, queue, counters)
        elif finish_begin(w, frame, <uint8_t>port.offloads, &f) == 0:
            counters.drops[DROP_BAD_GSO] += 1
        else:
            w.work += finish_work(&f)
            # Its segments lie in the worker's memory, which has places for a batch of them.
            tap_flush(w, counters)
            slot = 0
            while f.left:
                if slot == FINISH_BATCH:
                    tap_flush(w, counters)
                    slot = 0
                tap_write(w, port, finish_next(w, frame, &f, slot), able, counters)
                slot += 1
            tap_flush(w, counters)
    tap_flush(w, counters)


cdef inline int tap_receive(WorkerC *w, PortC *port, bint *lost) noexcept nogil:
    """Read up to a burst of frames into the staging buffer; returns how many.

    `lost` is set when the interface is gone for good. An interface that is merely down gives
    nothing to read.
    """
    cdef int n = 0
    cdef size_t at = 0
    cdef ssize_t got
    cdef Frame *frame
    lost[0] = False
    while n < BURST and at + TAP_SLOT_MAX <= STAGING_LEN:
        got = read(port.tap_fd, w.staging + at, VNET_HDR_MAX + MAX_FRAME_LEN)
        if got < 0:
            if errno == EBADFD:
                lost[0] = True
            break
        if got <= VNET_HDR_MAX:
            continue
        frame = &w.frames[n]
        memset(frame.hdr, 0, VNET_HDR_MAX)
        frame.vnet = w.staging + at
        frame.seg.ptr = w.staging + at + VNET_HDR_MAX
        frame.seg.len = <uint32_t>(got - VNET_HDR_MAX)
        frame.len = frame.seg.len
        frame.nseg = 1
        frame.more = 0
        frame.drop = 0
        at += (<size_t>got + 63) & ~<size_t>63
        n += 1
    return n
