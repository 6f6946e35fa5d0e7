"""Frames as they leave, where that is not as they came.

An egress list names frames as they leave there. A change belongs to the pair of a frame and an egress, never
to the frame, which others get as it came: the list names a variant instead, whose head lies in the worker's
memory while the rest is the sender's, and which may stand on several lists. All that delivers takes it
for any other frame in pieces, and what its receiver cannot finish itself is finished from it (finish.pxd).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy

from vswitch.fastpath.shared.memory cimport Seg
from vswitch.fastpath.shared.sizes cimport BURST, FINISH_BATCH, HEAD_LEN, SEG_POOL, VARIANTS, VARIANT_SEGS
from vswitch.fastpath.shared.worker cimport Frame, WorkerC


cdef inline bint variant_fits(const WorkerC *w, const Frame *frame) noexcept nogil:
    """Whether there is room for another one; there is when all lists were delivered."""
    return w.n_variants < VARIANTS and w.n_variant_segs + frame.nseg <= VARIANT_SEGS


cdef inline uint8_t make_variant(WorkerC *w, const Frame *frame, const char *head) noexcept nogil:
    """A frame with other addresses, for egress lists: its place in `frames`. Call if variant_fits.

    The sender may rewrite the frame for as long as it is not copied: an address that something was
    decided by is what the receiver gets only from a head of our own.
    """
    cdef uint32_t slot = BURST + FINISH_BATCH + w.n_variants, skip = HEAD_LEN, k, n = 0
    cdef uint32_t first = SEG_POOL + FINISH_BATCH + w.n_variant_segs
    cdef Frame *out = &w.frames[slot]
    cdef Seg piece = frame.seg
    out[0] = frame[0]
    out.seg.ptr = w.heads_out[w.n_variants]
    out.seg.len = HEAD_LEN
    memcpy(out.seg.ptr, head, HEAD_LEN)
    for k in range(frame.nseg):
        if k:
            piece = w.segs[frame.more + k - 1]
        if piece.len <= skip:
            skip -= piece.len
            continue
        w.segs[first + n].ptr = piece.ptr + skip
        w.segs[first + n].len = piece.len - skip
        skip = 0
        n += 1
    out.more = <uint16_t>first
    out.nseg = <uint16_t>(1 + n)
    w.n_variants += 1
    w.n_variant_segs += n
    return <uint8_t>slot
