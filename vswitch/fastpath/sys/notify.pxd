"""Declarations of notify.h."""

cdef extern from "notify.h" nogil:
    struct vs_notifier:
        unsigned long context
        int file
    int vs_notifier_open(vs_notifier *n)
    void vs_notifier_close(vs_notifier *n)
    void vs_notify(vs_notifier *n, int fd)
