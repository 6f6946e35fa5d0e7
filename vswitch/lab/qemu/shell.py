"""The shell inside a guest, driven over its second serial port (protocol: see init.sh)."""

from __future__ import annotations

import base64
import secrets
import select
import socket
import threading
from typing import NamedTuple

from vswitch.lab.errors import MachineError
from vswitch.lab.qemu.process import Deadline

MAX_SCRIPT_LEN = 32 * 1024
"""Bytes of a script, before encoding: the guest reads it byte by byte."""

_ANSWER_GRACE_S = 15.0
"""The guest ends a command after its time limit; this long after that, the guest itself hangs."""


class CommandResult(NamedTuple):
    """How a command in a guest ended. 137 (128 + SIGKILL) is a command that ran out of time."""

    exit_code: int
    output: str


class GuestShell:
    """The host's end of the serial line. Commands from several threads wait for each other."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""
        self._lock = threading.Lock()
        self.boot_id: str | None = None
        """What the guest said in its last `ready` line; changes with every boot."""

    def wait_ready(self, other_than: str | None, deadline: Deadline) -> str:
        """Wait until a boot other than `other_than` is ready; returns its boot id."""
        with self._lock:
            while self.boot_id is None or self.boot_id == other_than:
                self._line(deadline, "its ready line")
            return self.boot_id

    def run(self, script: str, timeout_s: float) -> CommandResult:
        """Run a shell script in the guest, for at most `timeout_s` seconds."""
        encoded = base64.b64encode(script.encode())
        if len(script) > MAX_SCRIPT_LEN:
            raise ValueError(f"script of {len(script)} characters, {MAX_SCRIPT_LEN} at most")
        token = secrets.token_hex(4)
        deadline = Deadline(timeout_s + _ANSWER_GRACE_S)
        with self._lock:
            self._send(b"%s %d %s\n" % (token.encode(), max(1, round(timeout_s)), encoded))
            while True:
                words = self._line(deadline, f"the answer to {script!r}").split()
                if len(words) == 4 and words[:2] == ["done", token]:
                    output = self._take(int(words[3]), deadline)
                    return CommandResult(int(words[2]), output.decode(errors="replace"))

    def close(self) -> None:
        self._socket.close()

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise MachineError(f"the guest's serial line is gone ({error})") from None

    def _line(self, deadline: Deadline, awaited: str) -> str:
        while b"\n" not in self._buffer:
            self._receive(deadline, awaited)
        line, _, self._buffer = self._buffer.partition(b"\n")
        text = line.decode(errors="replace")
        if text.startswith("ready "):
            self.boot_id = text.removeprefix("ready ").strip()
        return text

    def _take(self, size: int, deadline: Deadline) -> bytes:
        while len(self._buffer) < size:
            self._receive(deadline, f"{size} bytes of output")
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def _receive(self, deadline: Deadline, awaited: str) -> None:
        if not select.select([self._socket], [], [], deadline.left())[0]:
            raise MachineError(f"the guest did not send {awaited} in {deadline.timeout_s:g} s")
        try:
            data = self._socket.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            raise MachineError(f"QEMU ended before the guest sent {awaited}")
        self._buffer += data
