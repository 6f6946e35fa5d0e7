"""Checksums and segmentation in software, for receivers that cannot take a frame as it is.

It is copied into the worker's memory and finished there, segment by segment (VIRTIO 1.2, 5.1.6.4).
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from vswitch.fastpath.shared.frame cimport gather_bytes
from vswitch.fastpath.shared.sizes cimport BURST, HEADERS_MAX, SEG_POOL, VNET_HDR_MAX
from vswitch.fastpath.shared.virtio cimport OFFLOAD_CSUM, OFFLOAD_NEVER_CSUM, OFFLOAD_VALID
from vswitch.fastpath.shared.worker cimport Frame, WorkerC
from vswitch.fastpath.sys.atomics cimport vs_compiler_barrier, vs_get16, vs_get32
from vswitch.fastpath.worker.headers cimport (
    F_NEEDS_CSUM,
    GSO_UDP,
    HDR_CSUM_OFFSET,
    HDR_CSUM_START,
    HDR_FLAGS,
    HDR_GSO_SIZE,
    HDR_GSO_TYPE,
    Headers,
    find_headers,
    put16,
    swap16,
)

cdef enum:
    TCP_FIN_PSH = 0x09
    TCP_CWR = 0x80
    IP_MORE_LE = 0x0020    # "more fragments" in frag_off as loaded on a little-endian machine
    FRAGMENT_LEN = 8       # IPv6 fragment header

cdef struct Finish:        # a frame on its way to one receiver that cannot take it as it is
    Headers headers
    uint32_t left          # segments to come
    uint32_t index         # of the next one
    uint32_t size          # payload of each but the last, bytes
    uint32_t at            # where the next one's payload begins
    uint32_t end           # the frame's length
    uint32_t partial       # unfolded sum of addresses and protocol
    uint32_t seq           # TCP: sequence number of the first
    uint32_t fragment_id
    uint16_t ip_id         # IPv4: identification of the first
    uint8_t gso            # GSO_*, 0 when only the checksum is missing
    uint8_t raw            # the frame is given as it is, but without its header
    uint8_t leave_csum     # the receiver fills in checksums itself


cdef inline uint32_t swap32(uint32_t value) noexcept nogil:
    return (
        value >> 24 | (value >> 8 & <uint32_t>0xFF00) | (value << 8 & <uint32_t>0xFF0000)
        | value << 24
    )


cdef inline void put32(char *to, uint32_t value) noexcept nogil:
    memcpy(to, &value, 4)


cdef inline uint64_t sum_bytes(const char *data, uint32_t length) noexcept nogil:
    """Unfolded ones' complement sum (RFC 1071) in memory order; no carry is lost below 16 GiB."""
    cdef uint64_t total = 0
    cdef uint32_t i, words = length >> 2
    for i in range(words):
        total += vs_get32(data + 4 * <size_t>i)
    data += 4 * <size_t>words
    if length & 2:
        total += vs_get16(data)
        data += 2
    if length & 1:
        total += <uint8_t>data[0]
    return total


cdef inline uint32_t fold(uint64_t total) noexcept nogil:
    """A sum of 16 bits."""
    total = (total & <uint64_t>0xFFFFFFFFu) + (total >> 32)
    total = (total & <uint64_t>0xFFFFFFFFu) + (total >> 32)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return <uint32_t>total


cdef inline void fill_checksum(char *data, uint32_t length, uint32_t start, uint32_t offset) noexcept nogil:
    """Complete a checksum that holds the sum of the pseudo-header; 0 becomes 0xFFFF (RFC 768)."""
    cdef uint32_t value = fold(sum_bytes(data + start, length - start)) ^ 0xFFFF
    put16(data + start + offset, value if value else 0xFFFF)


cdef inline uint32_t finish_begin(
    WorkerC *w, const Frame *frame, uint8_t takes, Finish *f
) noexcept nogil:
    """Prepare to finish a frame for a receiver that takes the OFFLOAD_* in `takes` and no more.

    Returns how many frames `finish_next` will make of it. 0: the guest has rewritten its frame
    since it was checked, and it is a DROP_BAD_GSO now.
    """
    cdef const char *hdr = <const char *>frame.hdr
    cdef uint32_t start = vs_get16(hdr + HDR_CSUM_START), offset = vs_get16(hdr + HDR_CSUM_OFFSET)
    cdef uint32_t have, l4_len
    memset(f, 0, sizeof(Finish))
    f.left = 1
    f.raw = frame.needs == OFFLOAD_VALID
    if f.raw:
        return 1
    f.end = gather_bytes(w, frame, w.linear, frame.len)
    vs_compiler_barrier()
    f.leave_csum = takes & OFFLOAD_CSUM and not frame.needs & OFFLOAD_NEVER_CSUM
    f.gso = <uint8_t>hdr[HDR_GSO_TYPE] & 0x7F
    if f.gso == 0:
        fill_checksum(w.linear, f.end, start, offset)
        return 1
    # Here and from here on the copy counts, which nobody else can change.
    have = f.end if f.end < HEADERS_MAX else HEADERS_MAX
    if not find_headers(w.linear, have, f.gso, &f.headers) or f.headers.l4 != start:
        return 0
    f.size = vs_get16(hdr + HDR_GSO_SIZE)
    if f.gso == GSO_UDP:
        fill_checksum(w.linear, f.end, start, offset)
        f.headers.len = f.headers.l4
        f.fragment_id = w.fragment_id
        w.fragment_id += 1
    else:
        # The driver has summed the pseudo-header of the whole; what differs is the length.
        l4_len = f.end - f.headers.l4
        f.partial = vs_get16(w.linear + start + offset) + (swap16(l4_len) ^ 0xFFFF)
        if f.headers.proto == 6:
            f.seq = swap32(vs_get32(w.linear + f.headers.l4 + 4))
    f.ip_id = swap16(vs_get16(w.linear + f.headers.l3 + 4))
    f.at = f.headers.len
    f.left = (f.end - f.at + f.size - 1) // f.size
    return f.left


