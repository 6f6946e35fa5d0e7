"""Bitmaps that others set bits in."""

from libc.stdint cimport uint8_t, uint64_t


cdef extern from "barriers.h" nogil:
    uint64_t guest_exchange_u64(uint64_t *p, uint64_t value)
    int guest_lowest_bit(uint64_t word)


def fetch_and_clear(bitmap not None):
    """The bits that are set in a writable buffer that others set bits in meanwhile, and clear them.

    Word by word in one step each, as a hypervisor reads a log of written pages: no bit is lost, and
    what was written before it was set can be read afterwards. The buffer's length is a multiple of
    8 bytes and its address, too.
    """
    cdef uint8_t[::1] view = bitmap
    cdef uint64_t *words = <uint64_t *>&view[0]
    cdef uint64_t word
    cdef Py_ssize_t at
    if view.shape[0] % 8 or <uint64_t>words % 8:
        raise ValueError("a bitmap is made of words of 8 bytes")
    found = []
    for at in range(view.shape[0] // 8):
        if words[at] == 0:
            continue
        word = guest_exchange_u64(&words[at], 0)
        while word:
            found.append(64 * at + guest_lowest_bit(word))
            word &= word - 1
    return found
