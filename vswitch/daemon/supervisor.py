"""What the service manager hears of this process: ready, alive, stopping (sd_notify(3)).

The manager names a datagram socket in NOTIFY_SOCKET, and in WATCHDOG_USEC how long it waits for a
sign of life before it ends the process. Without these variables nothing is said to anybody.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

_log = logging.getLogger(__name__)

READY_PATIENCE_S = 5.0
"""How long a full socket may hold up what must be heard; signs of life are repeated anyhow."""


class Supervisor:
    """Sends datagrams to the service manager, or to nobody."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID."""
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = None if self._address is None else _watchdog_s(environ)
        """Seconds without `alive` after which the manager ends the process; None if it waits."""

    @property
    def listens(self) -> bool:
        """Whether there is anybody to tell."""
        return self._address is not None

    def ready(self, status: str) -> None:
        """All sockets are open. `status` is a line for people, as in `status`."""
        self._send(f"READY=1\nSTATUS={status}", READY_PATIENCE_S)

    def status(self, text: str) -> None:
        """What `systemctl status` is to show, one line."""
        self._send(f"STATUS={text}")

    def alive(self) -> None:
        """All is well; due more often than every `watchdog_s`."""
        if self.watchdog_s is not None:
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The end has begun."""
        self._send("STOPPING=1\nSTATUS=stopping", READY_PATIENCE_S)

    def _send(self, text: str, patience_s: float = 0.0) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(patience_s)
                sock.sendto(text.encode(), self._address)
        except OSError as exc:
            _log.warning("the service manager did not hear %r: %s", text.split("\n")[0], exc)


def _address(value: str) -> bytes | None:
    """A path, or with `@` in front a name in the abstract namespace."""
    if not value:
        return None
    if value[0] == "/" and len(value) > 1:
        return os.fsencode(value)
    if value[0] == "@" and len(value) > 1:
        return b"\0" + os.fsencode(value[1:])
    _log.warning("NOTIFY_SOCKET=%s is no Unix socket: nobody is told how the switch is", value)
    return None


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # meant for another process
    value = environ.get("WATCHDOG_USEC", "")
    if not value:
        return None
    if not value.isdecimal() or int(value) == 0:
        _log.warning("WATCHDOG_USEC=%s is no number of microseconds: no watchdog", value)
        return None
    return int(value) / 1e6
