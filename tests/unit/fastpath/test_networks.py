"""Networks, hubs and cables in the fast path: who gets a frame, and who does not."""

from __future__ import annotations

from itertools import count

import pytest

from tests.support.frames import BROADCAST, frame, mac
from tests.support.rig import Rig, stepping
from vswitch.fastpath.main.fdb import mac_key
from vswitch.fastpath.main.port import Port
from vswitch.lab.guest import SoftwareGuest
from vswitch.vhost_user.protocol import Feature

A, B, C, D = (mac(n) for n in (1, 2, 3, 4))
FORMATS = {"split": Feature(0), "packed": Feature.RING_PACKED}
LACP = "01:80:c2:00:00:02"

tags = count(1)


def send(rig: Rig, guest: SoftwareGuest, dst: str, src: str | None = None) -> bytes:
    sent = frame(dst, src or guest.mac.hex(":"), tag=next(tags))
    assert guest.transmitqs[0].ring.send([sent], 0, None) == 1
    assert rig.turn() == 1
    guest.transmitqs[0].ring.reap()
    return sent


def move(rig: Rig, port: Port, network: object) -> None:
    """As the switch has ports change their networks."""
    port.paused = True
    rig.settle()
    old = port.network
    if old is not None:
        old.fdb.flush(port.id)
    if network is None:
        port.connect(None)
    else:
        port.join(network)  # type: ignore[arg-type]
    port.paused = False
    rig.settle()


def got(guests: list[SoftwareGuest], sent: bytes) -> list[int]:
    """Which of them received a frame, once."""
    found = []
    for n, guest in enumerate(guests):
        frames = guest.poll_frames(2)
        assert frames in ([], [sent])
        found += [n] * len(frames)
    return found


@pytest.mark.parametrize("features", FORMATS.values(), ids=FORMATS)
def test_a_network_is_a_broadcast_domain(features: Feature) -> None:
    with stepping() as rig:
        pairs = [rig.guest(n, features) for n in (1, 2, 3, 4)]
        guests = [guest for guest, _ in pairs]
        other = rig.engine.add_network("other", 64)
        for _, port in pairs[2:]:
            move(rig, port, other)
        assert got(guests, send(rig, guests[0], BROADCAST)) == [1]
        assert got(guests, send(rig, guests[2], BROADCAST)) == [3]
        assert got(guests, send(rig, guests[3], A)) == [2], "unknown there, known here"
        assert got(guests, send(rig, guests[1], A)) == [0]
        # The same address in both of them is two stations.
        assert got(guests, send(rig, guests[3], BROADCAST, src=A)) == [2]
        assert got(guests, send(rig, guests[2], A)) == [3]
        assert got(guests, send(rig, guests[1], A)) == [0]
        assert {key for key, *_ in rig.engine.fdb.entries()} == {mac_key(A), mac_key(B)}
        assert {key for key, *_ in other.fdb.entries()} == {mac_key(m) for m in (A, C, D)}


def test_a_flow_goes_on_in_the_network_that_its_port_moved_to() -> None:
    """Each ring remembers where its last frame went: not what that was in another network."""
    with stepping() as rig:
        pairs = [rig.guest(n) for n in (1, 2, 3)]
        guests = [guest for guest, _ in pairs]
        other = rig.engine.add_network("other", 64)
        move(rig, pairs[2][1], other)
        send(rig, guests[1], BROADCAST)
        for guest in guests:
            guest.poll_frames(2)
        assert got(guests, send(rig, guests[0], B)) == [1]
        move(rig, pairs[0][1], other)
        assert rig.engine.fdb.lookup(mac_key(A)) is None
        assert got(guests, send(rig, guests[0], B)) == [2], "not known there: flooded"
        assert got(guests, send(rig, guests[1], A)) == []
        assert rig.drops(pairs[1][1]) == {"no-destination": 1}


