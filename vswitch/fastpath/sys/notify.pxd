"""Declarations of notify.h."""

from libc.stdint cimport uint32_t

cdef extern from "notify.h" nogil:
    struct vs_notifier:
        unsigned long context
        int file
        uint32_t completed
    int vs_notifier_open(vs_notifier *n)
    void vs_notifier_close(vs_notifier *n)
    void vs_notify(vs_notifier *n, int fd)
