"""The bytes of a frame, whatever pieces it is in."""

from libc.stdint cimport uint32_t
from libc.string cimport memcpy

from vswitch.fastpath.shared.memory cimport Seg
from vswitch.fastpath.shared.worker cimport Frame, WorkerC


cdef inline uint32_t gather_bytes(
    WorkerC *w, const Frame *frame, char *to, uint32_t length
) noexcept nogil:
    """Copy the first bytes of a frame; returns how many there were."""
    cdef uint32_t have = frame.seg.len, part, i
    cdef const Seg *seg
    if have >= length:
        memcpy(to, frame.seg.ptr, length)
        return length
    memcpy(to, frame.seg.ptr, have)
    for i in range(<uint32_t>frame.nseg - 1):
        seg = &w.segs[frame.more + i]
        part = length - have
        if part > seg.len:
            part = seg.len
        memcpy(to + have, seg.ptr, part)
        have += part
        if have == length:
            break
    return have