def test_a_hub() -> None:
    """Nothing is learned; a static entry counts as ever."""
    with stepping() as rig:
        pairs = [rig.guest(n) for n in (1, 2, 3)]
        guests = [guest for guest, _ in pairs]
        hub = rig.engine.add_network("hub", 64, learning=False)
        for _, port in pairs:
            move(rig, port, hub)
        assert got(guests, send(rig, guests[0], B)) == [1, 2]
        assert got(guests, send(rig, guests[1], A)) == [0, 2]
        assert len(hub.fdb) == 0
        hub.fdb.add_static(mac_key(B), pairs[1][1].id)
        assert got(guests, send(rig, guests[0], B)) == [1]
        assert rig.engine.stats(pairs[0][1])["macs_refused"] == 0


def cable(rig: Rig, one: Port, other: Port) -> None:
    for port in (one, other):
        port.paused = True
    rig.settle()
    one.connect(other)
    other.connect(one)
    for port in (one, other):
        port.paused = False
    rig.settle()


@pytest.mark.parametrize("features", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dst", [B, A, C, BROADCAST, LACP, "00:00:00:00:00:00"])
@pytest.mark.parametrize("src", [A, B, BROADCAST, "00:00:00:00:00:00"])
def test_a_cable_carries_whatever_enters_it(features: Feature, src: str, dst: str) -> None:
    with stepping() as rig:
        pairs = [rig.guest(n, features) for n in (1, 2, 3)]
        guests = [guest for guest, _ in pairs]
        cable(rig, pairs[0][1], pairs[1][1])
        assert got(guests, send(rig, guests[0], dst, src)) == [1]
        assert got(guests, send(rig, guests[1], dst, src)) == [0]
        assert got(guests, send(rig, guests[2], dst, C)) == [], "it is alone in its network"
        assert rig.drops(pairs[0][1]) == rig.drops(pairs[1][1]) == {}
        assert [key for key, *_ in rig.engine.fdb.entries()] == [mac_key(C)]


def test_what_a_cable_does_not_carry() -> None:
    with stepping() as rig:
        pairs = [rig.guest(n) for n in (1, 2)]
        guests = [guest for guest, _ in pairs]
        cable(rig, pairs[0][1], pairs[1][1])
        ring = guests[0].transmitqs[0].ring
        assert ring.send([b"x" * 13], 0, None) == 1
        rig.turn()
        pairs[0][1].max_len = 100
        assert ring.send([b"x" * 101], 0, None) == 1
        rig.turn()
        pairs[0][1].max_len = 1518
        pairs[1][1].max_len = 100
        assert ring.send([b"x" * 101], 0, None) == 1
        rig.turn()
        assert guests[1].poll_frames(1) == []
        assert rig.drops(pairs[0][1]) == {"runt": 1, "oversize": 1}
        assert rig.drops(pairs[1][1]) == {"egress-mtu": 1}


def test_a_cable_with_one_end() -> None:
    with stepping() as rig:
        pairs = [rig.guest(n) for n in (1, 2)]
        guests = [guest for guest, _ in pairs]
        move(rig, pairs[0][1], None)
        assert got(guests, send(rig, guests[0], BROADCAST)) == []
        assert got(guests, send(rig, guests[1], BROADCAST)) == []
        assert rig.drops(pairs[0][1]) == {"no-destination": 1}
        cable(rig, *(port for _, port in pairs))
        for ring in pairs[1][1].rings.values():
            ring.enabled = False
        rig.settle()
        assert got(guests, send(rig, guests[0], BROADCAST)) == []
        assert rig.drops(pairs[0][1]) == {"no-destination": 1, "egress-down": 1}


def test_the_worker_says_when_a_table_is_to_grow() -> None:
    with stepping() as rig:
        (guest, port), _ = (rig.guest(n) for n in (1, 2))
        asked = []
        for n in range(600):
            send(rig, guest, BROADCAST, src=f"52:54:01:00:{n >> 8:02x}:{n & 255:02x}")
            asked += [
                number for kind, number, *_ in rig.engine.take_events() if kind == "fdb-grows"
            ]
            if asked and len(rig.engine.fdb) == 300:
                rig.engine.retire(rig.engine.fdb.grow())
                rig.settle()
        assert asked == [port.id], "once"
        # One whose places were taken is learned from its next frame.
        assert len(rig.engine.fdb) + rig.engine.stats(port)["macs_refused"] == 600
        assert not rig.engine.fdb.must_grow
