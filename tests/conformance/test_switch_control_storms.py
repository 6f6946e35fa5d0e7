"""Control clients by the thousand and without a pause: guests come, talk and go as ever."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import msgpack

from tests.support.frames import frame, mac
from tests.support.running import Wire, exchanging, teach
from vswitch.control.server import CLIENTS_MAX, CLIENTS_RESERVED

A, B = mac(1), mac(2)
HALF = b"\x94\x00\x01\xa5stat"
OWN_TURN_MS_MAX = 500.0
"""Of the event loop, without the time in which no CPU ran it: far above what is seen, some
milliseconds, and far below what a queue of floods would take."""


def descriptors(wire: Wire) -> int:
    return len(os.listdir(f"/proc/{wire.switch.process.pid}/fd"))


def own_turn_ms(wire: Wire) -> float:
    """The longest turn of the event loop since the switch started."""
    turns = wire.client.event_loop()["turns"]
    assert turns is not None
    return turns["since_start"]["own_ns"] / 1e6


def connect(wire: Wire) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(wire.switch.run_dir / "control.sock"))
    return client


@contextlib.contextmanager
def flood(wire: Wire, request: bytes, *, read: bool) -> Iterator[None]:
    """One client that asks as fast as it can, and reads the answers or not."""
    client = connect(wire)
    over = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError):
            while not over.is_set():
                client.sendall(request * 200)

    def listen() -> None:
        with contextlib.suppress(OSError):
            while client.recv(1 << 16):
                pass

    threads = [threading.Thread(target=ask)] + [threading.Thread(target=listen)] * read
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        client.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        client.close()


def test_floods_of_requests(wire: Wire) -> None:
    """A guest that connects meanwhile has its turn between two requests, and so has a client."""
    b, c = wire.guest("b", 2), wire.guest("c", 3)
    teach(b, c)
    before = descriptors(wire)
    stats = msgpack.packb([0, 1, "stats", []])
    nonsense = msgpack.packb([0, 1, "add_port", [{f"k{i}": i for i in range(50)}]])
    with contextlib.ExitStack() as floods:
        for request in (stats, nonsense):
            for read in (True, False):
                floods.enter_context(flood(wire, request, read=read))
        with exchanging(b, c):
            for n in range(10):
                name = f"x{n}"
                guest = wire.guest(name, 1000 + n)
                wire.client.ping()
                wire.wait_state(name, "ready")
                guest.close()
                wire.remove(name)
    assert own_turn_ms(wire) < OWN_TURN_MS_MAX
    wire.wait_until(lambda: descriptors(wire) == before, "as few descriptors as before")


def test_a_thousand_that_have_begun_a_request(wire: Wire) -> None:
    """As many as there is room for stay, for ten seconds; the others are told, and go."""
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    before = descriptors(wire)
    clients: list[socket.socket] = []
    told = 0
    for _ in range(1000):
        client = connect(wire)
        with contextlib.suppress(ConnectionError):
            client.sendall(HALF)
        clients.append(client)
        if len(clients) > CLIENTS_MAX + CLIENTS_RESERVED:
            with contextlib.suppress(ConnectionError):
                _, msgid, error, _ = msgpack.unpackb(client.recv(4096))
                assert (msgid, error["code"]) == (None, "busy")
                told += 1
            client.close()
            clients.pop()
    assert told > 900
    assert descriptors(wire) <= before + CLIENTS_MAX + CLIENTS_RESERVED + 1
    assert wire.client.ping() > 0, "who was there before is served"
    assert own_turn_ms(wire) < OWN_TURN_MS_MAX
    a.send([frame(B, A)])
    assert b.recv(1) == [frame(B, A)]
    for client in clients:
        client.close()
    wire.wait_until(lambda: descriptors(wire) == before, "as few descriptors as before")
