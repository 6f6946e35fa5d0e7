"""Checksums and segments made in software are, byte for byte, those that the kernel makes.

The same frame with the same virtio_net_hdr goes through the switch from one software guest to one
without offloads, and through a bridge from one TAP to another without offloads.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.frames import ETHERTYPE_TEST
from tests.support.ippackets import ACK, CWR, ECE, FIN, PSH, QINQ, SRC, TCP, UDP, VLAN, Packet
from tests.support.rig import Rig, running
from tests.unit.host.test_tap import ip, setns, unshare_network
from vswitch.host.tap import VNET_HDR_LEN, Tap, open_tap
from vswitch.lab.guest import vnet
from vswitch.lab.guest.vnet import VnetHeader
from vswitch.ports import offloads

pytestmark = pytest.mark.root("makes network namespaces")

MARKER = b"\xff" * 6 + SRC + ETHERTYPE_TEST + bytes(46)
READ_LEN = 1 << 17


class Kernel:
    """Two TAPs on a bridge, the second one without offloads."""

    def __init__(self, source: Tap, sink: Tap) -> None:
        self._source, self._sink = source, sink
        self._poll = select.poll()
        self._poll.register(sink.fd, select.POLLIN)

    def finish(self, header: VnetHeader, frame: bytes) -> list[bytes]:
        """What the kernel makes of a frame for a device that can do nothing."""
        os.write(self._source.fd, header.pack() + frame)
        os.write(self._source.fd, bytes(VNET_HDR_LEN) + MARKER)
        found: list[bytes] = []
        while True:
            assert self._poll.poll(5000), "the marker did not arrive"
            data = os.read(self._sink.fd, READ_LEN)
            got = data[VNET_HDR_LEN:]
            if got == MARKER:
                return found
            if got[6:12] == SRC:  # and not a frame of the kernel's own
                assert data[0] in (0, vnet.DATA_VALID)
                assert data[1] == vnet.GSO_NONE
                found.append(got)


class Both:
    def __init__(self, kernel: Kernel, rig: Rig) -> None:
        self.kernel = kernel
        self.rig = rig
        self.sender, self.ingress = rig.guest(1)
        self.receiver, self.egress = rig.guest(2, 0, rx_queue_size=1024, rx_buf_len=4096)

    def switch(self, header: VnetHeader, frame: bytes) -> list[bytes]:
        """What the switch makes of it."""
        self.sender.send([frame], header=header.pack())
        self.sender.send([MARKER])
        found: list[bytes] = []
        while True:
            ((hdr, got),) = self.receiver.recv_with_headers(1)
            if got == MARKER:
                return found
            assert (hdr.flags, hdr.gso_type, hdr.gso_size) == (0, 0, 0)
            found.append(got)

    def compare(self, header: VnetHeader, frame: bytes) -> list[bytes]:
        ours, theirs = self.switch(header, frame), self.kernel.finish(header, frame)
        assert [len(f) for f in ours] == [len(f) for f in theirs]
        for mine, its in zip(ours, theirs, strict=True):
            assert mine == its
        assert self.rig.drops(self.ingress) == self.rig.drops(self.egress) == {}
        return ours


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    unshare_network()
    try:
        ip("link", "add", "br0", "mtu", "65535", "up", "type", "bridge")
        everything = offloads.mask(True)
        with (
            open_tap("k0", mtu=65521, bridge="br0", offloads=everything) as source,
            open_tap("k1", mtu=65521, bridge="br0") as sink,
            running() as rig,
        ):
            assert source.offloads == everything, "this kernel knows no USO"
            yield Both(Kernel(source, sink), rig)
    finally:
        setns(before)
        os.close(before)


def pattern(length: int) -> bytes:
    return (bytes(range(251)) * (length // 251 + 1))[:length]


HOP_BY_HOP = (0, bytes([0, 0, 1, 4, 0, 0, 0, 0]))
DESTINATION = (60, bytes([0, 0, 1, 12]) + bytes(12))

SHAPES = {
    "tcp4": {},
    "tcp6": {"version": 6},
    "udp4": {"proto": UDP},
    "udp6": {"proto": UDP, "version": 6},
    "tcp4 options": {"options": b"\x94\x04\0\0" + b"\x01" * 8, "tcp_options": b"\x01" * 12},
    "tcp6 options": {"version": 6, "tcp_options": b"\x01" * 40},
    "udp4 options": {"proto": UDP, "options": b"\x01" * 40},
    "tcp6 hop by hop": {"version": 6, "extensions": (HOP_BY_HOP,)},
    "udp6 destination": {"proto": UDP, "version": 6, "extensions": (HOP_BY_HOP, DESTINATION)},
}
TAGS = {"untagged": b"", "vlan": VLAN, "qinq": QINQ}


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_checksum(both: Both, shape: dict[str, Any], tags: bytes) -> None:
    for length in (0, 1, 2, 7, 100, 1459, 1460, 9001):
        packet = Packet(pattern(length), tags=tags, **shape)
        assert both.compare(packet.header(), packet.partial()) == [packet.whole()]


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_segments(both: Both, shape: dict[str, Any], tags: bytes) -> None:
    for length, size in (
        (1449, 1448), (2896, 1448), (2897, 1448), (10000, 1447), (9000, 8999), (5000, 101),
        (64000, 1448),
    ):  # fmt: skip
        packet = Packet(pattern(length), tags=tags, **shape)
        got = both.compare(packet.header(size), packet.partial())
        assert len(got) == -(-length // size)
        assert b"".join(f[packet.headers_len :] for f in got) == packet.payload


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("length", [900, 1000, 1001, 3000, 3500])
def test_tcp_flags(both: Both, version: int, length: int) -> None:
    """FIN and PSH on the last segment only, CWR on the first only, all others on each."""
    for flags in range(256):
        packet = Packet(pattern(length), version=version, flags=flags, seq=0xFFFFFA00)
        kind = packet.gso_type | (vnet.GSO_ECN if flags & CWR else 0)
        got = both.compare(packet.header(1000, gso_type=kind), packet.partial())
        seen = [frame[packet.l4 + 13] for frame in got]
        last = len(got) - 1
        for i, value in enumerate(seen):
            lost = (FIN | PSH if i < last else 0) | (CWR if i else 0)
            assert value == flags & ~lost
        sequence = [struct.unpack_from(">I", frame, packet.l4 + 4)[0] for frame in got]
        assert sequence == [(0xFFFFFA00 + 1000 * i) & 0xFFFFFFFF for i in range(len(got))]


def test_ip_ids_wrap_and_ecn_stays(both: Both) -> None:
    for tos in range(4):
        packet = Packet(pattern(5000), ip_id=0xFFFE, tos=tos, flags=ACK | ECE, dont_fragment=False)
        got = both.compare(packet.header(1000), packet.partial())
        ids = [struct.unpack_from(">H", frame, 18)[0] for frame in got]
        assert ids == [0xFFFE, 0xFFFF, 0, 1, 2]
        assert {frame[15] for frame in got} == {tos}


@pytest.mark.parametrize("version", [4, 6])
def test_datagrams_in_fragments(both: Both, version: int) -> None:
    """UFO: one datagram, its checksum over all of it, in IP fragments."""
    for length in (1473, 1480, 3000, 9001, 60000):
        packet = Packet(pattern(length), proto=UDP, version=version, dont_fragment=False)
        header = packet.header(1480, gso_type=vnet.GSO_UDP)
        if version == 4:
            got = both.compare(header, packet.partial())
            assert len(got) == -(-(length + 8) // 1480)
            continue
        # The kernel takes identifications from a generator of its own.
        ours = both.switch(header, packet.partial())
        theirs = both.kernel.finish(header, packet.partial())
        at = packet.l4 + 4
        assert len({frame[at : at + 4] for frame in ours}) == 1
        assert [f[:at] + f[at + 4 :] for f in ours] == [f[:at] + f[at + 4 :] for f in theirs]


def test_a_checksum_that_comes_out_as_zero(both: Both) -> None:
    """0 means "none" in UDP and is sent as 0xFFFF (RFC 768)."""
    for proto in (TCP, UDP):
        for version in (4, 6):
            packet = Packet(bytes(2), proto=proto, version=version)
            at = packet.l4 + packet.csum_offset
            value = struct.unpack_from(">H", packet.whole(), at)[0]
            zero = Packet(value.to_bytes(2, "big"), proto=proto, version=version)
            (got,) = both.compare(zero.header(), zero.partial())
            assert got[at : at + 2] == b"\xff\xff"
            # The same in a segment.
            size = 1000
            for tail in (b"", b"\1"):
                first = Packet(bytes(size) + tail + b"x", proto=proto, version=version)
                (segment, _) = both.compare(first.header(size), first.partial())
                value = struct.unpack_from(">H", segment, at)[0]
                payload = bytes(size - 2) + value.to_bytes(2, "big") + tail + b"x"
                zero = Packet(payload, proto=proto, version=version)
                (segment, _) = both.compare(zero.header(size), zero.partial())
                assert segment[at : at + 2] == (b"\xff\xff" if proto == UDP else b"\0\0")


packets = st.builds(
    Packet,
    payload=st.tuples(st.integers(2, 60000), st.integers(0, 250)).map(
        lambda n: pattern(sum(n))[n[1] :]
    ),
    proto=st.sampled_from([TCP, UDP]),
    version=st.just(4),
    tags=st.sampled_from(list(TAGS.values())),
    options=st.integers(0, 10).map(lambda n: b"\x01" * (4 * n)),
    tcp_options=st.integers(0, 10).map(lambda n: b"\x01" * (4 * n)),
    flags=st.integers(0, 255),
    seq=st.integers(0, 2**32 - 1),
    ip_id=st.integers(0, 2**16 - 1),
    tos=st.integers(0, 255),
    dont_fragment=st.booleans(),
) | st.builds(
    Packet,
    payload=st.integers(2, 60000).map(pattern),
    proto=st.sampled_from([TCP, UDP]),
    version=st.just(6),
    tags=st.sampled_from(list(TAGS.values())),
    extensions=st.sampled_from([(), (HOP_BY_HOP,), (DESTINATION,), (HOP_BY_HOP, DESTINATION)]),
    tcp_options=st.integers(0, 10).map(lambda n: b"\x01" * (4 * n)),
    flags=st.integers(0, 255),
    seq=st.integers(0, 2**32 - 1),
    tos=st.integers(0, 255),
)  # fmt: skip


@settings(
    max_examples=300, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(packet=packets, size=st.integers(1, 9000))
def test_any_packet(both: Both, packet: Packet, size: int) -> None:
    length = len(packet.payload)
    # A TAP's queue has an end, the kernel makes at most 128 segments of a datagram, and one segment
    # is no segmentation: the kernel takes it for an error where there are TCP options.
    most = 128 if packet.proto == UDP else 500
    size = min(max(size, -(-length // most)), length - 1)
    both.compare(packet.header(size), packet.partial())
    both.compare(packet.header(), packet.partial())
