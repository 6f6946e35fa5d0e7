"""Whose turn it is: a guest pays for what it makes of work with turns of its own."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.frames import ETHERTYPE_TEST
from tests.support.ippackets import Packet
from tests.support.rig import ALL, Rig, running, stepping
from vswitch.fastpath.main.port import Port
from vswitch.fastpath.main.ring import Ring
from vswitch.lab.guest import SoftwareGuest
from vswitch.vhost_user.protocol import Feature

PORTS = 10
BURST = 64
BROADCAST = b"\xff" * 6


def frame(dst: bytes, src: bytes, tag: int) -> bytes:
    return (dst + src + ETHERTYPE_TEST + tag.to_bytes(2, "big")).ljust(60, b"\0")


def test_turns_are_counted_in_copies() -> None:
    """Two transmitqs that are full when the worker first sees them, and what a third guest gets."""
    with running() as rig:
        guests = [rig.guest(n, queue_size=1024, max_frame_len=1518)[0] for n in range(1, PORTS + 1)]
        flooder, bystander, receiver = guests[:3]
        receiver.transmitqs[0].ring.send([frame(BROADCAST, receiver.mac, 0)], 0, None)
        receiver.transmitqs[0].kick()
        receiver.drain()
        rings = [
            ring
            for port in list(rig.engine.ports.values())[:2]
            for ring in port.rings.values()
            if ring.is_transmitq
        ]
        assert all(ring.begin_move() for ring in rings)
        rig.settle()
        bursts = 3
        flood = [frame(BROADCAST, flooder.mac, tag) for tag in range(bursts * BURST)]
        assert flooder.transmitqs[0].ring.send(flood, 0, None) == len(flood)
        theirs = [frame(receiver.mac, bystander.mac, tag) for tag in range(800)]
        assert bystander.transmitqs[0].ring.send(theirs, 0, None) == len(theirs)
        assert all(rig.engine.finish_move(ring, 0) for ring in rings)
        rig.settle()
        for guest in (flooder, bystander):
            guest.transmitqs[0].kick()
        got = receiver.recv(len(flood) + len(theirs))
        assert sorted(got) == sorted(flood + theirs)
        floods = [at for at, each in enumerate(got) if each[:6] == BROADCAST]
        # A burst to nine ports makes nine bursts of copies: eight turns without, then one with.
        assert floods[:BURST] == list(range(floods[0], floods[0] + BURST))
        assert floods[BURST] - floods[BURST - 1] - 1 == (PORTS - 1) * BURST


def test_turns_of_a_tap() -> None:
    """The same of what comes from a TAP, here a socket that frames are read from."""
    with running() as rig:
        guests = [rig.guest(n, queue_size=1024, max_frame_len=1518)[0] for n in range(1, PORTS)]
        bystander, receiver = guests[:2]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            flood = [frame(BROADCAST, b"\x02\0\0\0\0\x01", tag) for tag in range(3 * BURST)]
            receiver.transmitqs[0].ring.send([frame(BROADCAST, receiver.mac, 0)], 0, None)
            receiver.transmitqs[0].kick()
            receiver.drain()
            (ring,) = (r for r in rig.engine.ports[0].rings.values() if r.is_transmitq)
            assert ring.begin_move()
            rig.settle()
            sent = [frame(receiver.mac, bystander.mac, tag) for tag in range(800)]
            assert bystander.transmitqs[0].ring.send(sent, 0, None) == len(sent)
            for each in flood:
                theirs.send(bytes(12) + each, socket.MSG_DONTWAIT)
            port = rig.engine.add_port("tap", ours.fileno())
            assert rig.engine.finish_move(ring, 0)
            rig.settle()
            bystander.transmitqs[0].kick()
            got = receiver.recv(len(flood) + len(sent))
            assert sorted(got) == sorted(flood + sent)
            floods = [at for at, each in enumerate(got) if each[:6] == BROADCAST]
            assert floods[BURST] - floods[BURST - 1] - 1 == (PORTS - 1) * BURST
            rig.engine.remove_port(port)
            rig.settle()


@dataclass(frozen=True)
class Way:
    """Frames from one guest to another; options of both as for by_subject()."""

    length: int = 60
    header: bytes = bytes(12)
    sender: dict[str, Any] = field(default_factory=dict)
    receiver: dict[str, Any] = field(default_factory=dict)
    features: int = ALL
    """Of the receiver."""


SEGMENTED = Packet(bytes(2000))
ORDINARY = {
    "60 bytes": Way(),
    "1518 bytes": Way(1518),
    "in a few pieces": Way(sender={"tx_cuts": (0, 14, 54)}, receiver={"rx_cuts": (0, 14, 54)}),
    "buffers of 512 bytes": Way(1514, receiver={"rx_buf_len": 512}),
}
DEAR = {
    "sixty pieces": (Way(200, sender={"tx_cuts": tuple(range(1, 60))}), range(8, 24)),
    "64 KiB": (Way(65553, sender={"queue_size": 64}), range(8, 32)),
    "64 KiB into buffers of 256 bytes": (
        Way(65553, receiver={"rx_buf_len": 256, "rx_queue_size": 1024}), range(1, 8),
    ),
    "a receiver's forty pieces": (Way(receiver={"rx_cuts": tuple(range(1, 41))}), range(24, 60)),
    "a hundred segments": (
        Way(len(SEGMENTED.partial()), SEGMENTED.header(20).pack(), features=0), range(1, 3),
    ),
}  # fmt: skip


def step(rig: Rig, way: Way) -> tuple[SoftwareGuest, SoftwareGuest, Ring, Port, bytes]:
    """Two guests that know each other, the ring of the first and the port of the second."""
    common = {"queue_size": 256, "max_frame_len": max(2048, way.length)}
    sender, own = rig.guest(1, **(common | way.sender))
    receiver, port = rig.guest(2, way.features, **(common | way.receiver))
    receiver.transmitqs[0].ring.send([frame(BROADCAST, receiver.mac, 0)], 0, None)
    assert rig.turn() == 1
    (ring,) = (ring for ring in own.rings.values() if ring.is_transmitq)
    if way.header[0]:
        data = Packet(bytes(2000), dst=receiver.mac, src=sender.mac).partial()
    else:
        data = frame(receiver.mac, sender.mac, 0).ljust(way.length, b"\0")
    return sender, receiver, ring, port, data


@pytest.mark.parametrize("what", ORDINARY)
def test_a_turn_of_what_is_ordinary(what: str) -> None:
    way = ORDINARY[what]
    with stepping() as rig:
        sender, receiver, ring, port, data = step(rig, way)
        for _ in range(3):
            assert sender.transmitqs[0].ring.send([data] * BURST, 0, way.header) == BURST
            assert rig.turn() == BURST
            assert ring.debt == 0
            assert receiver.recv(BURST) == [data] * BURST
            sender.transmitqs[0].ring.reap()
        assert rig.drops(port) == {}


@pytest.mark.parametrize("what", DEAR)
def test_a_turn_of_what_is_much_work(what: str) -> None:
    """It is sat out, and the next turns are of fewer frames; of others the ring takes as ever."""
    way, at_once = DEAR[what]
    with stepping() as rig:
        sender, receiver, ring, _, data = step(rig, way)
        transmitq = sender.transmitqs[0].ring
        transmitq.send([data] * BURST, 0, way.header)
        rig.turn()
        assert ring.debt > BURST
        receiver.poll_frames(1000)
        transmitq.reap()
        # More than it may take of them now.
        assert transmitq.send([data] * BURST, 0, way.header) >= at_once.stop
        assert rig.turn() in at_once
        while rig.turn():
            receiver.poll_frames(1000)
        receiver.poll_frames(1000)
        transmitq.reap()


@pytest.mark.parametrize("format", ["split", "packed"])
def test_a_receiver_whose_buffers_are_in_very_many_pieces_sits_out(format: str) -> None:
    """One frame in a while gets there, however many are sent; they are dropped at no cost."""
    packed = Feature.RING_PACKED if format == "packed" else Feature(0)
    way = Way(2000, features=ALL | packed, receiver={"rx_buf_len": 16, "rx_queue_size": 1024})
    with stepping() as rig:
        sender, receiver, ring, port, data = step(rig, way)
        dropped = 0
        for _ in range(3):
            sender.transmitqs[0].ring.send([data] * BURST, 0, way.header)
            dropped += rig.turn() - 1
            assert receiver.poll_frames(100) == [data]
            assert rig.drops(port) == {"buffer-pieces": dropped}
            assert ring.debt == 0  # as a sender must not suffer for what a receiver does
            sender.transmitqs[0].ring.reap()
            rig.turn()


def test_a_turn_of_many_notifications() -> None:
    """Each is a system call: a frame to all who sleep costs as much as two bursts."""
    with stepping() as rig:
        sender, own = rig.guest(1)
        for n in range(2, PORTS + 1):
            rig.guest(n)
        (ring,) = (ring for ring in own.rings.values() if ring.is_transmitq)
        sender.transmitqs[0].ring.send([frame(BROADCAST, sender.mac, 0)], 0, None)
        assert rig.turn() == 1
        assert ring.debt == (PORTS - 1) * 16 - BURST
        # They do not ask for another one: they have not looked yet.
        sender.transmitqs[0].ring.send([frame(BROADCAST, sender.mac, 0)], 0, None)
        assert rig.turn() == 1
        assert ring.debt == (PORTS - 1) * 16 - BURST


@pytest.mark.parametrize("reads", [True, False], ids=["read", "full"])
def test_a_turn_of_frames_to_a_tap(reads: bool) -> None:
    """Each is a write, which costs as much as 32 copies, also when there is no room for the frame.

    A socket stands in for the TAP. That it is full does not hold the worker up.
    """
    with stepping() as rig:
        sender, own = rig.guest(1)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20 if reads else 4096)
            tap = rig.engine.add_port("tap", ours.fileno())
            rig.settle()
            (ring,) = (ring for ring in own.rings.values() if ring.is_transmitq)
            data = [frame(BROADCAST, sender.mac, tag) for tag in range(BURST)]
            assert sender.transmitqs[0].ring.send(data, 0, None) == BURST
            assert rig.turn() == BURST
            assert ring.debt == BURST * 32 - BURST
            dropped = rig.drops(tap).get("tap-busy", 0)
            assert (dropped == 0) == reads
            got = [theirs.recv(2000)[12:] for _ in range(BURST - dropped)]
            assert got == data[: len(got)]
            with pytest.raises(BlockingIOError):
                theirs.recv(1, socket.MSG_DONTWAIT)
            rig.engine.remove_port(tap)
            rig.settle()


def test_debts_are_forgiven_when_nobody_waits() -> None:
    """Who is alone has its next turn after two looks at the others, however dear the last was."""
    with running(idle_ns=0) as rig:
        sender, _ = rig.guest(1, queue_size=256)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            tap = rig.engine.add_port("tap", ours.fileno())
            rig.settle()
            (worker,) = rig.engine.workers
            before = worker.stats()
            data = [frame(BROADCAST, sender.mac, tag) for tag in range(3 * BURST)]
            assert sender.transmitqs[0].ring.send(data, 0, None) == len(data)
            sender.transmitqs[0].kick()
            assert [theirs.recv(2000)[12:] for _ in data] == data
            rig.engine.remove_port(tap)
            rig.settle()
            after = worker.stats()
            # Each of the three turns cost 32 bursts of copies, which are 31 turns of others.
            assert after["bursts"] - before["bursts"] == 3
            assert after["loops"] - before["loops"] < 31
