"""Declarations of uring.h."""

from libc.stdint cimport int32_t, uint32_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t writev(int fd, const iovec *iov, int count)

cdef extern from "uring.h" nogil:
    enum:
        VS_URING_SLOTS
    struct vs_uring:
        int fd
        uint32_t queued
        uint32_t refused
        int32_t results[64]
    int vs_uring_open(vs_uring *u)
    void vs_uring_close(vs_uring *u)
    void vs_uring_write(vs_uring *u, int fd, const void *buffer, uint32_t n)
    void vs_uring_writev(vs_uring *u, int fd, const iovec *iov, uint32_t n)
    void vs_uring_submit(vs_uring *u)
