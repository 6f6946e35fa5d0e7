"""The software guests of the benchmarks, and the frames they send."""

from __future__ import annotations

import struct

from benchmarks.samples import Case
from vswitch import ethertypes
from vswitch.lab.guest import DEFAULT_FEATURES, BufferOptions, SoftwareGuest, Wanted
from vswitch.lab.guest.packets import checksum
from vswitch.lab.guest.shapes import MAX_HEADER_LEN
from vswitch.lab.guest.vnet import GSO_TCPV4, NEEDS_CSUM, VnetHeader
from vswitch.vhost_user.protocol import Feature

MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
FLOOD_PORTS = 32
"""Receivers of a "flood" or "spread" case."""
QUEUE_SIZE = 256
RX_BUF_LEN = 2048
IN_FLIGHT = 128
"""Frames of a direction that are under way at most."""
TSO_MSS = 1448
TSO_HEADERS_LEN = 14 + 20 + 32
TSO_FRAME_LEN = TSO_HEADERS_LEN + 45 * TSO_MSS
"""What Linux hands to its network device when it sends much: 45 segments with timestamps in one."""
TSO_QUEUE_SIZE = 64
TSO_RX_QUEUE_SIZE = 256
TSO_BUF_LEN = 4096
"""Receive buffers of a page, 16 to such a frame, as Linux has them with MRG_RXBUF."""
_TSO_FEATURES = Feature.CSUM | Feature.HOST_TSO4 | Feature.GUEST_CSUM | Feature.GUEST_TSO4


def guest(mac: str, case: Case, max_frame_len: int) -> SoftwareGuest:
    """A guest for this case, not connected.

    One descriptor a frame, as Linux has it for frames in one piece. Not strict: DPDK is lax about
    num_buffers.
    """
    tso = case.whole
    needed = Feature.RING_PACKED if case.ring == "packed" else Feature(0)
    if tso:
        needed |= _TSO_FEATURES
    return SoftwareGuest(
        mac,
        wanted=Wanted(features=DEFAULT_FEATURES | needed, required_features=needed),
        buffers=BufferOptions(
            queue_size=TSO_QUEUE_SIZE if tso else QUEUE_SIZE,
            rx_queue_size=TSO_RX_QUEUE_SIZE if tso else QUEUE_SIZE,
            indirect=False,
            max_frame_len=TSO_FRAME_LEN if tso else max_frame_len,
            rx_buf_len=TSO_BUF_LEN if tso else RX_BUF_LEN,
        ),
        strict=False,
        polling=True,
    )


def frames_under_way(frame_len: int, buf_len: int, buffers: int) -> int:
    """How many frames may be on their way to a receiveq with so many buffers of `buf_len` bytes."""
    return min(IN_FLIGHT, buffers // -(-(MAX_HEADER_LEN + frame_len) // buf_len))


def ethernet(dst: bytes, src: bytes, length: int) -> bytes:
    """A frame of `length` bytes, no frame check sequence."""
    return (dst + src + ethertypes.wire(ethertypes.EXPERIMENT)).ljust(length, b"\0")


def tso_frame(dst: bytes, src: bytes) -> tuple[bytes, bytes]:
    """A TCP segment of TSO_FRAME_LEN bytes that the device is to cut, and its virtio-net header."""
    ip_len = TSO_FRAME_LEN - 14
    addresses = bytes((10, 0, 0, 1, 10, 0, 0, 2))
    ip = struct.pack("!BBHHHBBH", 0x45, 0, ip_len, 1, 0x4000, 64, 6, 0) + addresses
    ip = ip[:10] + checksum(ip).to_bytes(2, "big") + ip[12:]
    # The sum over the pseudo-header, not inverted: the device goes on from there.
    pseudo = ~checksum(addresses + struct.pack("!BBH", 0, 6, ip_len - 20)) & 0xFFFF
    options = struct.pack("!BBBBII", 1, 1, 8, 10, 1, 1)
    tcp = struct.pack("!HHIIBBHHH", 5001, 5001, 1, 1, 8 << 4, 0x10, 65535, pseudo, 0) + options
    header = VnetHeader(NEEDS_CSUM, GSO_TCPV4, TSO_HEADERS_LEN, TSO_MSS, 34, 16)
    return (dst + src + b"\x08\x00" + ip + tcp).ljust(TSO_FRAME_LEN, b"\x55"), header.pack()
