"""What is wrong with one guest's port, in words for who looks at it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from vswitch.ports.ring import GuestRing

log = logging.getLogger("vswitch.port")

Notify = Callable[[str, str | None], None]
"""Called with an event's name and, for faults and disconnects, the reason."""


class PortHealth:
    """The state of its present frontend's doings, and why the last one went."""

    def __init__(self, port: str, notify: Notify) -> None:
        self._port = port
        self._notify = notify
        self.fault: str | None = None
        """Why the port does not forward, or not all: until what was wrong starts again."""
        self.warning: str | None = None
        """What its user should know although it forwards."""
        self.last_error: str | None = None
        """What ended the last connection, if that was the frontend's doing."""

    def connected(self) -> None:
        """A frontend came: what was wrong was wrong with others."""
        self.fault = self.last_error = self.warning = None

    def disconnected(self) -> None:
        self.warning = None

    def fail(self, reason: str) -> None:
        """Say in the log, to subscribers and in `show` why the port is at fault."""
        self.fault = reason
        log.error("port %s: fault: %s", self._port, reason)
        self._notify("port-fault", reason)

    def warn(self, text: str) -> None:
        self.warning = text
        log.warning("port %s: %s", self._port, text)

    def forgive(self, rings: Iterable[GuestRing]) -> None:
        """A ring runs again: what is wrong now is what is wrong with others."""
        rings = list(rings)
        if not any(ring.fault for ring in rings):
            self.fault = next((ring.astray for ring in rings if ring.astray), None)
