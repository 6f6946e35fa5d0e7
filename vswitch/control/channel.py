"""The client's side of a control connection: a request, its answer, and events in between."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vswitch.control.protocol import (
    ControlError,
    Decoder,
    Notification,
    Response,
    default_socket_paths,
    error_from_map,
    is_own,
    pack_request,
    temporary_directory,
)
from vswitch.errors import ProtocolError

if TYPE_CHECKING:
    from vswitch.api import Event

_EVENTS_HELD_MAX = 65536
_CHUNK_LEN = 1 << 16
_T = TypeVar("_T")


class Channel:
    """A connection to a control socket, for use by one thread at a time."""

    def __init__(self, paths: list[Path], timeout: float | None) -> None:
        """Connect to the first of `paths` where somebody listens, which becomes `path`.

        `timeout` is in seconds for connecting and for each answer; None waits for ever.
        """
        self.path = paths[0]
        self.timeout = timeout
        self.events_lost = 0
        self._events: deque[Event] = deque()
        self._msgid = 0
        self._decoder = Decoder(trusted=True)
        self._responses: deque[Response] = deque()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._connect(paths)
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, paths: list[Path]) -> None:
        """A socket that a crashed switch left behind hides no other."""
        failed = None
        for path in paths:
            try:
                self._socket.connect(str(path))
            except OSError as exc:
                absent = isinstance(exc, FileNotFoundError | ConnectionRefusedError)
                if failed is None or not absent:
                    failed, self.path = exc, path
                if not absent:
                    break
            else:
                self.path = path
                return
        assert failed is not None
        from vswitch.host.unixsocket import connect_error  # for those who fail

        error = connect_error(self.path, failed, "control")
        others = [str(path) for path in paths if path != self.path]
        if others and isinstance(failed, FileNotFoundError | ConnectionRefusedError):
            error.message += f", nor at {' or '.join(others)}"
        raise ControlError(error.message, hint=error.hint, code="unreachable") from failed

    def close(self) -> None:
        """Close the connection; may be called twice."""
        self._socket.close()

    def next_event(self, timeout: float | None) -> Event:
        """The next event, waited for; TimeoutError after so many seconds (None: never)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._receive_until(lambda: bool(self._events), deadline)
        return self._events.popleft()

    def call(self, method: str, params: dict[str, Any]) -> Any:
        """One request, by its name on the wire, and its result."""
        self._msgid = (self._msgid + 1) % 2**32
        msgid = self._msgid
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        # An earlier call that ran into its timeout may have left its answer.
        self._responses.clear()
        try:
            self._socket.settimeout(self.timeout)
            self._socket.sendall(pack_request(msgid, method, params))
        except TimeoutError as exc:
            self.close()  # with half a request sent, no other can follow
            raise self._timeout_error(method) from exc
        except OSError as exc:
            # The switch may have said why before it closed the connection.
            self._take_last_words()
            raise self._disconnected_error() from exc
        try:
            response = self._receive_until(lambda: self._answer(msgid), deadline)
        except TimeoutError as exc:
            raise self._timeout_error(method) from exc
        if response.error is not None:
            raise error_from_map(response.error)
        return response.result

    def _answer(self, msgid: int) -> Response | None:
        while self._responses:
            response = self._responses.popleft()
            if response.msgid == msgid or response.msgid is None:
                return response
        return None

    def _receive_until(self, ready: Callable[[], _T | None], deadline: float | None) -> _T:
        """Read until `ready` gives something true; TimeoutError at `deadline` (monotonic)."""
        while not (value := ready()):
            if deadline is None:
                self._socket.settimeout(None)
            else:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._socket.settimeout(left)
            try:
                data = self._socket.recv(_CHUNK_LEN)
            except TimeoutError:
                raise
            except OSError as exc:
                raise self._disconnected_error() from exc
            if not data:
                raise self._disconnected_error()
            self._take(data)
        return value

    def _take(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                if isinstance(message, Response):
                    self._responses.append(message)
                elif isinstance(message, Notification):
                    self._notified(message)
        except ProtocolError as exc:
            self.close()
            raise ControlError(
                f"{self.path} does not answer as a control socket: {exc.message}",
                hint="is it the socket of a port, or of another program?",
                code="unreachable",
            ) from exc

    def _notified(self, message: Notification) -> None:
        if message.method == "event":
            if len(self._events) >= _EVENTS_HELD_MAX:
                self._events.popleft()
                self.events_lost += 1
            self._events.append(cast("Event", message.params))
        elif message.method == "lost":
            self.events_lost += int(message.params.get("count", 0))

    def _take_last_words(self) -> None:
        try:
            self._socket.settimeout(1.0)
            while data := self._socket.recv(_CHUNK_LEN):
                self._take(data)
        except OSError:
            pass
        for response in self._responses:
            if response.msgid is None and response.error is not None:
                raise error_from_map(response.error)

    def until_disconnected(self) -> None:
        """Wait until the switch, which was asked to stop, has closed the connection."""
        try:
            deadline = None if self.timeout is None else time.monotonic() + self.timeout
            self._receive_until(lambda: None, deadline)
        except TimeoutError as exc:
            raise ControlError(
                f"the switch on {self.path} agreed to stop and still runs after {self.timeout:g} s",
                hint="look at its log; kill it if it hangs",
                code="timeout",
            ) from exc
        except ControlError as exc:
            if exc.code != "disconnected":
                raise

    def _timeout_error(self, method: str) -> ControlError:
        return ControlError(
            f"no answer to {method} from {self.path} within {self.timeout:g} s",
            hint="is the switch stopped or overloaded? Or is this the socket of another program?",
            code="timeout",
        )

    def _disconnected_error(self) -> ControlError:
        return ControlError(
            f"the switch on {self.path} closed the connection",
            hint="it was stopped, or it is another program's socket; look at the switch's log",
            code="disconnected",
        )


def usual_paths() -> list[Path]:
    """Where a switch may be that is meant without naming its socket, best first."""
    uid = os.geteuid()
    paths = default_socket_paths(uid)
    temporary = temporary_directory(uid)
    return [path for path in paths if path.parent != temporary or is_own(temporary, uid)]
