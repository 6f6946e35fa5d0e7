"""Where frames go: learning, flooding, static entries, aging, moves, VLANs, reserved groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.formats import FORMATS
from tests.support.frames import BROADCAST, frame, frames, mac
from tests.support.running import DEADLINE_S, Wire, silent, teach
from vswitch.errors import ExistsError, NotFoundError
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.guest.packets import format_mac, parse_mac


@pytest.fixture(params=["split", "packed-in-order"])
def wire(wire: Wire, request: pytest.FixtureRequest) -> Wire:
    """Everything here with guests of these formats."""
    wire.extra_features = FORMATS[request.param]
    return wire


@pytest.fixture
def trio(wire: Wire) -> tuple[SoftwareGuest, SoftwareGuest, SoftwareGuest]:
    """Three guests a, b, c on ports of these names; nothing is learned yet."""
    return wire.guest("a", 1), wire.guest("b", 2), wire.guest("c", 3)


A, B, C = mac(1), mac(2), mac(3)
Trio = tuple[SoftwareGuest, SoftwareGuest, SoftwareGuest]


def tagged(dst: str, src: str, vlan: int, length: int = 64, tag: int = 0) -> bytes:
    plain = frame(dst, src, length - 4, tag)
    return plain[:12] + b"\x81\x00" + (0xE000 | vlan).to_bytes(2, "big") + plain[12:]


def test_unknown_unicast_floods_and_known_does_not(wire: Wire, trio: Trio) -> None:
    a, b, c = trio
    first = frame(B, A, tag=1)
    a.send([first])
    assert b.recv(1) == c.recv(1) == [first]
    reply = frame(A, B, tag=2)
    b.send([reply])
    assert a.recv(1) == [reply]
    again = frame(B, A, tag=3)
    a.send([again])
    assert b.recv(1) == [again]
    a.drain()
    b.drain()
    assert silent(a, b, c)
    assert wire.learned() == {A: "a", B: "b"}
    assert wire.drops("a") == wire.drops("b") == wire.drops("c") == {}


@pytest.mark.parametrize("vlan", [0, 7])
def test_all_zeros_is_an_unknown_destination_like_any_other(
    wire: Wire, trio: Trio, vlan: int
) -> None:
    """As with a Linux bridge: whatever port has which number."""
    a, b, c = trio
    teach(a, b, c)
    zeros = "00:00:00:00:00:00"
    for tag, sender in enumerate(trio):
        source = format_mac(sender.mac)
        sent = tagged(zeros, source, vlan, tag=tag) if vlan else frame(zeros, source, tag=tag)
        sender.send([sent])
        for other in trio:
            if other is not sender:
                assert other.recv(1) == [sent]
        sender.drain()
        assert silent(sender)
    assert zeros not in wire.learned()


@pytest.mark.parametrize(
    "group",
    [
        BROADCAST,
        "33:33:00:00:00:01",
        "01:00:5e:00:00:fb",
        *(f"01:80:c2:00:00:{n:02x}" for n in (0, 1, 2, 3, 0xE, 0xF, 0x10)),
    ],
)
def test_groups_reach_everyone_else(wire: Wire, trio: Trio, group: str) -> None:
    """Also the reserved ones (STP, pause, LACP, 802.1X, LLDP): labs run them between guests."""
    a, b, c = trio
    sent = frames(group, A, [60, 64, 128, 1514])
    a.send(sent)
    assert b.recv(4) == c.recv(4) == sent
    a.drain()
    assert silent(a)
    assert group not in wire.learned()


def test_no_hairpin(wire: Wire, trio: Trio) -> None:
    a, b, c = trio
    teach(a, b, c)
    # Two addresses behind one port, and a frame to itself.
    a.send([frame(A, mac(9))])
    a.send([frame(A, A)])
    a.drain()
    assert silent(a, b, c)
    assert wire.drops("a") == {"same-port": 2}


def test_move(wire: Wire, trio: Trio) -> None:
    a, b, c = trio
    teach(a, b, c)
    from_b = frame(BROADCAST, A)
    b.send([from_b])
    assert a.recv(1) == c.recv(1) == [from_b]
    assert wire.learned() == {A: "b", B: "b", C: "c"}
    moved = frame(A, C, tag=5)
    c.send([moved])
    assert b.recv(1) == [moved]
    c.drain()
    assert silent(a)
    # Back again: A itself speaks.
    a.send([frame(B, A)])
    assert len(b.recv(1)) == 1
    c.send([moved])
    assert a.recv(1) == [moved]
    c.drain()
    assert silent(b)


def test_static_entries(wire: Wire, trio: Trio) -> None:
    a, b, c = trio
    teach(a, b, c)
    client = wire.client
    client.fdb_add(mac(7), "b")
    a.send([frame(mac(7), A)])
    assert len(b.recv(1)) == 1
    # A static entry neither moves nor is flushed.
    c.send([frame(B, mac(7))])
    assert len(b.recv(1)) == 1
    assert wire.learned()[mac(7)] == "b"
    assert client.fdb_flush() == 3
    assert wire.learned() == {mac(7): "b"}
    with pytest.raises(ExistsError, match="static entry of port b"):
        client.fdb_add(mac(7), "c")
    client.fdb_del(mac(7))
    with pytest.raises(NotFoundError):
        client.fdb_del(mac(7))
    unknown = frame(mac(7), A, tag=4)
    a.send([unknown])
    assert b.recv(1) == c.recv(1) == [unknown]


def test_flush_of_one_port(wire: Wire, trio: Trio) -> None:
    teach(*trio)
    assert wire.client.fdb_flush("b") == 1
    assert wire.learned() == {A: "a", C: "c"}
    # What is forgotten is flooded, however warm the caches of the rings are.
    a, b, c = trio
    a.send([frame(B, A)])
    assert b.recv(1) == c.recv(1) == [frame(B, A)]


def test_vlans_learn_apart(wire: Wire, trio: Trio) -> None:
    a, b, c = trio
    in_5 = tagged(BROADCAST, A, 5)
    a.send([in_5])
    assert b.recv(1) == c.recv(1) == [in_5]
    in_6 = tagged(BROADCAST, A, 6)
    b.send([in_6])
    assert a.recv(1) == c.recv(1) == [in_6]
    entries = {(e["mac"], e["vlan"]): e["port"] for e in wire.client.fdb()}
    assert entries == {(A, 5): "a", (A, 6): "b"}
    for vlan, there, elsewhere in ((5, a, b), (6, b, a)):
        sent = tagged(A, C, vlan, tag=vlan)
        c.send([sent])
        assert there.recv(1) == [sent]
        c.drain()
        assert silent(elsewhere)
    untagged = frame(A, C)
    c.send([untagged])
    assert a.recv(1) == b.recv(1) == [untagged]


def test_many_addresses(wire: Wire, trio: Trio) -> None:
    """Thousands behind each port, all found again.

    A worker that finds the table locked does not wait and learns from the next frame.
    """
    a, b, c = trio
    behind = [("a", a, 0x1000), ("b", b, 0x8000)]

    def all_are_learned() -> bool:
        learned = wire.learned()
        if learned.get(C) != "c":
            c.send([frame(BROADCAST, C)])
            assert len(a.recv(1)) == len(b.recv(1)) == 1
        for name, guest, base in behind:
            missing = [n for n in range(base, base + 2000) if learned.get(mac(n)) != name]
            for start in range(0, len(missing), 100):
                sent = [frame(C, mac(n), tag=n) for n in missing[start : start + 100]]
                guest.send(sent)
                assert c.recv(len(sent)) == sent
        return len(learned) == 1 + 2 * 2000

    wire.wait_until(all_are_learned, "all are learned")
    for _, guest, base in behind:
        for start in range(base, base + 2000, 100):
            sent = [frame(mac(n), C, tag=n) for n in range(start, start + 100)]
            c.send(sent)
            assert guest.recv(100) == sent
    c.drain()
    assert silent(a, b)


def test_disconnect_forgets(wire: Wire, trio: Trio) -> None:
    a, b, c = trio
    teach(a, b, c)
    b.disconnect()
    wire.wait_state("b", "listening")
    assert wire.learned() == {A: "a", C: "c"}
    a.send([frame(B, A)])
    assert len(c.recv(1)) == 1


def test_rarp_announces_a_guest(wire: Wire, trio: Trio) -> None:
    """SEND_RARP: the switch says on the guest's behalf where it is now."""
    a, b, c = trio
    teach(a, b, c)
    b.frontend.send_rarp(parse_mac(A))
    heard = a.recv(1)
    assert heard == c.recv(1)
    assert heard[0][:14] == parse_mac(BROADCAST) + parse_mac(A) + b"\x80\x35"
    assert wire.learned() == {A: "b", B: "b", C: "c"}


