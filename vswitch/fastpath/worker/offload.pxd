"""Checksums and segmentation: what a frame's virtio_net_hdr asks for, and doing it in software.

VIRTIO 1.2, sections 5.1.6.2 (what a driver asks for) and 5.1.6.4 (what it is given). A frame is
checked once, when it comes in. To a receiver that takes what the frame asks for it goes as it is;
for another one it is copied into the worker's memory and finished there, segment by segment.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from vswitch.fastpath.shared.frame cimport gather_bytes
from vswitch.fastpath.shared.types cimport (
    BURST,
    DROP_BAD_CSUM,
    DROP_BAD_GSO,
    DROP_OFFLOAD_UNNEGOTIATED,
    DROP_OVERSIZE,
    ETH_HLEN,
    HEADERS_MAX,
    MAX_FRAME_LEN,
    OFFLOAD_CSUM,
    OFFLOAD_ECN,
    OFFLOAD_NEVER,
    OFFLOAD_NEVER_CSUM,
    OFFLOAD_TSO4,
    OFFLOAD_TSO6,
    OFFLOAD_UFO,
    OFFLOAD_USO4,
    OFFLOAD_USO6,
    OFFLOAD_VALID,
    SEG_POOL,
    VNET_HDR_MAX,
    Frame,
    WorkerC,
)
from vswitch.fastpath.sys.atomics cimport vs_compiler_barrier, vs_get16, vs_get32

# struct virtio_net_hdr: flags, gso_type, then four little-endian numbers.
cdef enum:
    HDR_FLAGS = 0
    HDR_GSO_TYPE = 1
    HDR_HDR_LEN = 2
    HDR_GSO_SIZE = 4
    HDR_CSUM_START = 6
    HDR_CSUM_OFFSET = 8
    HDR_LEN = 10
    F_NEEDS_CSUM = 1
    F_DATA_VALID = 2
    GSO_TCPV4 = 1
    GSO_UDP = 3
    GSO_TCPV6 = 4
    GSO_UDP_L4 = 5
    GSO_ECN = 0x80

cdef enum:
    MAX_SEGMENTS = 2048    # of one frame: a guest may not keep a worker busy with a gso_size of 1
    MAX_UDP_SEGMENTS = 128 # of one frame that Linux takes as it is (UDP_MAX_SEGMENTS)
    TCP_FIN_PSH = 0x09
    TCP_CWR = 0x80
    IP_MORE_LE = 0x0020    # "more fragments" in frag_off as loaded on a little-endian machine
    IP_FRAGMENT_LE = 0xFF3F  # "more fragments" and the offset
    FRAGMENT_LEN = 8       # IPv6 fragment header
    DHCP_SERVER_PORT = 67

cdef struct Headers:       # offsets from the first byte of the frame
    uint32_t l3
    uint32_t l4
    uint32_t len           # of all headers: where the payload begins
    uint32_t next_at       # IPv6: the byte that says which header stands at l4
    uint8_t version        # 4 or 6
    uint8_t proto          # 6 or 17

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


cdef inline uint16_t swap16(uint32_t value) noexcept nogil:
    return <uint16_t>((value & 0xFF) << 8 | (value >> 8 & 0xFF))


cdef inline uint32_t swap32(uint32_t value) noexcept nogil:
    return (
        value >> 24 | (value >> 8 & <uint32_t>0xFF00) | (value << 8 & <uint32_t>0xFF0000)
        | value << 24
    )


cdef inline void put16(char *to, uint32_t value) noexcept nogil:
    cdef uint16_t v = <uint16_t>value
    memcpy(to, &v, 2)


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


cdef inline bint find_headers(
    const char *data, uint32_t have, uint8_t gso, Headers *found
) noexcept nogil:
    """Find the headers that a gso_type (without GSO_ECN) claims a frame has.

    `have` counts the bytes of the frame in `data`, HEADERS_MAX at most. VLAN tags and IPv6
    extension headers are passed over. False when the frame is something else, or is a fragment.
    """
    cdef uint32_t at = ETH_HLEN, length
    cdef uint16_t ethertype
    cdef uint8_t proto
    if have < at:
        return False
    ethertype = vs_get16(data + 12)
    while ethertype == 0x0081 or ethertype == 0xA888:  # 0x8100 and 0x88a8
        if have < at + 4:
            return False
        ethertype = vs_get16(data + at + 2)
        at += 4
    found.l3 = at
    if ethertype == 0x0008:
        if have < at + 20 or <uint8_t>data[at] >> 4 != 4:
            return False
        length = 4 * (<uint32_t>data[at] & 0xF)
        if length < 20 or vs_get16(data + at + 6) & IP_FRAGMENT_LE:
            return False
        found.version = 4
        found.next_at = at + 9
        proto = <uint8_t>data[at + 9]
        at += length
    elif ethertype == 0xDD86:
        if have < at + 40 or <uint8_t>data[at] >> 4 != 6:
            return False
        found.version = 6
        found.next_at = at + 6
        proto = <uint8_t>data[at + 6]
        at += 40
        while proto == 0 or proto == 43 or proto == 60:  # hop-by-hop, routing, destination options
            if have < at + 8:
                return False
            found.next_at = at
            proto = <uint8_t>data[at]
            at += 8 * (<uint32_t><uint8_t>data[at + 1] + 1)
    else:
        return False
    found.l4 = at
    found.proto = proto
    if proto == 6:
        if have < at + 20:
            return False
        length = <uint32_t>(<uint8_t>data[at + 12] >> 4) * 4
        if length < 20:
            return False
    elif proto == 17:
        length = 8
    else:
        return False
    found.len = at + length
    if have < found.len:
        return False
    if gso == GSO_TCPV4:
        return proto == 6 and found.version == 4
    if gso == GSO_TCPV6:
        return proto == 6 and found.version == 6
    return proto == 17


cdef inline bint from_dhcp_server(WorkerC *w, const Frame *frame, uint32_t l4) noexcept nogil:
    """Whether a frame is UDP over IPv4 from port 67, with its UDP header at `l4`.

    DHCP clients read replies from packet sockets, past the stack that would know that the checksum
    is yet to be filled in, and many believe what stands there. So it is never left to a receiver. (DHCPv6
    clients have an address by then and use UDP sockets.)
    """
    cdef char headers[HEADERS_MAX]
    cdef Headers found
    cdef uint32_t have
    if l4 + 8 > HEADERS_MAX:
        return False
    have = gather_bytes(w, frame, headers, l4 + 8)
    vs_compiler_barrier()
    return (
        have == l4 + 8
        and vs_get16(headers + l4) == swap16(DHCP_SERVER_PORT)
        and find_headers(headers, have, GSO_UDP, &found)
        and found.version == 4
        and found.l4 == l4
    )


cdef inline uint8_t check_offload(
    WorkerC *w, Frame *frame, uint8_t allowed, bint trusted
) noexcept nogil:
    """Check a virtio_net_hdr that is not empty, and note what the frame needs.

    The header is read once. `frame.hdr` is what receivers get: hdr_len is ours, flags that mean
    nothing from a driver are gone. `allowed` has the OFFLOAD_* that were negotiated;
    `trusted` is for frames from the kernel, whose DATA_VALID counts. Returns a Drop + 1, or 0.
    """
    cdef char headers[HEADERS_MAX]
    cdef char asked[HDR_LEN]
    cdef char *hdr = <char *>frame.hdr
    cdef Headers found
    cdef uint32_t start, offset, size, payload, have
    cdef uint8_t flags, gso, needs
    memcpy(asked, frame.vnet, HDR_LEN)
    vs_compiler_barrier()
    flags = <uint8_t>asked[HDR_FLAGS]
    gso = <uint8_t>asked[HDR_GSO_TYPE]
    start = vs_get16(asked + HDR_CSUM_START)
    offset = vs_get16(asked + HDR_CSUM_OFFSET)
    size = vs_get16(asked + HDR_GSO_SIZE)
    memset(hdr, 0, VNET_HDR_MAX)
    if not flags & F_NEEDS_CSUM:
        if gso:
            return DROP_BAD_GSO + 1
        if flags & F_DATA_VALID and trusted:
            hdr[HDR_FLAGS] = F_DATA_VALID
            frame.needs = OFFLOAD_VALID
        return 0
    if not allowed & OFFLOAD_CSUM:
        return DROP_OFFLOAD_UNNEGOTIATED + 1
    # Not in the Ethernet header either: by that the frame's way was chosen.
    if start < ETH_HLEN or start + offset + 2 > frame.len:
        return DROP_BAD_CSUM + 1
    hdr[HDR_FLAGS] = F_NEEDS_CSUM
    put16(hdr + HDR_CSUM_START, start)
    put16(hdr + HDR_CSUM_OFFSET, offset)
    frame.needs = OFFLOAD_CSUM
    if offset == 6 and from_dhcp_server(w, frame, start):
        frame.needs |= OFFLOAD_NEVER_CSUM
    if gso == 0:
        return 0
    needs = 0
    if gso & GSO_ECN:
        gso &= 0x7F
        if gso != GSO_TCPV4 and gso != GSO_TCPV6:
            return DROP_BAD_GSO + 1
        needs = OFFLOAD_ECN
    have = gather_bytes(w, frame, headers, HEADERS_MAX)
    vs_compiler_barrier()
    if size == 0 or not find_headers(headers, have, gso, &found):
        return DROP_BAD_GSO + 1
    if start != found.l4 or offset != (16 if found.proto == 6 else 6):
        return DROP_BAD_CSUM + 1
    payload = frame.len - found.len
    if gso == GSO_TCPV4:
        needs |= OFFLOAD_TSO4
    elif gso == GSO_TCPV6:
        needs |= OFFLOAD_TSO6
    elif gso == GSO_UDP_L4:
        needs |= OFFLOAD_USO4 if found.version == 4 else OFFLOAD_USO6
    elif gso == GSO_UDP:
        needs |= OFFLOAD_UFO
        # Fragments of a datagram: what is cut up begins with the UDP header, in units of 8 bytes.
        found.len = found.l4
        payload += 8
        size &= ~<uint32_t>7
        if size == 0:
            return DROP_BAD_GSO + 1
    else:
        return DROP_BAD_GSO + 1
    if needs & ~allowed:
        return DROP_OFFLOAD_UNNEGOTIATED + 1
    if frame.len > MAX_FRAME_LEN:
        return DROP_OVERSIZE + 1
    if payload <= size:
        return 0  # one segment is no segmentation
    if payload > size * MAX_SEGMENTS:
        return DROP_BAD_GSO + 1
    frame.wire_len = found.len + size
    if gso == GSO_UDP and found.version == 6:
        frame.wire_len += FRAGMENT_LEN
    frame.needs |= needs
    if gso == GSO_UDP_L4 and payload > size * MAX_UDP_SEGMENTS:
        frame.needs |= OFFLOAD_NEVER
    hdr[HDR_GSO_TYPE] = gso | (GSO_ECN if needs & OFFLOAD_ECN else 0)
    put16(hdr + HDR_GSO_SIZE, size)
    put16(hdr + HDR_HDR_LEN, found.len + (8 if gso == GSO_UDP else 0))
    return 0


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
