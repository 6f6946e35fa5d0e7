"""Frames from the host to a software guest: several a system call through a packet socket."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, ENOBUFS, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

import os

from vswitch.lab.load.flow cimport FlowC, receive_burst
from vswitch.lab.load.load cimport Flow


cdef extern from "barriers.h" nogil:
    void guest_pause()
    uint64_t guest_now_ns()


cdef extern from "<sched.h>" nogil:
    int sched_yield()


cdef extern from "<sys/socket.h>" nogil:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    """
    enum:
        MSG_DONTWAIT
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    struct mmsghdr:
        msghdr msg_hdr
    int sendmmsg(int fd, mmsghdr *msgs, unsigned int n, int flags)


cdef enum:
    BATCH = 32
    CLOCK_EVERY = 16           # loops between two looks at the clock
    YIELD_AFTER = 4096         # loops without work before the core is offered to others
    WRITE_OFF_NS = 100000000   # a window without an arrival for so long is lost


def from_host(Flow flow not None, int fd, bytes frame not None, double seconds, uint32_t window):
    """Send a frame from a packet socket again and again, and take what arrives in a flow's receiveq.

    At most `window` of them are under way. Returns frames that arrived a second, frames sent and
    frames received. OSError when the socket refuses, DeviceError when the device breaks a rule.
    """
    cdef mmsghdr[BATCH] messages
    cdef iovec piece
    cdef FlowC *c = &flow.c
    cdef uint64_t start, now, deadline, sent = 0, given_up = 0, moved_ns
    cdef uint32_t loops = 0, idle = 0, room, i
    cdef int rc = 0, error = 0, n
    if c.rx == NULL or not window:
        raise ValueError("a receiveq and a window are needed")
    piece.iov_base = PyBytes_AS_STRING(frame)
    piece.iov_len = PyBytes_GET_SIZE(frame)
    memset(messages, 0, sizeof(messages))
    for i in range(<uint32_t>BATCH):
        messages[i].msg_hdr.msg_iov = &piece
        messages[i].msg_hdr.msg_iovlen = 1
    flow._begin(0)
    with nogil:
        now = start = moved_ns = guest_now_ns()
        deadline = start + <uint64_t>(seconds * 1e9)
        while now < deadline:
            rc = receive_burst(c)
            if rc < 0:
                c.rx_broke = True
                break
            n = 0
            if sent < c.received + given_up + window:
                room = <uint32_t>(c.received + given_up + window - sent)
                n = sendmmsg(fd, messages, room if room < BATCH else BATCH, MSG_DONTWAIT)
                if n > 0:
                    sent += n
                elif errno != EAGAIN and errno != ENOBUFS:
                    error = errno
                    break
            if rc > 0:
                moved_ns = now
            if rc > 0 or n > 0:
                idle = 0
            else:
                idle += 1
                guest_pause()
                if idle % YIELD_AFTER == 0:
                    sched_yield()
            loops += 1
            if loops % CLOCK_EVERY == 0:
                now = guest_now_ns()
                if now > moved_ns + <uint64_t>WRITE_OFF_NS:
                    given_up = sent - c.received
                    moved_ns = now
        now = guest_now_ns()
    flow._end()
    if rc < 0:
        raise flow._broken(rc)
    if error:
        raise OSError(error, os.strerror(error))
    return c.received / ((now - start) / 1e9), sent, c.received
