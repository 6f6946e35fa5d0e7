"""Guests and frontends that ask too much of the switch: the others get theirs all the same."""

from __future__ import annotations

import contextlib
import os
import time

import pytest

from tests.support.frames import BROADCAST, frame, frames, mac
from tests.support.running import Wire, exchanging, teach
from vswitch.lab.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.lab.guest.raw import RawDesc
from vswitch.vhost_user.protocol import Feature

A, B, C, D = mac(1), mac(2), mac(3), mac(4)
FULL = (1 << 64) - 2
"""The most that an eventfd's counter takes by write(2)."""


def fill_and_block(fd: int) -> None:
    """Leave an eventfd so that write(2) waits for whoever reads it, which nobody does."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
    os.eventfd_write(fd, FULL)
    os.set_blocking(fd, True)


def exchange(b: SoftwareGuest, c: SoftwareGuest, n: int = 500) -> None:
    """Two guests send each other frames, and get them all."""
    for sender, receiver, dst, src in ((b, c, C, B), (c, b, B, C)):
        sent = frames(dst, src, [60, 300, 1514]) * (n // 3)
        for at in range(0, len(sent), 128):
            sender.send(sent[at : at + 128])
            assert receiver.recv(len(sent[at : at + 128])) == sent[at : at + 128]
        sender.drain()


def test_eventfds_that_block(wire: Wire) -> None:
    """A frontend fills its eventfds and clears O_NONBLOCK: nobody waits for it.

    The worker signals calls, the event loop calls after a start and errors after a fault.
    """
    # Without EVENT_IDX a driver that wants notifications gets one a burst.
    a = wire.guest("a", 1, features=DEFAULT_FEATURES & ~Feature.RING_EVENT_IDX)
    b, c, d = wire.guest("b", 2), wire.guest("c", 3), wire.guest("d", 4)
    teach(a, b, c, d)
    for queue in a.queues():
        fill_and_block(queue.call_fd)
        fill_and_block(queue.err_fd)
        queue.raw.avail_flags = 0
    calls = wire.stats("a")["calls"]
    with exchanging(b, c):
        for tag in range(20):
            # Into its receiveq, then out of its transmitq.
            d.send([frame(A, D, tag=tag)])
            d.drain()
            a.transmitqs[0].ring.send([frame(D, A, tag=tag)], 0, None)
            a.transmitqs[0].kick()
            assert d.recv(1) == [frame(D, A, tag=tag)]
        # The call that the last frame's buffer is back comes after the frame itself.
        wire.wait_until(lambda: wire.stats("a")["calls"] - calls >= 40, "a call for every burst")
        # An error of a ring is told by the event loop; so is, once, that a ring has started.
        a.transmitqs[0].raw.offer(RawDesc(1 << 50, 72))
        a.transmitqs[0].kick()
        wire.wait_state("a", "fault")
        # One more than write(2) could have added.
        wire.wait_until(lambda: os.eventfd_read(a.transmitqs[0].err_fd) > FULL, "the error is told")
        a.frontend.set_vring_call(0, a.receiveqs[0].call_fd)
        a.frontend.sync()
        a.disconnect()
        wire.wait_state("a", "listening")
        wire.remove("a")
        assert wire.client.ping() >= 0


def test_workers_say_how_they_notify(wire: Wire) -> None:
    assert [worker["notify"] for worker in wire.client.workers()] == ["aio"]
    wire.switch.wait_for_log("notifications")


def test_a_port_learns_no_more_than_it_may(wire: Wire) -> None:
    """A guest that cycles through source addresses keeps to its part of the FDB."""
    socket = wire.port("a", max_macs=10)
    a = wire.enter(SoftwareGuest(A))
    a.connect(socket)
    b, c = wire.guest("b", 2), wire.guest("c", 3)
    teach(a, b, c)
    for n in range(0, 1000, 50):
        made_up = [
            frame(BROADCAST, f"02:00:00:00:{i >> 8:02x}:{i & 255:02x}") for i in range(n, n + 50)
        ]
        a.send(made_up)
        # They arrive: only the learning is refused.
        assert b.recv(50) == c.recv(50) == made_up
    info = wire.info("a")
    assert (info["macs"], info["max_macs"]) == (10, 10)
    assert wire.stats("a")["macs_refused"] == 991  # one of the ten is its own
    wire.wait_log("port a: 10 MAC addresses were learned, the most it may have")
    assert wire.switch.log[wire.log_start :].count("MAC addresses were learned") == 1
    learned = wire.learned()
    assert (learned[A], learned[B], learned[C]) == ("a", "b", "c")
    # Its neighbours' addresses are not for it to take, a newcomer's is learned.
    a.send([frame(BROADCAST, B)])
    assert b.recv(1) == c.recv(1) == [frame(BROADCAST, B)]
    assert wire.learned()[B] == "b"
    d = wire.guest("d", 4)
    teach(d, a, b, c)
    assert wire.learned()[mac(4)] == "d"
    exchange(b, c)
    wire.client.set_port("a", max_macs=1000)
    a.send([frame(B, "02:00:00:00:ff:ff")])
    assert b.recv(1) == [frame(B, "02:00:00:00:ff:ff")]
    assert wire.info("a")["macs"] == 11


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        ("broadcast", BROADCAST),
        ("multicast", "01:00:5e:00:00:01"),
        ("unknown", "02:ff:00:00:00:01"),
    ],
)
def test_storm_control(wire: Wire, kind: str, to: str) -> None:
    a, b, c = wire.guest("a", 1), wire.guest("b", 2), wire.guest("c", 3)
    teach(a, b, c)
    began = time.monotonic()
    wire.client.set_port("a", storm_burst=5, **{f"storm_{kind}": 1})
    a.send([frame(to, A, tag=tag) for tag in range(100)])
    a.drain()
    dropped = wire.drops("a")[f"storm-{kind}"]
    assert 95 - (time.monotonic() - began + 1) <= dropped <= 95
    passed = [frame(to, A, tag=tag) for tag in range(5)]
    assert b.recv(100 - dropped)[:5] == passed
    assert c.recv(100 - dropped)[:5] == passed
    # The other kinds and what goes to a known address are none of its business, nor are others'.
    for other in {BROADCAST, "01:00:5e:00:00:01", "02:ff:00:00:00:01", B} - {to}:
        a.send([frame(other, A)] * 50)
        assert b.recv(50) == [frame(other, A)] * 50
        c.recv(0 if other == B else 50)
    b.send([frame(to, B)] * 50)
    assert c.recv(50) == [frame(to, B)] * 50
    wire.client.set_port("a", **{f"storm_{kind}": None})
    a.recv(50)
    a.send([frame(to, A)] * 50)
    assert b.recv(50) == [frame(to, A)] * 50
    assert set(wire.drops("a")) == {f"storm-{kind}"}


def test_guests_that_take_nothing(wire: Wire) -> None:
    """One posts no receive buffers, one leaves its eventfd full: it is their loss alone."""
    a, b, c = wire.guest("a", 1, queue_size=64), wire.guest("b", 2), wire.guest("c", 3)
    d = wire.guest("d", 4)
    teach(a, b, c, d)
    a.auto_post = False
    fill_and_block(d.receiveqs[0].call_fd)
    n = 640
    sent = [frame(BROADCAST, B, tag=tag) for tag in range(n)]
    for at in range(0, n, 64):
        b.send(sent[at : at + 64])
        b.drain()
        assert c.recv(64) == d.poll_frames(64) == sent[at : at + 64]
    assert wire.drops("a") == {"no-buffer": n - 64}
    assert wire.drops("b") == wire.drops("c") == wire.drops("d") == {}
    exchange(b, c)
