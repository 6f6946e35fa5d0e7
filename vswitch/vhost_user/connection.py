"""One vhost-user connection: whole messages with their file descriptors, in order.

The socket is non-blocking and served from the event loop. Every descriptor received has an owner
from the moment it exists: the message, until somebody takes it out, then the taker.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Self

from vswitch.errors import ProtocolError
from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import HEADER_LEN, MAX_FDS, Header

MESSAGE_PATIENCE_S = 5.0
"""How long a frontend may take for the rest of a message it began, or to take in a reply."""

_FD_LEN = array.array("i").itemsize
# Room for twice what is legal: too many descriptors are then counted and named, not cut off.
_ANCILLARY_LEN = socket.CMSG_SPACE(2 * MAX_FDS * _FD_LEN)
_UCRED = struct.Struct("=iII")


class ConnectionClosedError(Exception):
    """The frontend closed the connection between two messages."""


class Message:
    """A request as received. Use it as a context manager: it closes the descriptors not taken."""

    __slots__ = ("fds", "header", "payload")

    def __init__(self, header: Header, payload: bytes, fds: list[int]) -> None:
        self.header = header
        self.payload = payload
        self.fds = fds

    def take_fd(self) -> int:
        """The first descriptor; it is the caller's to close from now on."""
        return self.fds.pop(0)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class Connection:
    """A connected, non-blocking Unix stream socket that speaks vhost-user."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self.peer_pid = peer_pid(sock)

    async def receive(self) -> Message:
        """The next message.

        Raises ConnectionClosedError at the end of the stream, ProtocolError for an end in the
        middle of a message, for one that takes longer than MESSAGE_PATIENCE_S and for more than
        MAX_FDS descriptors, MalformedError for a header that cannot be.
        """
        fds: list[int] = []
        try:
            first = await self._read(1, fds)
            if not first:
                raise ConnectionClosedError
            try:
                async with asyncio.timeout(MESSAGE_PATIENCE_S):
                    raw = first + await self._read_exactly(HEADER_LEN - 1, fds, "header")
                    header = protocol.decode_header(raw)
                    name = protocol.request_name(header.request)
                    payload = await self._read_exactly(header.size, fds, name)
            except TimeoutError:
                raise ProtocolError(
                    "the frontend began a message and did not finish it in "
                    f"{MESSAGE_PATIENCE_S:g} s"
                ) from None
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return Message(header, payload, fds)

    async def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """Send a reply, with descriptors that stay the caller's.

        Raises ProtocolError when the frontend does not read it.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            async with asyncio.timeout(MESSAGE_PATIENCE_S):
                while data:
                    try:
                        data = data[self._sock.sendmsg([data], rights) :]
                        rights = []
                    except (BlockingIOError, InterruptedError):
                        await self._wait(self._loop.add_writer, self._loop.remove_writer)
        except TimeoutError:
            raise ProtocolError(
                f"the frontend did not read its replies for {MESSAGE_PATIENCE_S:g} s"
            ) from None

    def ended(self) -> bool:
        """Whether the frontend has closed its end and nothing is left to read."""
        try:
            return self._sock.recv(1, socket.MSG_PEEK) == b""
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True

    def close(self) -> None:
        self._sock.close()

    async def _read_exactly(self, length: int, fds: list[int], what: str) -> bytes:
        data = b""
        while len(data) < length:
            more = await self._read(length - len(data), fds)
            if not more:
                raise ProtocolError(
                    f"the frontend closed the connection in the middle of a message ({what})"
                )
            data += more
        return data

    async def _read(self, length: int, fds: list[int]) -> bytes:
        """Up to `length` bytes, b"" at the end; appends descriptors that came along to `fds`."""
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    length, _ANCILLARY_LEN, socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                await self._wait(self._loop.add_reader, self._loop.remove_reader)
                continue
            except ConnectionError:
                return b""
            for level, kind, raw in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    came = array.array("i")
                    came.frombytes(raw[: len(raw) - len(raw) % _FD_LEN])
                    fds.extend(came)
            if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
                raise ProtocolError(f"more than {MAX_FDS} file descriptors came with one message")
            return data

    async def _wait(
        self, add: Callable[[int, Callable[[], None]], object], remove: Callable[[int], object]
    ) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        fd = self._sock.fileno()
        add(fd, wake)
        try:
            await ready
        finally:
            remove(fd)


def peer_pid(sock: socket.socket) -> int | None:
    """The process that connected or listens, as the kernel knows it (SO_PEERCRED)."""
    with contextlib.suppress(OSError):
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid = int(_UCRED.unpack(raw)[0])
        return pid or None
    return None