cdef inline uint32_t finish_work(const Finish *f) noexcept nogil:
    """What finishing a frame costs, as WorkerC.work: a byte is looked at twice, a segment has headers."""
    return 0 if f.raw else 32 * f.left + (f.end >> 4)


cdef inline void finish_tcp(Finish *f, char *l4, bint last) noexcept nogil:
    put32(l4 + 4, swap32(f.seq + (f.at - f.headers.len)))
    if not last:
        l4[13] &= <char>~TCP_FIN_PSH
    if f.index:
        l4[13] &= <char>~TCP_CWR


cdef inline void finish_fragment(Finish *f, char *headers, uint32_t *length, bint last) noexcept nogil:
    """Make a fragment's headers (RFC 791; RFC 8200, section 4.5)."""
    cdef uint32_t offset = f.at - f.headers.len
    cdef char *at
    if f.headers.version == 4:
        put16(headers + f.headers.l3 + 6, swap16(offset >> 3) | (0 if last else IP_MORE_LE))
        return
    at = headers + length[0]
    at[0] = headers[f.headers.next_at]
    at[1] = 0
    put16(at + 2, swap16(offset | (0 if last else 1)))
    put32(at + 4, f.fragment_id)
    headers[f.headers.next_at] = 44
    length[0] += FRAGMENT_LEN


cdef inline void finish_checksum(
    Finish *f, char *headers, const char *payload, uint32_t n, Frame *out
) noexcept nogil:
    """The TCP or UDP checksum of one segment, or what the receiver needs to do it itself."""
    cdef uint32_t offset = 16 if f.headers.proto == 6 else 6
    cdef uint32_t l4_len = f.headers.len - f.headers.l4 + n, value
    cdef char *field = headers + f.headers.l4 + offset
    cdef char *hdr = <char *>out.hdr
    put16(field, fold(f.partial + <uint64_t>swap16(l4_len)))
    if f.leave_csum:
        hdr[HDR_FLAGS] = F_NEEDS_CSUM
        put16(hdr + HDR_CSUM_START, f.headers.l4)
        put16(hdr + HDR_CSUM_OFFSET, offset)
        return
    value = 0xFFFF ^ fold(
        sum_bytes(headers + f.headers.l4, f.headers.len - f.headers.l4) + sum_bytes(payload, n)
    )
    put16(field, 0xFFFF if value == 0 and f.headers.proto == 17 else value)


cdef inline Frame *finish_next(
    WorkerC *w, const Frame *frame, Finish *f, uint32_t slot
) noexcept nogil:
    """Make the next frame, in place `slot` below FINISH_BATCH of the worker's memory.

    It is `w.frames[BURST + slot]`.
    """
    cdef uint32_t n, length, l3 = f.headers.l3
    cdef Frame *out = &w.frames[BURST + slot]
    cdef char *headers = w.headers[slot]
    cdef bint last
    f.left -= 1
    out[0] = frame[0]
    memset(out.hdr, 0, VNET_HDR_MAX)
    out.needs = 0
    if f.raw:
        return out
    out.more = <uint16_t>(SEG_POOL + slot)
    if f.gso == 0:
        out.seg.ptr = w.linear
        out.seg.len = out.len = f.end
        out.nseg = 1
        return out
    n = f.end - f.at
    last = n <= f.size
    if not last:
        n = f.size
    length = f.headers.len
    memcpy(headers, w.linear, length)
    if f.gso == GSO_UDP:
        finish_fragment(f, headers, &length, last)
    else:
        if f.headers.version == 4:
            put16(headers + l3 + 4, swap16(f.ip_id + f.index))
        if f.headers.proto == 6:
            finish_tcp(f, headers + f.headers.l4, last)
        else:
            put16(headers + f.headers.l4 + 4, swap16(8 + n))
        finish_checksum(f, headers, w.linear + f.at, n, out)
    if f.headers.version == 4:
        put16(headers + l3 + 2, swap16(length - l3 + n))
        put16(headers + l3 + 10, 0)
        put16(
            headers + l3 + 10,
            0xFFFF ^ fold(sum_bytes(headers + l3, 4 * (<uint32_t>headers[l3] & 0xF))),
        )
    else:
        put16(headers + l3 + 4, swap16(length - l3 - 40 + n))
    w.segs[SEG_POOL + slot].ptr = w.linear + f.at
    w.segs[SEG_POOL + slot].len = n
    out.seg.ptr = headers
    out.seg.len = length
    out.nseg = 2
    out.len = length + n
    f.at += n
    f.index += 1
    return out