def test_pings(wire: Wire) -> None:
    a = wire.guest("a", 1, "10.0.0.1")
    b = wire.guest("b", 2, "10.0.0.2")
    c = wire.guest("c", 3, "10.0.0.3")
    for guest in (b, c):
        guest.start_responder()
    assert a.ping("10.0.0.2")
    assert a.ping("10.0.0.3")
    assert a.ping(str(b.stack.addresses[1]))
    a.start_responder()
    assert b.ping("10.0.0.1")
    assert not c.ping("10.0.0.4", timeout=0.1)
    for guest in (a, b, c):
        guest.stop_responder()


def test_aging(start: Callable[..., Wire]) -> None:
    wire = start(mac_aging_s=1)
    a, b, c = wire.guest("a", 1), wire.guest("b", 2), wire.guest("c", 3)
    events = wire.client.events("mac-learned", "mac-aged", timeout=DEADLINE_S)
    teach(a, b)
    wire.client.fdb_add(mac(8), "a")
    assert len(c.recv(2)) == 2
    aged = set()
    for event in events:
        if event["event"] == "mac-aged":
            aged.add((event["mac"], event["port"]))
        if len(aged) == 2:
            break
    assert aged == {(A, "a"), (B, "b")}
    assert wire.learned() == {mac(8): "a"}
    a.send([frame(B, A)])
    assert b.recv(1) == c.recv(1) == [frame(B, A)]


def test_full_fdb(start: Callable[..., Wire]) -> None:
    """What finds no place is flooded, and forwarded all the same."""
    wire = start(fdb_size=16)
    a, b, c = wire.guest("a", 1), wire.guest("b", 2), wire.guest("c", 3)
    teach(a, b, c)
    for n in range(100, 200):
        sent = frame(BROADCAST, mac(n), tag=n)
        a.send([sent])
        assert b.recv(1) == c.recv(1) == [sent]
    assert 8 <= len(wire.client.fdb()) <= 16
    known = wire.learned()
    for n in range(100, 200):
        sent = frame(mac(n), C, tag=n)
        c.send([sent])
        assert a.recv(1) == [sent]
        # Whoever is not known is looked for everywhere.
        if mac(n) not in known:
            assert b.recv(1) == [sent]
    c.drain()
    assert silent(a, b)
