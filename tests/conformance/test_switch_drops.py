"""Every frame that goes nowhere is counted, once, under its reason."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.formats import FORMATS
from tests.support.frames import BROADCAST, ETHERTYPE_TEST, frame, frames, mac
from tests.support.running import Wire, silent, teach
from vswitch.lab.guest import DEFAULT_FEATURES
from vswitch.lab.guest.packets import parse_mac
from vswitch.lab.guest.raw import RawDesc
from vswitch.vhost_user.protocol import Feature

A, B, C = mac(1), mac(2), mac(3)


@pytest.fixture(params=["split", "packed"])
def wire(wire: Wire, request: pytest.FixtureRequest) -> Wire:
    """Everything here with guests of these formats."""
    wire.extra_features = FORMATS[request.param]
    return wire


def test_runts(wire: Wire) -> None:
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    a.send([frame(B, A, 60)[:length] for length in range(14)])
    a.drain()
    assert wire.drops("a") == {"runt": 14}
    # Less than a whole virtio-net header, too.
    queue = a.transmitqs[0]
    raw = queue.raw_packed() if queue.ring.packed else queue.raw
    where = a.memory.allocate(64)
    for runts, length in ((15, 0), (16, 1), (17, 11)):
        raw.offer(RawDesc(where, length))
        queue.kick()
        wire.wait_drops("a", {"runt": runts})
    assert silent(b)


def test_oversize_and_egress_mtu(wire: Wire) -> None:
    """14 bytes of Ethernet header and 4 of a VLAN tag come on top of an MTU."""
    a = wire.guest("a", 1, mtu_of_port=1500, max_frame_len=2000)
    b = wire.guest("b", 2, max_frame_len=2000)
    c = wire.guest("c", 3, mtu_of_port=1600, mtu=1400, max_frame_len=2000)
    teach(a, b, c)
    a.send(frames(B, A, [1518, 1519, 2000]))
    assert [len(f) for f in b.recv(1)] == [1518]
    a.drain()
    assert wire.drops("a") == {"oversize": 2}
    b.send(frames(A, B, [1518, 1519, 1600, 60]))
    assert [len(f) for f in a.recv(2)] == [1518, 60]
    assert wire.drops("a") == {"oversize": 2, "egress-mtu": 2}
    # NET_SET_MTU of the frontend counts for less than the port allows.
    b.send(frames(C, B, [1418, 1419, 60]))
    assert [len(f) for f in c.recv(2)] == [1418, 60]
    assert wire.drops("c") == {"egress-mtu": 1}
    # Flooded to all, each port by its own measure.
    b.send([frame(BROADCAST, B, 1500)])
    assert len(a.recv(1)) == 1
    b.drain()
    assert wire.drops("c") == {"egress-mtu": 2}
    assert silent(a, b, c)


DOT1Q, DOT1AD, OTHER = b"\x81\0\0\x07", b"\x88\xa8\0\x14", b"\x91\0\0\x14"


def behind_tags(dst: str, src: str, tags: bytes, payload: int) -> bytes:
    plain = frame(dst, src, 14 + payload)
    return plain[:12] + tags + plain[12:]


def test_an_mtu_counts_neither_of_two_tags(wire: Wire) -> None:
    """A tag makes room for itself, as with Linux, whose bridges take the outer one out."""
    a = wire.guest("a", 1, mtu_of_port=1500, max_frame_len=2000)
    b = wire.guest("b", 2, mtu_of_port=1500, max_frame_len=2000)
    c = wire.guest("c", 3, max_frame_len=2000)
    teach(a, b, c)
    cases = {
        DOT1AD + DOT1Q: 1500, DOT1Q + DOT1Q: 1500, DOT1Q + DOT1AD: 1500, DOT1AD + DOT1AD: 1500,
        # One more tag is payload; so is what Linux does not take for a tag.
        DOT1AD + DOT1AD + DOT1Q: 1496, OTHER + DOT1Q: 1496, DOT1Q + OTHER: 1496,
        DOT1Q: 1500, DOT1AD: 1500, b"": 1504,
    }  # fmt: skip
    for sender, source, reason, port in ((a, A, "oversize", "a"), (c, C, "egress-mtu", "b")):
        for n, (tags, most) in enumerate(cases.items(), 1):
            fits = behind_tags(B, source, tags, most)
            sender.send([behind_tags(B, source, tags, most + 1), fits])
            # Of another VLAN, so flooded.
            assert b.recv(1) == [fits]
            for other in (a, c):
                while other is not sender and other.poll_frames(1):
                    pass
            sender.drain()
            assert wire.drops(port)[reason] == n


def test_bad_sources(wire: Wire) -> None:
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    a.send([frame(B, source) for source in (BROADCAST, "01:00:5e:00:00:01", "00:00:00:00:00:00")])
    a.drain()
    assert wire.drops("a") == {"bad-source": 3}
    assert wire.learned() == {}
    assert silent(b)


def test_disabled_transmitq(wire: Wire) -> None:
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    a.frontend.set_vring_enable(1, False)
    a.send(frames(B, A, [60] * 10))
    a.drain()
    assert wire.drops("a") == {"disabled": 10}
    a.frontend.set_vring_enable(1, True)
    a.send([frame(B, A)])
    assert len(b.recv(1)) == 1
    assert wire.drops("a") == {"disabled": 10}


def test_no_destination(wire: Wire) -> None:
    a = wire.guest("a", 1)
    a.send([frame(BROADCAST, A), frame(B, A)])
    a.drain()
    assert wire.drops("a") == {"no-destination": 2}
    stats = wire.stats("a")
    assert (stats["ingress_frames"], stats["ingress_bytes"]) == (2, 120)


def test_egress_down(wire: Wire) -> None:
    a, b, c = wire.guest("a", 1), wire.guest("b", 2), wire.guest("c", 3)
    teach(a, b, c)
    # A port nobody is connected to, and one whose receiveq is disabled.
    wire.port("empty")
    wire.client.fdb_add(mac(9), "empty")
    a.send([frame(mac(9), A)] * 3)
    b.frontend.set_vring_enable(0, False)
    a.send([frame(B, A)] * 4)
    a.send([frame(BROADCAST, A)])
    assert len(c.recv(1)) == 1
    a.drain()
    assert silent(b, c)
    assert wire.drops("a") == {"egress-down": 7}
    b.frontend.set_vring_enable(0, True)
    a.send([frame(B, A)])
    assert len(b.recv(1)) == 1


def test_no_buffer(wire: Wire) -> None:
    a, b = wire.guest("a", 1), wire.guest("b", 2, rx_queue_size=8)
    teach(a, b)
    b.auto_post = False
    b.recv(1, timeout=0.0)
    a.send(frames(B, A, [60] * 20))
    a.drain()
    drops = wire.drops("b")["no-buffer"]
    got = b.recv(20, timeout=0.0)
    assert len(got) + drops == 20
    assert got == frames(B, A, [60] * 20)[: len(got)]
    assert 7 <= len(got) <= 8
    assert wire.stats("b")["stalls"] > 0
    assert wire.stats("b")["egress_frames"] == len(got) + 1
    # And it goes on as soon as there are buffers.
    b.auto_post = True
    b.receiveqs[0].ring.post()
    b.receiveqs[0].notify()
    a.send([frame(B, A)])
    assert len(b.recv(1)) == 1


def test_mergeable_buffers_run_out_in_mid_frame(wire: Wire) -> None:
    """A frame that needs more buffers than there are takes none of them."""
    a = wire.guest("a", 1, max_frame_len=9018)
    b = wire.guest("b", 2, max_frame_len=9018, rx_queue_size=4, rx_buf_len=2048)
    teach(a, b)
    b.auto_post = False
    long, short = frame(B, A, 9018), frame(B, A, 1514)
    a.send([long, short])
    assert b.recv(1) == [short]
    a.drain()
    assert wire.drops("b") == {"no-buffer": 1}
    assert silent(b)


def test_buffer_too_small(wire: Wire) -> None:
    a = wire.guest("a", 1)
    b = wire.guest(
        "b", 2, rx_buf_len=200, rx_guard_len=16, features=DEFAULT_FEATURES & ~Feature.MRG_RXBUF
    )
    teach(a, b)
    sent = frames(B, A, [188, 189, 60, 1514, 100])
    a.send(sent)
    assert b.recv(3) == [sent[0], sent[2], sent[4]]
    a.drain()
    assert wire.drops("b") == {"buffer-small": 2}
    assert silent(b)


def test_broken_receiveq(wire: Wire) -> None:
    """What cannot be delivered because of the receiver's own fault is the receiver's drop."""
    a, b, c = wire.guest("a", 1), wire.guest("b", 2), wire.guest("c", 3)
    teach(a, b, c)
    # The whole ring of b now points nowhere.
    queue = b.receiveqs[0]
    raw: Any = queue.raw_packed() if queue.ring.packed else queue.raw
    for i in range(256):
        raw.write_desc(i, raw.read_desc(i)._replace(addr=1 << 60))
    a.send([frame(B, A)] * 10)
    a.drain()
    assert wire.drops("b") == {"ring-fault": 10}
    assert wire.drops("a") == {}
    wire.wait_state("b", "fault")
    a.send([frame(C, A)])
    assert len(c.recv(1)) == 1


def test_drops_add_up_on_flooding(wire: Wire) -> None:
    """One frame, three receivers: delivered here, dropped there, each on its own account."""
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    small = wire.guest("c", 3, rx_buf_len=100, features=DEFAULT_FEATURES & ~Feature.MRG_RXBUF)
    low = wire.guest("d", 4, mtu_of_port=80)
    head = parse_mac(BROADCAST) + parse_mac(A) + ETHERTYPE_TEST
    a.send([head + bytes(86)] * 5)
    assert len(b.recv(5)) == 5
    a.drain()
    assert wire.drops("c") == {"buffer-small": 5}
    assert wire.drops("d") == {"egress-mtu": 5}
    assert wire.drops("a") == wire.drops("b") == {}
    assert wire.stats("b")["egress_frames"] == 5
    assert wire.stats("b")["egress_bytes"] == 500
    assert silent(small, low)


def test_counters_of_bytes(wire: Wire) -> None:
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    before_a, before_b = wire.stats("a"), wire.stats("b")
    lengths = [60, 61, 1514]
    a.send(frames(B, A, lengths))
    assert len(b.recv(3)) == 3
    a.drain()
    after_a, after_b = wire.stats("a"), wire.stats("b")
    assert after_a["ingress_bytes"] - before_a["ingress_bytes"] == sum(lengths)
    assert after_b["egress_bytes"] - before_b["egress_bytes"] == sum(lengths)
    assert after_a["egress_bytes"] == before_a["egress_bytes"]
    assert after_b["ingress_bytes"] == before_b["ingress_bytes"]


@pytest.mark.parametrize("length", [4, 18, 24])
def test_short_vlan_frames(wire: Wire, length: int) -> None:
    """A VLAN EtherType with nothing or little after it."""
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    sent = (parse_mac(B) + parse_mac(A) + b"\x81\x00" + bytes(32))[: 12 + length]
    a.send([sent])
    assert b.recv(1) == [sent]
