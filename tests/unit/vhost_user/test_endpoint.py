"""Where frontends come from: listening, connecting again and again, and odd situations."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from vswitch.errors import SocketError
from vswitch.relay.process import Relay
from vswitch.vhost_user import endpoint
from vswitch.vhost_user.connection import Connection, ConnectionClosedError
from vswitch.vhost_user.endpoint import Connector, Listener


def run(test: Callable[[Relay], Awaitable[None]]) -> None:
    async def limited() -> None:
        relay = await Relay.start()
        try:
            async with asyncio.timeout(60):
                await test(relay)
        finally:
            await relay.close()

    asyncio.run(limited())


def listener(relay: Relay, path: Path) -> Listener:
    made = Listener(relay, path, mode=0o600, owner=None, group=None)
    made.open()
    return made


def client(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


def test_one_frontend_after_the_other(tmp_path: Path) -> None:
    async def test(relay: Relay) -> None:
        ours = listener(relay, tmp_path / "s")
        for _ in range(3):
            waiting = asyncio.create_task(ours.next())
            await asyncio.sleep(0)
            with client(tmp_path / "s") as theirs:
                got = await waiting
                theirs.send(b"x")
                assert await got.receive(1) == (b"x", [])
                assert got.peer.pid == os.getpid()
                got.close()
        ours.close()
        assert not (tmp_path / "s").exists()

    run(test)


def test_a_second_frontend_is_turned_away(tmp_path: Path) -> None:
    async def test(relay: Relay) -> None:
        ours = listener(relay, tmp_path / "s")
        first = client(tmp_path / "s")
        connection = Connection(await ours.next())
        reading = asyncio.create_task(connection.receive())
        refused: list[int | None] = []
        guard = asyncio.create_task(ours.guard(connection, refused.append))
        second = client(tmp_path / "s")
        second.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(second, 1) == b""
        assert refused == [os.getpid()]
        # When the first is gone, and before that was noticed, a third is its successor.
        first.close()
        third = client(tmp_path / "s")
        await guard
        with pytest.raises(ConnectionClosedError):
            await reading
        connection.close()
        successor = await ours.next()
        await successor.send(b"!")
        third.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(third, 1) == b"!"
        for sock in (second, third, successor):
            sock.close()
        ours.close()

    run(test)


def test_a_socket_file_that_was_removed_is_made_again(tmp_path: Path) -> None:
    async def test(relay: Relay) -> None:
        ours = listener(relay, tmp_path / "s")
        waiting = asyncio.create_task(ours.next())
        await asyncio.sleep(0)
        (tmp_path / "s").unlink()
        ours.check()
        assert ours.problem is None
        with client(tmp_path / "s"):
            (await waiting).close()
        ours.close()
        assert not (tmp_path / "s").exists()

    run(test)


def test_a_socket_file_that_another_listens_on_is_reported_and_left(tmp_path: Path) -> None:
    """QEMU with server=on unlinks what it finds and listens in its place: both ends listen."""

    async def test(relay: Relay) -> None:
        ours = listener(relay, tmp_path / "s")
        ours.check()
        assert ours.problem is None
        (tmp_path / "s").unlink()
        with socket.socket(socket.AF_UNIX) as qemu:
            qemu.bind(str(tmp_path / "s"))
            qemu.listen()
            ours.check()
            assert ours.problem is not None
            assert "both ends listen" in ours.problem
            assert "server=on" in ours.problem
            ours.close()
            assert (tmp_path / "s").exists(), "that one is not ours to remove"

    run(test)


def test_the_directory_goes_away(tmp_path: Path) -> None:
    async def test(relay: Relay) -> None:
        home = tmp_path / "run"
        home.mkdir()
        ours = listener(relay, home / "s")
        (home / "s").unlink()
        home.rmdir()
        ours.check()
        assert ours.problem is not None
        assert "no such directory" in ours.problem
        home.mkdir()
        ours.check()
        assert ours.problem is None
        assert (home / "s").exists()
        ours.close()

    run(test)


def test_listening_where_somebody_listens(tmp_path: Path) -> None:
    async def test(relay: Relay) -> None:
        ours = listener(relay, tmp_path / "s")
        with pytest.raises(SocketError, match="listens on it already"):
            listener(relay, tmp_path / "s")
        ours.close()

    run(test)


def test_a_relay_that_the_machine_does_not_run(tmp_path: Path) -> None:
    """More orders than its socket holds are kept, in their order, until it takes them."""
    many = 400

    async def test(relay: Relay) -> None:
        os.kill(relay.pid, signal.SIGSTOP)
        try:
            ours = [listener(relay, tmp_path / f"s{n}") for n in range(many)]
            assert relay.backlog > 0, "its socket takes that many"
            for n in range(0, many, 2):
                ours[n].close()
        finally:
            os.kill(relay.pid, signal.SIGCONT)
        for n in range(1, many, 2):
            with client(tmp_path / f"s{n}"):
                (await ours[n].next()).close()
            ours[n].close()
        assert relay.backlog == 0
        # Nobody listens any more where it was closed, and their names are free.
        assert not list(tmp_path.iterdir())

    run(test)


def test_a_connector_waits_for_its_frontend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "BACKOFF_MIN_S", 0.005)
    monkeypatch.setattr(endpoint, "BACKOFF_MAX_S", 0.01)

    async def test(relay: Relay) -> None:
        ours = Connector(relay, tmp_path / "s")
        ours.open()
        waiting = asyncio.create_task(ours.next())
        while ours.problem is None:
            await asyncio.sleep(0.001)  # between two looks
        assert "no such socket" in ours.problem
        with socket.socket(socket.AF_UNIX) as qemu:
            qemu.bind(str(tmp_path / "s"))
            while "nobody listens" not in str(ours.problem):
                await asyncio.sleep(0.001)  # between two looks
            assert "do both ends connect?" in str(ours.problem)
            qemu.listen()
            (await waiting).close()
            assert ours.problem is None
            # For ever: it comes again after each end.
            for _ in range(3):
                (await ours.next()).close()
        (tmp_path / "s").unlink()

    run(test)


def test_a_frontend_that_hangs_up_at_once_is_not_run_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    async def test(relay: Relay) -> None:
        with socket.socket(socket.AF_UNIX) as qemu:
            qemu.bind(str(tmp_path / "s"))
            qemu.listen(20)
            monkeypatch.setattr(asyncio, "sleep", note)
            ours = Connector(relay, tmp_path / "s")
            ours.open()
            for _ in range(7):
                (await ours.next()).close()
        assert slept == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0]

    run(test)
