"""A small QMP client: QEMU's machine protocol, JSON lines over a Unix socket."""

from __future__ import annotations

import json
import select
import socket
from typing import Any

from vswitch.lab.errors import MachineError
from vswitch.lab.qemu.process import Deadline


class Qmp:
    """One QMP connection. Not thread safe; reads only while somebody waits for something."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""
        self._negotiated = False
        self.events: list[dict[str, Any]] = []
        """Every event so far, oldest first, as QEMU sent it."""

    def command(self, name: str, timeout_s: float = 10.0, **arguments: Any) -> Any:
        """Run one command and return its `return` value; MachineError on error or timeout."""
        deadline = Deadline(timeout_s)
        if not self._negotiated:
            while "QMP" not in self._message(deadline, "the QMP greeting"):
                pass
            self._negotiated = True
            self._execute("qmp_capabilities", {}, deadline)
        return self._execute(name, arguments, deadline)

    def wait_event(self, name: str, after: int = 0, timeout_s: float = 10.0) -> dict[str, Any]:
        """The first event called `name` at or after index `after` of `events`."""
        deadline = Deadline(timeout_s)
        while True:
            for event in self.events[after:]:
                if event["event"] == name:
                    return event
            after = len(self.events)
            while len(self.events) == after:
                self._collect(self._message(deadline, f"the event {name}"))

    def close(self) -> None:
        self._socket.close()

    def _execute(self, name: str, arguments: dict[str, Any], deadline: Deadline) -> Any:
        request = {"execute": name} | ({"arguments": arguments} if arguments else {})
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise MachineError(f"QMP command {name}: QEMU is gone ({error})") from None
        while True:
            message = self._message(deadline, f"the answer to {name}")
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise MachineError(f"QMP command {name} failed: {message['error'].get('desc')}")
            self._collect(message)

    def _collect(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self.events.append(message)

    def _message(self, deadline: Deadline, awaited: str) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            if not select.select([self._socket], [], [], deadline.left())[0]:
                raise MachineError(f"QEMU did not send {awaited} within {deadline.timeout_s:g} s")
            try:
                data = self._socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                raise MachineError(f"QEMU went away before it sent {awaited}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
