"""Guests and frontends that ask too much of the switch: the others get theirs all the same."""

from __future__ import annotations

import contextlib
import os

from frames import BROADCAST, frame, frames, mac
from running import Wire, silent, teach

from vswitch.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.guest.raw import RawDesc
from vswitch.vhost_user.protocol import Feature

A, B, C = mac(1), mac(2), mac(3)
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
    b, c = wire.guest("b", 2), wire.guest("c", 3)
    teach(a, b, c)
    for queue in a.queues():
        fill_and_block(queue.call_fd)
        fill_and_block(queue.err_fd)
        queue.raw.avail_flags = 0
    calls = wire.stats("a")["calls"]
    for tag in range(20):
        # Into its receiveq, then out of its transmitq.
        b.send([frame(A, B, tag=tag)])
        b.drain()
        a.transmitqs[0].ring.send([frame(BROADCAST, A, tag=tag)], 0, None)
        a.transmitqs[0].kick()
        assert b.recv(1) == c.recv(1) == [frame(BROADCAST, A, tag=tag)]
    exchange(b, c)
    assert wire.stats("a")["calls"] - calls >= 40
    # An error of a ring is told by the event loop; so is, once, that a ring has started.
    a.transmitqs[0].raw.offer(RawDesc(1 << 50, 72))
    a.transmitqs[0].kick()
    wire.wait_state("a", "fault")
    wire.wait_until(lambda: os.eventfd_read(a.transmitqs[0].err_fd) > FULL, "the error is told")
    exchange(b, c)
    a.frontend.set_vring_call(0, a.receiveqs[0].call_fd)
    a.frontend.sync()
    a.disconnect()
    wire.wait_state("a", "listening")
    wire.remove("a")
    assert wire.client.ping() >= 0
    exchange(b, c)
    assert silent(b, c)


def test_workers_say_how_they_notify(wire: Wire) -> None:
    assert [worker["notify"] for worker in wire.client.workers()] == ["aio"]
    wire.switch.wait_for_log("notifications")
