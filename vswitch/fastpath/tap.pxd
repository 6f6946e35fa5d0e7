"""The TAP uplink: one frame a system call, with a virtio_net_hdr before each (Linux tun.h)."""

from libc.errno cimport EAGAIN, EBADFD, EINTR, EIO, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memset

from vswitch.fastpath.atomics cimport vs_load32
from vswitch.fastpath.offload cimport Finish, finish_begin, finish_next
from vswitch.fastpath.types cimport (
    BURST,
    DROP_BAD_GSO,
    DROP_EGRESS_MTU,
    DROP_TAP_BUSY,
    DROP_TAP_DOWN,
    DROP_TAP_ERROR,
    MAX_CHAIN,
    MAX_FRAME_LEN,
    VNET_HDR_MAX,
    Counters,
    Frame,
    PortC,
    WorkerC,
)

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t writev(int fd, const iovec *iov, int count)

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buf, size_t count)

cdef enum:
    STAGING_LEN = 262144  # bytes a worker reads ahead from a TAP in one burst
    TAP_SLOT_MAX = 65664  # the longest frame with its header, rounded up to a cache line


cdef inline void tap_write(
    WorkerC *w, PortC *port, const Frame *frame, Counters *counters
) noexcept nogil:
    """Write one frame with its header, straight from where it lies.

    The kernel does the copy; memory that a frontend has taken away meanwhile is EFAULT here, not a
    signal.
    """
    cdef iovec iov[MAX_CHAIN + 1]
    cdef uint16_t k
    cdef ssize_t done
    iov[0].iov_base = <void *>frame.hdr
    iov[0].iov_len = VNET_HDR_MAX
    iov[1].iov_base = frame.seg.ptr
    iov[1].iov_len = frame.seg.len
    for k in range(<uint16_t>(frame.nseg - 1)):
        iov[2 + k].iov_base = w.segs[frame.more + k].ptr
        iov[2 + k].iov_len = w.segs[frame.more + k].len
    done = writev(port.tap_fd, iov, 1 + frame.nseg)
    if done >= 0:
        counters.egress_frames += 1
        counters.egress_bytes += frame.len
    elif errno == EAGAIN or errno == EINTR:
        counters.drops[DROP_TAP_BUSY] += 1
    elif errno == EIO or errno == EBADFD:
        counters.drops[DROP_TAP_DOWN] += 1
    else:
        counters.drops[DROP_TAP_ERROR] += 1


cdef inline void tap_send(
    WorkerC *w, PortC *port, const uint8_t *which, uint16_t n, Counters *counters
) noexcept nogil:
    """Write frames to the TAP; those that the kernel cannot finish are finished here."""
    cdef Finish f
    cdef const Frame *frame
    cdef uint16_t i
    for i in range(n):
        frame = &w.frames[which[i]]
        if frame.wire_len > vs_load32(&port.max_len):
            counters.drops[DROP_EGRESS_MTU] += 1
        elif not frame.needs & ~port.offloads:
            tap_write(w, port, frame, counters)
        elif finish_begin(w, frame, <uint8_t>port.offloads, &f) == 0:
            counters.drops[DROP_BAD_GSO] += 1
        else:
            while f.left:
                tap_write(w, port, finish_next(w, frame, &f, 0), counters)


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
