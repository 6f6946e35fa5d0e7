"""The other direction: requests of the backend to its frontend ("Back-end communication")."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable

from vswitch.relay.wire import Kind
from vswitch.vhost_user import protocol
from vswitch.vhost_user.descriptors import found_of
from vswitch.vhost_user.protocol import (
    FLAG_NEED_REPLY,
    HEADER_LEN,
    BackendRequest,
    MalformedError,
)

_REPLY_LEN = HEADER_LEN + 8


Answered = Callable[[int], None]

# Whatever may become of its flags.
_NO_WAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class BackendChannel:
    """The socket of SET_BACKEND_REQ_FD. Sending never waits, however slow the frontend is.

    With `acknowledged` (REPLY_ACK) each request asks for a reply and the next goes only after it,
    as in-band notifications demand. What cannot be sent yet is kept, once: a notification that
    waits already says all that a second one would.
    """

    def __init__(self, name: str, sock: socket.socket, *, acknowledged: bool) -> None:
        self._name = name
        self._sock = sock
        self._acknowledged = acknowledged
        self._loop = asyncio.get_running_loop()
        self._log = logging.getLogger("vswitch.vhost_user")
        self._waiting: dict[tuple[BackendRequest, bytes], Answered | None] = {}
        self._rest = b""
        self._awaited: BackendRequest | None = None
        self._answered: Answered | None = None
        self._received = b""
        self._refused: set[BackendRequest] = set()
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def is_open(self) -> bool:
        return self._sock.fileno() >= 0

    def post(
        self, request: BackendRequest, payload: bytes = b"", answered: Answered | None = None
    ) -> None:
        """Send a request as soon as possible; `answered` gets the status of an acknowledgement."""
        if self.is_open:
            self._waiting[request, payload] = answered
            self._flush()

    def close(self) -> None:
        if self.is_open:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
        self._waiting.clear()

    def _flush(self) -> None:
        while self._rest or (self._waiting and self._awaited is None):
            if not self._rest:
                request, payload = next(iter(self._waiting))
                answered = self._waiting.pop((request, payload))
                flags = FLAG_NEED_REPLY if self._acknowledged else 0
                self._rest = protocol.encode(request, payload, flags=flags)
                if self._acknowledged:
                    self._awaited, self._answered = request, answered
            try:
                self._rest = self._rest[self._sock.send(self._rest, _NO_WAIT) :]
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            except OSError as exc:
                self._end(f"the frontend is gone ({exc.strerror})")
                return
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        try:
            data = self._sock.recv(4096, _NO_WAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._end("closed by the frontend")
            return
        self._received += data
        while len(self._received) >= _REPLY_LEN and self.is_open:
            reply, self._received = self._received[:_REPLY_LEN], self._received[_REPLY_LEN:]
            self._handle(reply)
        if self.is_open:
            self._flush()

    def _handle(self, reply: bytes) -> None:
        request, self._awaited = self._awaited, None
        answered, self._answered = self._answered, None
        try:
            header = protocol.decode_header(reply[:HEADER_LEN])
        except MalformedError as exc:
            self._end(str(exc))
            return
        if request is None or header.request != request or not header.is_reply or header.size != 8:
            self._end(
                f"request {header.request} with flags {header.flags:#x} and size {header.size} "
                "is not the reply awaited"
            )
            return
        value = protocol.decode_u64(reply[HEADER_LEN:])
        if answered is not None:
            answered(value)
        elif value and request not in self._refused:
            self._refused.add(request)
            self._log.warning(
                "port %s: the frontend refused BACKEND_%s (%d)", self._name, request.name, value
            )

    def _end(self, why: str) -> None:
        self._log.debug("port %s: channel for backend requests: %s", self._name, why)
        self.close()


def take_socket(name: str, fd: int) -> socket.socket:
    """A non-blocking socket from a descriptor, which stays the caller's.

    Raises MalformedError unless it is a Unix stream socket. It is not the frontend's own but one
    that the relay connects with that: nothing but bytes comes from it.
    """
    found = found_of(fd)
    if found is None or found.kind is not Kind.SOCKET:
        what = "of an unknown kind" if found is None else found.text
        raise MalformedError(f"{name}: the file descriptor is no Unix stream socket but {what}")
    sock = socket.socket(fileno=os.dup(fd))
    sock.setblocking(False)
    return sock
