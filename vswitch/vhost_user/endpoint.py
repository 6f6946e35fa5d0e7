"""Where frontends come from: a socket the switch listens on, or one it connects to for ever."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from vswitch import unixsocket
from vswitch.errors import SocketError
from vswitch.vhost_user.connection import Connection, peer_pid

BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0
STABLE_S = 2.0
"""A connection that lasted this long was a good one: the next attempt comes soon again."""


class Endpoint(Protocol):
    """A source of connections, one at a time."""

    waiting_state: Literal["listening", "connecting"]
    problem: str | None
    """Why no frontend comes, as far as is known."""

    def open(self) -> None:
        """Start. Raises SocketError."""
        ...

    async def next(self) -> socket.socket:
        """The next connection."""
        ...

    async def guard(self, connection: Connection, refused: Callable[[int | None], None]) -> None:
        """Turn others away while `connection` is served; `refused` gets their process id."""
        ...

    def check(self) -> None:
        """Look, once in a while, whether the socket is still what it was; updates `problem`."""
        ...

    def close(self) -> None: ...


class Listener:
    """Server mode: the switch listens and frontends connect."""

    waiting_state: Literal["listening", "connecting"] = "listening"

    def __init__(self, path: Path, *, mode: int | None, owner: str | None, group: str | None):
        self.problem: str | None = None
        self._path = path
        self._rights: tuple[int | None, str | None, str | None] = (mode, owner, group)
        self._sock: unixsocket.ListeningSocket | None = None
        self._waiting: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None

    def open(self) -> None:
        mode, owner, group = self._rights
        self._sock = unixsocket.listen(self._path, mode=mode, owner=owner, group=group)

    async def next(self) -> socket.socket:
        if self._waiting is not None:
            sock, self._waiting = self._waiting, None
            return sock
        return await self._accept()

    async def guard(self, connection: Connection, refused: Callable[[int | None], None]) -> None:
        while True:
            sock = await self._accept()
            if connection.ended():
                # The frontend has been restarted, and its successor is quicker than our clean-up.
                self._waiting = sock
                return
            refused(peer_pid(sock))
            sock.close()
            await asyncio.sleep(0)  # others have their turn in a storm of connections

    def check(self) -> None:
        """Notice a socket file that somebody removed or put another in place of.

        QEMU with server=on does the latter: it unlinks whatever is there and listens itself. A file
        that is gone is made anew.
        """
        if self._sock is None:
            return
        try:
            status = self._path.lstat()
        except FileNotFoundError:
            old = self._sock
            try:
                self.open()
            except SocketError as exc:
                self.problem = str(exc)
                return
            _forget_watchers(old)
            old.close()
            self.problem = None
            if self._ready is not None:
                _resolve(self._ready)
            return
        except OSError as exc:
            self.problem = f"{self._path}: {exc.strerror}"
            return
        if (status.st_dev, status.st_ino) == self._sock.file_id:
            self.problem = None
        else:
            self.problem = (
                f"another process replaced {self._path} and listens there itself: "
                "both ends listen. Start QEMU without server=on, or give the port mode client"
            )

    def close(self) -> None:
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None
        if self._sock is not None:
            unixsocket.unlink_if_ours(self._path, self._sock)
            _forget_watchers(self._sock)
            self._sock.close()
            self._sock = None

    async def _accept(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        while True:
            listening = self._sock
            if listening is None:
                raise asyncio.CancelledError
            try:
                sock, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                pass
            except OSError:
                # Out of descriptors or memory: the connection stays queued until there are some.
                await asyncio.sleep(BACKOFF_MAX_S)
                continue
            else:
                sock.setblocking(False)
                return sock
            ready = self._ready = loop.create_future()
            fd = listening.fileno()
            loop.add_reader(fd, _resolve, ready)
            try:
                await ready
            finally:
                # A guard that was cancelled gets here after `next` has begun to wait.
                if self._ready is ready and listening.fileno() == fd:
                    loop.remove_reader(fd)


class Connector:
    """Client mode: the frontend listens and the switch connects, again and again."""

    waiting_state: Literal["listening", "connecting"] = "connecting"

    def __init__(self, path: Path) -> None:
        self.problem: str | None = None
        self._path = path
        self._backoff_s = 0.0
        self._connected_at = 0.0

    def open(self) -> None:
        """Nothing to do before `next`."""

    async def next(self) -> socket.socket:
        if time.monotonic() - self._connected_at > STABLE_S:
            self._backoff_s = 0.0
        while True:
            await asyncio.sleep(self._backoff_s)
            self._backoff_s = min(max(2 * self._backoff_s, BACKOFF_MIN_S), BACKOFF_MAX_S)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                sock.connect(os.fspath(self._path))
            except OSError as exc:
                sock.close()
                self.problem = str(unixsocket.connect_error(self._path, exc))
            else:
                self.problem = None
                self._connected_at = time.monotonic()
                return sock

    async def guard(
        self,
        connection: Connection,  # noqa: ARG002
        refused: Callable[[int | None], None],  # noqa: ARG002
    ) -> None:
        """Nobody else can come."""
        await asyncio.get_running_loop().create_future()

    def check(self) -> None:
        """Every attempt to connect is a check."""

    def close(self) -> None:
        """Nothing is held between attempts."""


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _forget_watchers(sock: socket.socket) -> None:
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop().remove_reader(sock.fileno())
