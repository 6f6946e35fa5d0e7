"""Offloads: what a frame's virtio_net_hdr asks for.

VIRTIO 1.2, sections 5.1.6.2 (what a driver asks for) and 5.1.6.4 (what it is given). A frame is
checked once, when it comes in. To a receiver that takes what the frame asks for it goes as it is;
for another one it is finished, see finish.pxd.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset

from vswitch.fastpath.shared.frame cimport gather_bytes
from vswitch.fastpath.shared.sizes cimport ETH_HLEN, HEADERS_MAX, MAX_FRAME_LEN, VNET_HDR_MAX
from vswitch.fastpath.shared.virtio cimport (
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
)
from vswitch.fastpath.shared.words cimport (
    DROP_BAD_CSUM,
    DROP_BAD_GSO,
    DROP_OFFLOAD_UNNEGOTIATED,
    DROP_OVERSIZE,
)
from vswitch.fastpath.shared.worker cimport Frame, WorkerC
from vswitch.fastpath.sys.atomics cimport vs_compiler_barrier, vs_get16
from vswitch.fastpath.worker.finish cimport FRAGMENT_LEN
from vswitch.fastpath.worker.headers cimport (
    F_DATA_VALID,
    F_NEEDS_CSUM,
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    GSO_UDP_L4,
    HDR_CSUM_OFFSET,
    HDR_CSUM_START,
    HDR_FLAGS,
    HDR_GSO_SIZE,
    HDR_GSO_TYPE,
    HDR_HDR_LEN,
    HDR_LEN,
    Headers,
    find_headers,
    put16,
    swap16,
)

cdef enum:
    MAX_SEGMENTS = 2048    # of one frame: a guest may not keep a worker busy with a gso_size of 1
    MAX_UDP_SEGMENTS = 128 # of one frame that Linux takes as it is (UDP_MAX_SEGMENTS)
    DHCP_SERVER_PORT = 67


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


cdef inline uint8_t check_gso(
    WorkerC *w, Frame *frame, uint8_t allowed, uint8_t gso, uint32_t size
) noexcept nogil:
    """Check what segmentation a frame asks for, whose checksum is to be filled in; a Drop + 1, or 0.

    `gso` and `size` are the header's gso_type, not 0, and gso_size.
    """
    cdef char headers[HEADERS_MAX]
    cdef char *hdr = <char *>frame.hdr
    cdef Headers found
    cdef uint32_t payload, have
    cdef uint8_t needs
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
    if (
        vs_get16(hdr + HDR_CSUM_START) != found.l4
        or vs_get16(hdr + HDR_CSUM_OFFSET) != (16 if found.proto == 6 else 6)
    ):
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


cdef inline uint8_t check_offload(
    WorkerC *w, Frame *frame, uint8_t allowed, bint trusted
) noexcept nogil:
    """Check a virtio_net_hdr that is not empty, and note what the frame needs.

    The header is read once. `frame.hdr` is what receivers get: hdr_len is ours, flags that mean
    nothing from a driver are gone. `allowed` has the OFFLOAD_* that were negotiated;
    `trusted` is for frames from the kernel, whose DATA_VALID counts. Returns a Drop + 1, or 0.
    """
    cdef char asked[HDR_LEN]
    cdef char *hdr = <char *>frame.hdr
    cdef uint32_t start, offset
    cdef uint8_t flags, gso
    memcpy(asked, frame.vnet, HDR_LEN)
    vs_compiler_barrier()
    flags = <uint8_t>asked[HDR_FLAGS]
    gso = <uint8_t>asked[HDR_GSO_TYPE]
    start = vs_get16(asked + HDR_CSUM_START)
    offset = vs_get16(asked + HDR_CSUM_OFFSET)
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
    return check_gso(w, frame, allowed, gso, vs_get16(asked + HDR_GSO_SIZE))
