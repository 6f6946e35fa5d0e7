"""Bytes from one descriptor to another, in a thread that Python never waits for."""

from libc.errno cimport EAGAIN, EINTR, errno

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buf, size_t count)
    ssize_t write(int fd, const void *buf, size_t count)
    int usleep(unsigned int microseconds)

cdef enum:
    CHUNK_LEN = 4096
    FULL_US = 10000  # until the next try, where somebody else made the sink non-blocking


def pump(int source, int sink):
    """Copy until `source` ends, however long the sink's reader takes; without the GIL.

    A sink that is closed swallows the rest.
    """
    cdef char data[CHUNK_LEN]
    cdef ssize_t n, done, written
    with nogil:
        while True:
            n = read(source, data, CHUNK_LEN)
            if n == 0 or (n < 0 and errno != EINTR):
                break
            done = 0
            while done < n:
                written = write(sink, data + done, n - done)
                if written > 0:
                    done += written
                elif written < 0 and errno == EAGAIN:
                    usleep(FULL_US)
                elif written < 0 and errno != EINTR:
                    break
