"""Whose turn it is: a guest that floods pays for its copies with turns of its own."""

from __future__ import annotations

import socket

from rig import running

PORTS = 10
BURST = 64
BROADCAST = b"\xff" * 6


def frame(dst: bytes, src: bytes, tag: int) -> bytes:
    return (dst + src + b"\x88\xb5" + tag.to_bytes(2, "big")).ljust(60, b"\0")


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
