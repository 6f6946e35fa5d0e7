"""The frontend's end of the channel on which a backend makes requests (SET_BACKEND_REQ_FD)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import NamedTuple

from vswitch.lab.guest.errors import BackendRefusedError
from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import FLAG_REPLY, HEADER_LEN, BackendRequest


class Requested(NamedTuple):
    """One request of the backend's."""

    request: BackendRequest
    payload: bytes


class BackendRequests:
    """Takes requests without waiting, and answers those that want a reply."""

    def __init__(self) -> None:
        self.socket, self.theirs = socket.socketpair()
        self.socket.setblocking(False)
        self.answer = 0
        """What every request is answered with; 0 is success."""
        self._data = b""

    def take(self, handle: Callable[[Requested], int] | None = None) -> list[Requested]:
        """The requests that have come since the last look. BackendRefusedError for nonsense.

        `handle` does what is asked before it is answered, and says with what.
        """
        found: list[Requested] = []
        try:
            self._data += self.socket.recv(1 << 16)
        except BlockingIOError:
            return found
        while len(self._data) >= HEADER_LEN:
            try:
                header = protocol.decode_header(self._data[:HEADER_LEN])
                request = BackendRequest(header.request)
            except ValueError as error:
                raise BackendRefusedError(f"malformed request of the backend: {error}") from error
            end = HEADER_LEN + header.size
            if len(self._data) < end:
                break
            found.append(Requested(request, self._data[HEADER_LEN:end]))
            self._data = self._data[end:]
            answer = self.answer if handle is None else handle(found[-1])
            if header.need_reply:
                reply = protocol.encode_u64(answer)
                self.socket.send(protocol.encode(request, reply, flags=FLAG_REPLY))
        return found

    def close(self) -> None:
        self.socket.close()
        self.theirs.close()
