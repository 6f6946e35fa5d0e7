"""Where frontends come from: a socket the switch listens on, or one it connects to for ever.

Either is the relay's; what is here says what it is to do, and has the file of the socket.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from vswitch.bounds import SUN_PATH_LEN_MAX
from vswitch.errors import SocketError
from vswitch.host import unixsocket
from vswitch.host.unixsocket import FileId
from vswitch.relay.link import Link, Peer
from vswitch.relay.process import Relay
from vswitch.vhost_user.connection import Connection

BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0
STABLE_S = 2.0
"""A connection that lasted this long was a good one: the next attempt comes soon again."""


class Endpoint(Protocol):
    """A source of connections, one at a time."""

    waiting_state: Literal["listening", "connecting"]

    @property
    def problem(self) -> str | None:
        """Why no frontend comes, as far as is known."""
        ...

    def open(self) -> None:
        """Start. Raises SocketError."""
        ...

    async def next(self) -> Link:
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

    def __init__(
        self, relay: Relay, path: Path, *, mode: int | None, owner: str | None, group: str | None
    ) -> None:
        self._relay = relay
        self._path = path
        self._rights: tuple[int | None, str | None, str | None] = (mode, owner, group)
        self._number: int | None = None
        self._file_id: FileId | None = None
        self._file_problem: str | None = None
        self._crowded = 0
        self._came: deque[Link] = deque()
        self._more = asyncio.Event()

    @property
    def problem(self) -> str | None:
        if self._crowded:
            return (
                f"{self._crowded} connections of frontends cannot be closed, for file descriptors "
                "that these sent hold up the relay: nobody else is let in before one of them ends"
            )
        return self._file_problem

    def open(self) -> None:
        mode, owner, group = self._rights
        sock = unixsocket.listen(self._path, mode=mode, owner=owner, group=group)
        self._file_id = sock.file_id
        try:
            self._number = self._relay.listen(sock, self)
        except SocketError:
            unixsocket.unlink_if_ours(self._path, self._file_id)
            raise

    async def next(self) -> Link:
        while not self._came:
            self._more.clear()
            await self._more.wait()
        return self._came.popleft()

    async def guard(self, connection: Connection, refused: Callable[[int | None], None]) -> None:
        while True:
            link = await self.next()
            try:
                gone = await connection.link.peer_is_gone()
            except BaseException:
                self._came.appendleft(link)
                raise
            if gone is not False:
                # The frontend has been restarted, and its successor is quicker than our clean-up.
                self._came.appendleft(link)
                if gone is None:
                    connection.link.cut(
                        "another frontend is there, and the relay waits for this one"
                    )
                return
            refused(link.peer.pid or None)
            link.close()
            await asyncio.sleep(0)  # others have their turn in a storm of connections

    def check(self) -> None:
        """Notice a socket file that somebody removed or put another in place of.

        QEMU with server=on does the latter: it unlinks whatever is there and listens itself. A file
        that is gone is made anew.
        """
        if self._file_id is None:
            return
        try:
            status = self._path.lstat()
        except FileNotFoundError:
            old = self._number
            try:
                self.open()
            except SocketError as exc:
                self._file_problem = str(exc)
                return
            if old is not None:
                self._relay.forget(old)
            self._file_problem = None
            return
        except OSError as exc:
            self._file_problem = f"{self._path}: {exc.strerror}"
            return
        if (status.st_dev, status.st_ino) == self._file_id:
            self._file_problem = None
        else:
            self._file_problem = (
                f"another process replaced {self._path} and listens there itself: "
                "both ends listen. Start QEMU without server=on, or give the port mode client"
            )

    def close(self) -> None:
        if self._file_id is not None:
            unixsocket.unlink_if_ours(self._path, self._file_id)
            self._file_id = None
        if self._number is not None:
            self._relay.forget(self._number)
            self._number = None
        while self._came:
            self._came.popleft().close()

    # What the relay says

    def connected(self, sock: socket.socket, peer: Peer, number: int) -> None:
        self._came.append(self._relay.link(sock, peer, number))
        self._more.set()

    def failed(self, error: int) -> None:
        """Nobody is connected to."""

    def crowded(self, stuck: int) -> None:
        self._crowded = stuck


class Connector:
    """Client mode: the frontend listens and the switch connects, again and again."""

    waiting_state: Literal["listening", "connecting"] = "connecting"

    def __init__(self, relay: Relay, path: Path) -> None:
        self.problem: str | None = None
        self._relay = relay
        self._path = path
        self._backoff_s = 0.0
        self._connected_at = 0.0
        self._number: int | None = None
        self._answer: asyncio.Future[Link | int] | None = None

    def open(self) -> None:
        self._number = self._relay.register(self)

    async def next(self) -> Link:
        if time.monotonic() - self._connected_at > STABLE_S:
            self._backoff_s = 0.0
        while True:
            await asyncio.sleep(self._backoff_s)
            self._backoff_s = min(max(2 * self._backoff_s, BACKOFF_MIN_S), BACKOFF_MAX_S)
            self._answer = asyncio.get_running_loop().create_future()
            try:
                if len(os.fsencode(self._path)) > SUN_PATH_LEN_MAX:
                    self._answer.set_result(errno.ENAMETOOLONG)
                elif self._number is not None:
                    self._relay.connect(self._number, self._path)
                answer = await self._answer
            finally:
                self._answer = None
            if isinstance(answer, Link):
                self.problem = None
                self._connected_at = time.monotonic()
                return answer
            if answer == errno.EBUSY:
                self.problem = (
                    f"earlier connections to {self._path} cannot be closed, for file descriptors "
                    "that their frontends sent hold up the relay"
                )
                continue
            error = OSError(answer, os.strerror(answer))
            self.problem = str(unixsocket.connect_error(self._path, error))

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
        if self._number is not None:
            self._relay.forget(self._number)
            self._number = None

    # What the relay says

    def connected(self, sock: socket.socket, peer: Peer, number: int) -> None:
        link = self._relay.link(sock, peer, number)
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(link)
        else:
            link.close()

    def failed(self, error: int) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(error)

    def crowded(self, stuck: int) -> None:
        """`failed` says so."""
