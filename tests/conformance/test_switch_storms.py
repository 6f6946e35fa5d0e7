"""Frontends that come by the thousand: nobody else notices, and nothing of them stays."""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.frames import frame, mac
from tests.support.running import Wire, exchanging, open_files, teach
from vswitch.lab.guest import SoftwareGuest
from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import MemRegion, Request

A, B, C = mac(1), mac(2), mac(3)
CONNECTS = 3000
PAGE = 4096

Guest = Callable[[socket.socket], None]


def leaves_at_once(_: socket.socket) -> None:
    """Without a word."""


def sends_descriptors(client: socket.socket) -> None:
    """Eight with a message that takes none."""
    whole = protocol.encode(Request.SET_OWNER)
    fds = [os.eventfd(0) for _ in range(8)]
    try:
        _send(client, whole, fds)
    finally:
        for fd in fds:
            os.close(fd)


def leaves_in_the_middle(client: socket.socket) -> None:
    """Of a memory table, whose descriptor has come."""
    whole = protocol.encode(
        Request.SET_MEM_TABLE, protocol.encode_mem_table([MemRegion(0, PAGE, 0, 0)])
    )
    fd = os.memfd_create("storm")
    try:
        os.ftruncate(fd, PAGE)
        _send(client, whole[:20], [fd])
    finally:
        os.close(fd)


def leaves_its_memory(client: socket.socket) -> None:
    """Mapped, with a ring on it that is half set up."""
    fd = os.memfd_create("storm")
    try:
        os.ftruncate(fd, PAGE)
        table = protocol.encode_mem_table([MemRegion(0, PAGE, 0, 0)])
        _send(client, protocol.encode(Request.SET_MEM_TABLE, table), [fd])
    finally:
        os.close(fd)
    with_fd = protocol.encode(Request.SET_VRING_CALL, protocol.encode_u64(0))
    fd = os.eventfd(0)
    try:
        _send(client, with_fd, [fd])
    finally:
        os.close(fd)


def _send(client: socket.socket, data: bytes, fds: list[int]) -> None:
    # It may be another one's turn already, and this one turned away.
    with contextlib.suppress(ConnectionError):
        client.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def storm(path: Path, guest: Guest, enough: Callable[[], bool] = lambda: True) -> None:
    """As fast as they are let in: connect() waits while the backlog is full.

    They are CONNECTS, and as many again as long as it is not `enough`.
    """
    for number in itertools.count(1):
        if number % CONNECTS == 0 and enough():
            break
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            guest(client)


def settled(wire: Wire, before: list[str]) -> bool:
    return len(open_files(wire)) == len(before)


@pytest.mark.parametrize(
    "guest", [leaves_at_once, sends_descriptors, leaves_in_the_middle, leaves_its_memory]
)
def test_a_storm_on_a_free_port(wire: Wire, guest: Guest) -> None:
    """Two neighbours exchange frames all the while, each one counted."""
    b, c = wire.guest("b", 2), wire.guest("c", 3)
    teach(b, c)
    path = wire.port("storm")
    before = open_files(wire)
    with exchanging(b, c):
        # The others come while one of these is being served.
        storm(path, guest, lambda: wire.info("storm")["connects"] > CONNECTS / 100)
        wire.wait_state("storm", "listening")
    assert wire.drops("b") == wire.drops("c") == {}
    wire.wait_until(lambda: settled(wire, before), f"as few descriptors as before: {before}")
    maps = Path(f"/proc/{wire.switch.process.pid}/maps").read_text()
    assert "memfd:storm" not in maps
    # A guest that means it comes in as ever.
    with SoftwareGuest(A) as a:
        a.connect(path)
        teach(a, wire.guest("d", 4))
        wire.wait_state("storm", "ready")


def test_a_storm_on_a_port_that_is_taken(wire: Wire) -> None:
    """All are turned away, and the guest whose port it is goes on."""
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    before = open_files(wire)
    lines = wire.switch.log.count("\n")
    over = threading.Event()
    storming = threading.Thread(target=storm, args=(Path(a.path), leaves_at_once, over.is_set))
    storming.start()
    tag = 0
    while storming.is_alive():
        if tag > 100:
            over.set()  # as soon as it is a storm
        tag += 1
        for sender, receiver, dst, src in ((a, b, B, A), (b, a, A, B)):
            sent = frame(dst, src, tag=tag & 0xFF)
            sender.send([sent])
            assert receiver.recv(1) == [sent]
    storming.join()
    assert tag > 100
    assert wire.info("a")["connects"] == 1
    assert wire.info("a")["state"] == "ready"
    wire.wait_until(lambda: settled(wire, before), f"as few descriptors as before: {before}")
    # Some are in the log, and how many were not.
    wire.wait_log("more lines like: port a: refused a second frontend (pid %s)")
    assert wire.switch.log.count("\n") - lines < CONNECTS / 2
