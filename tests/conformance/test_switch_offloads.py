"""Offloads: what a guest leaves to others reaches each receiver in the form it negotiated."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest

from tests.support.frames import BROADCAST, frame, mac
from tests.support.ippackets import ACK, CWR, FIN, PSH, QINQ, TCP, UDP, VLAN, Packet, fold
from tests.support.running import Wire, silent, teach
from vswitch.lab.guest import DEFAULT_FEATURES, SoftwareGuest, VnetHeader, vnet
from vswitch.lab.guest.options import by_subject
from vswitch.lab.guest.packets import parse_mac
from vswitch.ports import offloads
from vswitch.vhost_user.protocol import Feature

A, B = mac(1), mac(2)
ALL = offloads.offered(True)
GUEST = [
    Feature.GUEST_TSO4, Feature.GUEST_TSO6, Feature.GUEST_ECN, Feature.GUEST_UFO,
    Feature.GUEST_USO4, Feature.GUEST_USO6,
]  # fmt: skip
HOST = [Feature.HOST_TSO4, Feature.HOST_TSO6, Feature.HOST_ECN, Feature.HOST_UFO, Feature.HOST_USO]
PAYLOAD = bytes(range(256)) * 40


def packet(**other: Any) -> Packet:
    return Packet(**({"payload": PAYLOAD, "dst": parse_mac(B), "src": parse_mac(A)} | other))


KINDS: dict[str, tuple[Packet, VnetHeader, Feature]] = {
    "csum": (packet(), packet().header(), Feature(0)),
    "tso4": (packet(), packet().header(1448), Feature.GUEST_TSO4),
    "tso6": (packet(version=6), packet(version=6).header(1428), Feature.GUEST_TSO6),
    "tso4 ecn": (
        packet(flags=CWR | ACK),
        packet().header(1448, gso_type=vnet.GSO_TCPV4 | vnet.GSO_ECN),
        Feature.GUEST_TSO4 | Feature.GUEST_ECN,
    ),
    "uso4": (packet(proto=UDP), packet(proto=UDP).header(1000), Feature.GUEST_USO4),
    "uso6": (
        packet(proto=UDP, version=6), packet(proto=UDP, version=6).header(1000), Feature.GUEST_USO6,
    ),
    "ufo": (
        packet(proto=UDP, dont_fragment=False),
        packet(proto=UDP).header(1480, gso_type=vnet.GSO_UDP),
        Feature.GUEST_UFO,
    ),
    "tso4 vlan": (packet(tags=VLAN), packet(tags=VLAN).header(1448), Feature.GUEST_TSO4),
}  # fmt: skip
KIND = pytest.mark.parametrize("kind", KINDS)
LARGE: dict[str, Any] = {"max_frame_len": 65553, "queue_size": 64}


def guest(wire: Wire, name: str, n: int, bits: int = ALL, **options: Any) -> SoftwareGuest:
    """The n-th guest, with these offloads and no others; `options` as for Wire.guest."""
    wanted = DEFAULT_FEATURES | bits
    options = {"features": wanted, "required_features": wanted, **LARGE, **options}
    return wire.guest(name, n, **options)


def with_csum(hdr: VnetHeader, got: bytes, sent: Packet) -> bytes:
    """The frame with its checksum filled in if it was left to us, after a check of it."""
    assert hdr.gso_type == vnet.GSO_NONE
    if hdr.flags == 0:
        return got
    assert hdr.flags == vnet.NEEDS_CSUM
    assert (hdr.csum_start, hdr.csum_offset) == (sent.l4, sent.csum_offset)
    value = (0xFFFF - fold(got[sent.l4 :])) or 0xFFFF
    at = sent.l4 + sent.csum_offset
    return got[:at] + value.to_bytes(2, "big") + got[at + 2 :]


def expected(sent: Packet, header: VnetHeader) -> list[bytes]:
    """What the wire would carry; unit/fastpath/test_offload_kernel.py asks the kernel, too."""
    kind, size = header.gso_type & ~vnet.GSO_ECN, header.gso_size
    if kind == vnet.GSO_NONE:
        return [sent.whole()]
    if kind == vnet.GSO_UDP:
        whole = sent.whole()
        data, out = whole[sent.l4 :], []
        for at in range(0, len(data), size):
            part = data[at : at + size]
            more = 0x2000 if at + size < len(data) else 0
            head = bytearray(whole[: sent.l4])
            struct.pack_into(">H", head, sent.l3 + 2, len(head) - sent.l3 + len(part))
            struct.pack_into(">H", head, sent.l3 + 6, more | at // 8)
            struct.pack_into(">H", head, sent.l3 + 10, 0)
            struct.pack_into(">H", head, sent.l3 + 10, 0xFFFF - fold(bytes(head[sent.l3 :])))
            out.append(bytes(head) + part)
        return out
    starts = range(0, len(sent.payload), size)
    return [
        replace(
            sent,
            payload=sent.payload[at : at + size],
            seq=sent.seq + at,
            ip_id=sent.ip_id + i,
            flags=sent.flags
            & ~(CWR if i else 0)
            & ~(FIN | PSH if at + size < len(sent.payload) else 0),
        ).whole()
        for i, at in enumerate(starts)
    ]


def receive(receiver: SoftwareGuest, sent: Packet, header: VnetHeader, *, raw: bool) -> None:
    """Receive `sent` as it is (`raw`) or finished, and compare every byte."""
    want = [sent.partial()] if raw else expected(sent, header)
    got = receiver.recv_with_headers(len(want))
    if raw:
        ((hdr, data),) = got
        assert data == sent.partial()
        assert hdr._replace(num_buffers=header.num_buffers) == header
        assert hdr.num_buffers >= (1 if receiver.receiveqs[0].ring.header_len == 12 else 0)
        return
    assert [len(f) for _, f in got] == [len(f) for f in want]
    assert [with_csum(hdr, f, sent) for hdr, f in got] == want
    leaves_csum = Feature.GUEST_CSUM in receiver.features and header.gso_type not in (
        vnet.GSO_UDP,
        vnet.GSO_NONE,
    )
    assert {bool(hdr.flags) for hdr, _ in got} == {leaves_csum}


@KIND
@pytest.mark.parametrize("other", [Feature(0), Feature.MRG_RXBUF, Feature.RING_INDIRECT_DESC])
def test_as_it_is(wire: Wire, kind: str, other: Feature) -> None:
    """To a guest that takes it a frame goes whole, with its header."""
    sent, header, _ = KINDS[kind]
    a = guest(wire, "a", 1)
    b = guest(wire, "b", 2, features=(DEFAULT_FEATURES | ALL) & ~other,
              required_features=ALL, rx_guard_len=8)  # fmt: skip
    teach(a, b)
    for _ in range(20):
        a.send([sent.partial()], header=header.pack())
        receive(b, sent, header, raw=True)
    a.drain()
    assert wire.drops("a") == wire.drops("b") == {}
    assert wire.stats("b")["egress_frames"] == 21
    assert silent(b)


@KIND
@pytest.mark.parametrize(
    "lacks", [*GUEST, Feature.GUEST_CSUM, ALL], ids=lambda f: f.name if f != ALL else "everything"
)
def test_receiver_without_a_feature(wire: Wire, kind: str, lacks: Feature) -> None:
    """Finished for a guest that lacks what the frame needs, and only for such a one."""
    sent, header, needs = KINDS[kind]
    features = ALL & ~lacks
    if lacks == Feature.GUEST_CSUM:
        for bit in GUEST:
            features &= ~bit  # they rest on it
    a, b = guest(wire, "a", 1), guest(wire, "b", 2, features, rx_guard_len=8)
    teach(a, b)
    raw = bool(features & Feature.GUEST_CSUM) and needs & features == needs
    plain = frame(B, A, 61)
    for _ in range(3):
        a.send([sent.partial()], header=header.pack())
        a.send([plain])
        receive(b, sent, header, raw=raw)
        ((hdr, got),) = b.recv_with_headers(1)
        assert (got, hdr) == (plain, VnetHeader(num_buffers=1))
    a.drain()
    assert wire.drops("a") == wire.drops("b") == {}
    frames = 1 if raw else len(expected(sent, header))
    assert wire.stats("b")["egress_frames"] == 1 + 3 * (frames + 1)
    assert wire.stats("a")["ingress_frames"] == 7


@KIND
@pytest.mark.parametrize(
    "lacks", [*HOST, Feature.CSUM, ALL], ids=lambda f: f.name if f != ALL else "everything"
)
def test_sender_without_a_feature(wire: Wire, kind: str, lacks: Feature) -> None:
    """Nobody may ask for what was not negotiated; who negotiated nothing is not even read."""
    sent, header, needs = KINDS[kind]
    host = {
        Feature.GUEST_TSO4: Feature.HOST_TSO4, Feature.GUEST_TSO6: Feature.HOST_TSO6,
        Feature.GUEST_ECN: Feature.HOST_ECN, Feature.GUEST_UFO: Feature.HOST_UFO,
        Feature.GUEST_USO4: Feature.HOST_USO, Feature.GUEST_USO6: Feature.HOST_USO,
    }  # fmt: skip
    asks = Feature.CSUM
    for bit in needs:
        asks |= host[bit]
    a, b = guest(wire, "a", 1, ALL & ~lacks), guest(wire, "b", 2)
    teach(a, b)
    a.send([sent.partial()], header=header.pack())
    if lacks in (Feature.CSUM, ALL):
        ((hdr, got),) = b.recv_with_headers(1)
        assert (got, hdr[:6]) == (sent.partial(), VnetHeader()[:6])
    elif asks & lacks:
        a.drain()
        assert wire.drops("a") == {"offload-unnegotiated": 1}
    else:
        receive(b, sent, header, raw=True)
    assert silent(b)


@pytest.mark.parametrize(
    ("setting", "offered"),
    [
        (True, ALL),
        (False, Feature(0)),
        ([], Feature(0)),
        (["csum"], Feature.CSUM | Feature.GUEST_CSUM),
        (
            ["csum", "tso6", "uso"],
            Feature.CSUM | Feature.GUEST_CSUM | Feature.HOST_TSO6 | Feature.GUEST_TSO6
            | Feature.HOST_USO | Feature.GUEST_USO4 | Feature.GUEST_USO6,
        ),
    ],
)  # fmt: skip
def test_switchable_per_port(wire: Wire, setting: bool | list[str], offered: Feature) -> None:
    a = guest(wire, "a", 1)
    b = wire.enter(SoftwareGuest(B, **by_subject(features=DEFAULT_FEATURES | ALL, **LARGE)))
    b.connect(wire.port("b", offloads=setting))
    assert b.frontend.offered_features & ALL == offered
    assert Feature.CTRL_GUEST_OFFLOADS not in b.frontend.offered_features
    teach(a, b)
    for sent, header, needs in KINDS.values():
        a.send([sent.partial()], header=header.pack())
        raw = Feature.GUEST_CSUM in offered and needs & offered == needs
        receive(b, sent, header, raw=raw)


def test_flooded_to_all_each_in_its_own_form(wire: Wire) -> None:
    a = guest(wire, "a", 1)
    receivers = [
        guest(wire, "b", 2),
        guest(wire, "c", 3, Feature.GUEST_CSUM),
        guest(wire, "d", 4, Feature(0)),
        guest(wire, "e", 5, Feature.GUEST_CSUM | Feature.GUEST_TSO4),
    ]
    teach(a, *receivers)
    for sent, header, needs in KINDS.values():
        everywhere = replace(sent, dst=parse_mac(BROADCAST))
        a.send([everywhere.partial()], header=header.pack())
        for receiver in receivers:
            raw = bool(receiver.features & Feature.GUEST_CSUM) and (
                needs & receiver.features == needs
            )
            receive(receiver, everywhere, header, raw=raw)
    a.drain()
    assert silent(*receivers)


def test_sixty_four_kib(wire: Wire) -> None:
    """The largest frame, in the smallest mergeable buffers, in one buffer, and in segments."""
    a = guest(wire, "a", 1)
    b = guest(wire, "b", 2, rx_queue_size=1024, rx_buf_len=256, rx_guard_len=4)
    c = guest(wire, "c", 3, features=(DEFAULT_FEATURES | ALL) & ~Feature.MRG_RXBUF,
              required_features=0)  # fmt: skip
    d = guest(wire, "d", 4, Feature(0))
    teach(a, b, c, d)
    sent = packet(payload=bytes(65535 - 40), dst=parse_mac(BROADCAST), flags=ACK | PSH)
    header = sent.header(1448)
    for _ in range(5):
        a.send([sent.partial()], header=header.pack())
        receive(b, sent, header, raw=True)
        receive(c, sent, header, raw=True)
        receive(d, sent, header, raw=False)
    a.drain()
    assert all(wire.drops(name) == {} for name in "abcd")


@pytest.mark.parametrize("cuts", [(), (0,), (-7, 3, 14, 40, 100), (-1, 0, 1), (-11, -3, 34, 54)])
def test_headers_in_pieces(wire: Wire, cuts: tuple[int, ...]) -> None:
    a = guest(wire, "a", 1, tx_cuts=cuts, regions=5)
    b = guest(wire, "b", 2, rx_cuts=cuts)
    c = guest(wire, "c", 3, Feature(0), rx_cuts=cuts, rx_guard_len=8)
    teach(a, b, c)
    for sent, header, _ in KINDS.values():
        flooded = replace(sent, dst=parse_mac(BROADCAST))
        a.send([flooded.partial()], header=header.pack())
        receive(b, flooded, header, raw=True)
        receive(c, flooded, header, raw=False)
        # Nothing is left of a header that asks for nothing.
        a.send([frame(BROADCAST, A)], header=VnetHeader(0, 0, 9, 9, 9, 9, 9).pack())
        for receiver in (b, c):
            ((hdr, _),) = receiver.recv_with_headers(1)
            assert hdr == VnetHeader(num_buffers=1)


def test_legacy_headers_of_ten_bytes(wire: Wire) -> None:
    legacy = Feature.PROTOCOL_FEATURES | ALL
    a = guest(wire, "a", 1, features=legacy, required_features=legacy)
    b = guest(wire, "b", 2, features=legacy, required_features=legacy)
    c = guest(wire, "c", 3, Feature(0))
    assert a.transmitqs[0].ring.header_len == b.receiveqs[0].ring.header_len == 10
    teach(a, b, c)
    for sent, header, _ in KINDS.values():
        flooded = replace(sent, dst=parse_mac(BROADCAST))
        a.send([flooded.partial()], header=header.pack(10))
        receive(b, flooded, header, raw=True)
        receive(c, flooded, header, raw=False)


def test_mtu_is_that_of_segments(wire: Wire) -> None:
    a = guest(wire, "a", 1, mtu_of_port=1500)
    b = guest(wire, "b", 2, mtu_of_port=1500)
    c = guest(wire, "c", 3, Feature(0), mtu_of_port=1400)
    d = guest(wire, "d", 4)
    teach(a, b, c, d)
    sent = packet()
    # 40 bytes of IP and TCP headers in an MTU, 4 more for the VLAN tag that fits besides.
    for size in (1460, 1464):
        a.send([sent.partial()], header=sent.header(size).pack())
        receive(b, sent, sent.header(size), raw=True)
    a.send([sent.partial()], header=sent.header(1465).pack())
    a.drain()
    assert wire.drops("a") == {"oversize": 1}
    # The egress side, raw and in software.
    wide = replace(sent, src=parse_mac(mac(4)))
    for receiver, name, most, raw in ((b, "b", 1464, True), (c, "c", 1364, False)):
        to = replace(wide, dst=receiver.mac)
        d.send([to.partial()], header=to.header(most + 1).pack())
        d.send([to.partial()], header=to.header(most).pack())
        receive(receiver, to, to.header(most), raw=raw)
        assert wire.drops(name) == {"egress-mtu": 1}
    # A datagram in fragments: what counts are they.
    datagram = packet(proto=UDP, dont_fragment=False)
    header = datagram.header(1480, gso_type=vnet.GSO_UDP)
    a.send([datagram.partial()], header=header.pack())
    receive(b, datagram, header, raw=True)
    assert silent(b, c)


DHCP = packet(proto=UDP, ports=(67, 68), payload=bytes(range(250)))
DHCP_REPLIES = {
    "plain": DHCP,
    "behind a tag": replace(DHCP, tags=VLAN),
    "behind two tags": replace(DHCP, tags=QINQ),
    "IP options": replace(DHCP, options=bytes([1] * 40)),
    "to a relay": replace(DHCP, ports=(67, 67)),
    "odd length": replace(DHCP, payload=bytes(range(249))),
    "no payload": replace(DHCP, payload=b""),
    "broadcast": replace(DHCP, dst=parse_mac(BROADCAST)),
}


@pytest.mark.parametrize("reply", DHCP_REPLIES)
@pytest.mark.parametrize("cuts", [(), (0,), (-7, 3, 14, 40)])
def test_a_dhcp_reply_is_always_finished(wire: Wire, reply: str, cuts: tuple[int, ...]) -> None:
    """Its clients read it from packet sockets, checksum and all."""
    sent = DHCP_REPLIES[reply]
    a = guest(wire, "a", 1, tx_cuts=cuts)
    receivers = [guest(wire, "b", 2), guest(wire, "c", 3, Feature.GUEST_CSUM)]
    teach(a, receivers[0])
    receivers[1].recv(2)
    # Nobody has spoken in those VLANs yet.
    expecting = receivers if sent.tags or reply == "broadcast" else receivers[:1]
    for _ in range(3):
        a.send([sent.partial()], header=sent.header().pack())
        for receiver in expecting:
            assert receiver.recv_with_headers(1) == [(VnetHeader(num_buffers=1), sent.whole())]
    a.drain()
    assert silent(*receivers)
    assert wire.drops("b") == wire.drops("c") == {}


def test_a_dhcp_reply_in_segments_is_finished_too(wire: Wire) -> None:
    a, b = guest(wire, "a", 1), guest(wire, "b", 2)
    teach(a, b)
    sent = packet(proto=UDP, ports=(67, 68), dont_fragment=False)
    for header in (sent.header(1000), sent.header(1480, gso_type=vnet.GSO_UDP)):
        a.send([sent.partial()], header=header.pack())
        want = expected(sent, header)
        assert b.recv_with_headers(len(want)) == [(VnetHeader(num_buffers=1), f) for f in want]


@pytest.mark.parametrize(
    "other",
    [
        replace(DHCP, ports=(68, 67)),
        replace(DHCP, ports=(67 << 8, 67)),
        replace(DHCP, proto=TCP),
        replace(DHCP, version=6),
        replace(DHCP, version=6, ports=(547, 546)),
    ],
)
def test_what_is_no_dhcp_reply_is_left_to_the_receiver(wire: Wire, other: Packet) -> None:
    a, b = guest(wire, "a", 1), guest(wire, "b", 2)
    teach(a, b)
    a.send([other.partial()], header=other.header().pack())
    receive(b, other, other.header(), raw=True)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("proto", [TCP, UDP])
def test_mtu_is_that_of_segments_behind_two_tags(wire: Wire, version: int, proto: int) -> None:
    a = guest(wire, "a", 1, mtu_of_port=1500)
    b = guest(wire, "b", 2, mtu_of_port=1500)
    c = guest(wire, "c", 3, Feature(0), mtu_of_port=1500)
    d = guest(wire, "d", 4)
    teach(a, b, c, d)
    sent = packet(version=version, proto=proto, tags=QINQ)
    most = 1500 - (sent.headers_len - sent.l3)
    for sender, counter, reason in ((a, "a", "oversize"), (d, None, "egress-mtu")):
        for receiver, name, raw in ((b, "b", True), (c, "c", False)):
            to = replace(sent, dst=receiver.mac, src=sender.mac)
            # That VLAN must know it, or others would get it too.
            receiver.send([replace(sent, dst=sender.mac, src=receiver.mac, payload=b"").partial()])
            assert len(sender.recv(1)) == 1
            for other in (a, b, c, d):
                other.poll_frames(1)
            before = wire.drops(counter or name).get(reason, 0)
            sender.send([to.partial()], header=to.header(most + 1).pack())
            sender.send([to.partial()], header=to.header(most).pack())
            receive(receiver, to, to.header(most), raw=raw)
            assert wire.drops(counter or name)[reason] == before + 1


@pytest.mark.parametrize("bits", [ALL, Feature(0)], ids=["whole", "in segments"])
def test_sixty_four_kib_behind_two_tags(wire: Wire, bits: Feature) -> None:
    a = guest(wire, "a", 1, max_frame_len=65557)
    b = guest(wire, "b", 2, bits, max_frame_len=65557, rx_guard_len=8)
    teach(a, b)
    sent = packet(payload=bytes(65535 - 40), tags=QINQ)
    assert len(sent.partial()) == 65557
    a.send([sent.partial()], header=sent.header(1448).pack())
    receive(b, sent, sent.header(1448), raw=bool(bits))
    a.drain()
    assert wire.drops("a") == wire.drops("b") == {}


def test_one_segment_is_none(wire: Wire) -> None:
    a, b = guest(wire, "a", 1), guest(wire, "b", 2, Feature.GUEST_CSUM)
    teach(a, b)
    for sent in (packet(), packet(proto=UDP)):
        for size in (len(PAYLOAD), len(PAYLOAD) + 1, 65535):
            a.send([sent.partial()], header=sent.header(size).pack())
            receive(b, sent, sent.header(), raw=True)


def test_more_segments_of_a_datagram_than_linux_takes(wire: Wire) -> None:
    a, b = guest(wire, "a", 1), guest(wire, "b", 2, rx_queue_size=256)
    teach(a, b)
    sent = packet(proto=UDP, payload=bytes(128 * 40))
    a.send([sent.partial()], header=sent.header(40).pack())
    receive(b, sent, sent.header(40), raw=True)
    longer = packet(proto=UDP, payload=bytes(128 * 40 + 1))
    a.send([longer.partial()], header=longer.header(40).pack())
    receive(b, longer, longer.header(40), raw=False)
    a.drain()
    assert wire.drops("b") == {}


def test_segments_without_buffers_are_counted_each(wire: Wire) -> None:
    a = guest(wire, "a", 1)
    b = guest(wire, "b", 2, Feature(0), rx_queue_size=16)
    teach(a, b)
    b.auto_post = False
    b.recv(1, timeout=0.0)
    sent = packet(payload=bytes(50 * 1000))
    a.send([sent.partial(), sent.partial()], header=sent.header(1000).pack())
    a.drain()
    got = b.recv_with_headers(100, timeout=0.0)
    assert [f for _, f in got] == expected(sent, sent.header(1000))[: len(got)]
    assert 15 <= len(got) <= 16
    assert wire.drops("b") == {"no-buffer": 100 - len(got)}
    assert wire.stats("b")["stalls"] == 100 - len(got)


def test_a_buffer_too_small_for_what_comes_whole(wire: Wire) -> None:
    a = guest(wire, "a", 1)
    b = guest(wire, "b", 2, features=(DEFAULT_FEATURES | ALL) & ~Feature.MRG_RXBUF,
              required_features=0, rx_buf_len=2048)  # fmt: skip
    teach(a, b)
    sent = packet()
    a.send([sent.partial()], header=sent.header(1448).pack())
    short = packet(payload=bytes(100))
    a.send([short.partial()], header=short.header().pack())
    receive(b, short, short.header(), raw=True)
    assert wire.drops("b") == {"buffer-small": 1}


TSO = packet().header(1448)
CSUM = packet().header()
USO = packet(proto=UDP).header(1000)
V6 = packet(version=6)
ROUTE = (43, bytes([0, 0, 4, 0, 0, 0, 0, 0]))
FRAGMENT = (44, bytes([0, 0, 0, 1, 0, 0, 0, 7]))
LONG = tuple((60, bytes([0, 0, 1, 126]) + bytes(132)) for _ in range(4))

HOSTILE: dict[str, tuple[bytes, VnetHeader, str]] = {
    "csum_start beyond": (packet().partial(), CSUM._replace(csum_start=65535), "bad-csum"),
    "csum_start at the end": (
        packet().partial(), CSUM._replace(csum_start=len(packet().partial()), csum_offset=0),
        "bad-csum",
    ),
    "csum_offset beyond": (packet().partial(), CSUM._replace(csum_offset=65535), "bad-csum"),
    "half of it in the frame": (
        packet().partial(), CSUM._replace(csum_offset=len(packet().partial()) - 34 - 1), "bad-csum",
    ),
    "in the destination address": (
        packet().partial(), CSUM._replace(csum_start=0, csum_offset=0), "bad-csum",
    ),
    "in the EtherType": (
        packet().partial(), CSUM._replace(csum_start=12, csum_offset=0), "bad-csum",
    ),
    "not TCP's place": (packet().partial(), TSO._replace(csum_offset=6), "bad-csum"),
    "not where TCP begins": (packet().partial(), TSO._replace(csum_start=38), "bad-csum"),
    "gso_size 0": (packet().partial(), TSO._replace(gso_size=0), "bad-gso"),
    "without a checksum": (packet().partial(), TSO._replace(flags=0), "bad-gso"),
    "gso_type 2": (packet().partial(), TSO._replace(gso_type=2), "bad-gso"),
    "gso_type 127": (packet().partial(), TSO._replace(gso_type=127), "bad-gso"),
    "ECN alone": (packet().partial(), TSO._replace(gso_type=vnet.GSO_ECN), "bad-gso"),
    "ECN of UDP": (
        packet(proto=UDP).partial(), USO._replace(gso_type=vnet.GSO_UDP_L4 | vnet.GSO_ECN),
        "bad-gso",
    ),
    "UDP as TCP": (
        packet(proto=UDP).partial(), USO._replace(gso_type=vnet.GSO_TCPV4, csum_offset=16),
        "bad-gso",
    ),
    "TCP as UDP": (packet().partial(), TSO._replace(gso_type=vnet.GSO_UDP_L4), "bad-gso"),
    "IPv6 as IPv4": (V6.partial(), V6.header(1000, gso_type=vnet.GSO_TCPV4), "bad-gso"),
    "IPv4 as IPv6": (packet().partial(), TSO._replace(gso_type=vnet.GSO_TCPV6), "bad-gso"),
    "no IP": (frame(B, A, 1000), TSO._replace(gso_size=100), "bad-gso"),
    "version 5": (
        packet().partial()[:14] + b"\x55" + packet().partial()[15:], TSO, "bad-gso",
    ),
    "short header length": (
        packet().partial()[:14] + b"\x44" + packet().partial()[15:], TSO, "bad-gso",
    ),
    "a fragment": (
        packet().partial()[:20] + b"\x20\0" + packet().partial()[22:], TSO, "bad-gso",
    ),
    "a fragment of IPv6": (
        packet(version=6, extensions=(FRAGMENT,)).partial(),
        packet(version=6, extensions=(FRAGMENT,)).header(1000), "bad-gso",
    ),
    "TCP header too short": (
        packet().partial()[:46] + b"\x40" + packet().partial()[47:], TSO, "bad-gso",
    ),
    "TCP header beyond the frame": (
        packet(payload=b"").partial()[:46] + b"\xf0" + packet(payload=b"").partial()[47:],
        TSO._replace(gso_size=1), "bad-gso",
    ),
    "cut off in the IP header": (
        packet().partial()[:20], TSO._replace(csum_start=14, csum_offset=0), "bad-gso",
    ),
    "cut off in a VLAN tag": (
        packet(tags=VLAN).partial()[:16], TSO._replace(csum_start=14, csum_offset=0), "bad-gso",
    ),
    "cut off in an extension": (
        packet(version=6, extensions=LONG).partial()[:100],
        packet(version=6, extensions=LONG).header(10)._replace(csum_start=60), "bad-gso",
    ),
    "extensions without end": (
        packet(version=6, extensions=LONG).partial(),
        packet(version=6, extensions=LONG).header(1000), "bad-gso",
    ),
    "too many segments": (packet().partial(), TSO._replace(gso_size=1), "bad-gso"),
    "UFO of less than 8": (
        packet(proto=UDP).partial(),
        packet(proto=UDP).header(7, gso_type=vnet.GSO_UDP), "bad-gso",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers(wire: Wire, what: str) -> None:
    """Dropped under a name, at whose door they came in, and nobody else notices."""
    data, header, reason = HOSTILE[what]
    a, b, c = guest(wire, "a", 1), guest(wire, "b", 2), guest(wire, "c", 3, Feature(0))
    teach(a, b, c)
    good = packet()
    for i in range(1, 6):
        a.send([data], header=header.pack())
        a.send([good.partial()], header=TSO.pack())
        receive(b, good, TSO, raw=True)
        a.drain()
        assert wire.drops("a") == {reason: i}
    c.send([frame(B, mac(3))])
    assert b.recv(1) == [frame(B, mac(3))]
    assert wire.drops("b") == wire.drops("c") == {}
    assert wire.info("a")["state"] == "ready"
    assert silent(b, c)


@pytest.mark.parametrize("hdr_len", [0, 1, 14, 53, 55, 1000, 65535])
def test_hdr_len_is_not_believed(wire: Wire, hdr_len: int) -> None:
    a, b, c = guest(wire, "a", 1), guest(wire, "b", 2), guest(wire, "c", 3, Feature(0))
    teach(a, b, c)
    sent = packet(dst=parse_mac(BROADCAST))
    a.send([sent.partial()], header=TSO._replace(hdr_len=hdr_len).pack())
    receive(b, sent, TSO, raw=True)
    receive(c, sent, TSO, raw=False)
    a.send([sent.partial()], header=CSUM._replace(hdr_len=hdr_len).pack())
    receive(b, sent, CSUM, raw=True)
    receive(c, sent, CSUM, raw=False)


@pytest.mark.parametrize("flags", [vnet.DATA_VALID, vnet.RSC_INFO, 0xFE])
def test_flags_that_are_not_a_drivers_to_set(wire: Wire, flags: int) -> None:
    """A guest cannot vouch for a checksum in front of another guest."""
    a, b = guest(wire, "a", 1), guest(wire, "b", 2)
    teach(a, b)
    a.send([frame(B, A)], header=VnetHeader(flags).pack())
    ((hdr, got),) = b.recv_with_headers(1)
    assert (hdr, got) == (VnetHeader(num_buffers=1), frame(B, A))
    sent = packet(proto=TCP)
    a.send([sent.partial()], header=TSO._replace(flags=flags | vnet.NEEDS_CSUM).pack())
    receive(b, sent, TSO, raw=True)


@pytest.mark.parametrize("gso_type", [vnet.GSO_TCPV4, vnet.GSO_TCPV6, vnet.GSO_UDP_L4])
def test_ipv6_routing_header(wire: Wire, gso_type: int) -> None:
    """Passed over; and what TCP over IPv6 is called otherwise is not believed."""
    a, b, c = guest(wire, "a", 1), guest(wire, "b", 2), guest(wire, "c", 3, Feature(0))
    teach(a, b, c)
    sent = packet(version=6, extensions=(ROUTE,), dst=parse_mac(BROADCAST))
    header = sent.header(1000, gso_type=gso_type)
    a.send([sent.partial()], header=header.pack())
    if gso_type == vnet.GSO_TCPV6:
        receive(b, sent, header, raw=True)
        receive(c, sent, header, raw=False)
    else:
        a.drain()
        assert wire.drops("a") == {"bad-gso": 1}
    assert silent(b, c)
