"""One vhost-user connection: whole messages with their file descriptors, in order.

Its socket is the relay's (vswitch/relay), which passes on pieces of messages, and the descriptors
that are of use. Every one has an owner from the moment it exists: the message, until somebody takes
it out, then the taker.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from vswitch.errors import ProtocolError
from vswitch.relay.link import Link, LinkError
from vswitch.vhost_user import protocol
from vswitch.vhost_user.descriptors import adopt, close_fd
from vswitch.vhost_user.protocol import HEADER_LEN, MAX_FDS, Header

MESSAGE_PATIENCE_S = 5.0
"""How long a frontend may take for the rest of a message it began, or to take in a reply."""


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
            close_fd(self.fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class Connection:
    """Speaks vhost-user with whoever is at the other end of a relay's link, which it takes over."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.peer_pid = link.peer.pid or None

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
                close_fd(fd)
            raise
        return Message(header, payload, fds)

    async def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """Send a reply, with descriptors that stay the caller's.

        Raises ProtocolError when the frontend does not read it.
        """
        try:
            async with asyncio.timeout(MESSAGE_PATIENCE_S):
                await self.link.send(data, fds)
        except TimeoutError:
            raise ProtocolError(
                f"the frontend did not read its replies for {MESSAGE_PATIENCE_S:g} s"
            ) from None

    def close(self) -> None:
        self.link.close()

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
        try:
            data, found = await self.link.receive(length)
        except LinkError as exc:
            raise ProtocolError(str(exc)) from exc
        fds.extend(map(adopt, found))
        if len(fds) > MAX_FDS:
            raise ProtocolError(f"more than {MAX_FDS} file descriptors came with one message")
        return data
