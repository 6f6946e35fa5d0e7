"""Why a port does not forward, as far as what its frontends did tells it.

A frontend seldom says what it misses: it goes away, or stays and does nothing.
"""

from __future__ import annotations

import logging
import re
import time

from vswitch.config.settings import PortSettings
from vswitch.ports import socket_rights
from vswitch.vhost_user.frontend import Frontend
from vswitch.vhost_user.protocol import Feature, Request

IN_VAIN = 3
"""So many frontends that looked at the offer and left, none of which ran a ring, are a pattern."""
SPACING_S = 0.5
"""Then one is served in this time. QEMU that starts tries again without a pause, hundreds of times
a second; one whose guest runs does so once a second and is not held up by this."""
AT_ONCE_S = 0.75
"""Whoever is back within this time waited for nothing, or only to be served: it is a QEMU that does
not get past its start. One whose guest runs waits for a second at least (`reconnect`)."""
NOBODY_S = 10.0
"""A socket that only its owner may connect to, and that nobody did for so long, is worth a word."""
SILENCE_S = 1.0
"""A frontend that has said nothing for so long has said what it had to."""

_HINTS = {
    Request.NET_SET_MTU.name: "give the guest a smaller MTU (QEMU: host_mtu=), or the port a "
    "larger `mtu`",
    Request.SET_MEM_TABLE.name: "look at the guest's memory backend",
    Request.ADD_MEM_REG.name: "look at the guest's memory backend",
}
_BIG_ENDIAN = (
    "a guest with virtio before 1.0 on a machine of the other byte order cannot be served "
    "(CROSS_ENDIAN): give it a modern device (QEMU: disable-legacy=on,disable-modern=off)"
)

log = logging.getLogger("vswitch.port")


class PortDiagnosis:
    """What is known of one port's frontends, the one that is there and those before."""

    def __init__(self, settings: PortSettings) -> None:
        self._settings = settings
        self._frontend: Frontend | None = None
        self._in_vain = 0
        self._since = 0.0
        self._visits = VainVisits(settings.queues)
        self._left: str | None = None
        self._logged: str | None = None
        self._opened = time.monotonic()
        self._rights: str | None = None

    def opened(self) -> None:
        """The port's socket is there, or will be."""
        self._opened = time.monotonic()
        if self._settings.mode == "server":
            self._rights = socket_rights.advice(self._settings.socket)
        if self._rights is not None:
            log.info("port %s: %s", self._settings.name, self._rights)

    @property
    def level(self) -> int:
        """What to log the coming and going of frontends as."""
        return logging.DEBUG if self.is_pattern else logging.INFO

    @property
    def is_pattern(self) -> bool:
        """Frontends come and go in vain: that was said, and need not be said of each of them."""
        return self._in_vain >= IN_VAIN

    @property
    def pause_s(self) -> float:
        """How long to let the next frontend wait, in seconds."""
        return max(0.0, self._since + SPACING_S - time.monotonic()) if self.is_pattern else 0.0

    def connected(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._rights = None
        self._since = time.monotonic()

    def rings_run(self) -> None:
        """The present frontend got as far as its rings."""
        self._in_vain = 0
        self._visits = VainVisits(self._settings.queues)
        self._left = self._logged = None

    def disconnected(self, error: str | None) -> None:
        """It went away, with this error of the protocol or without."""
        frontend, self._frontend = self._frontend, None
        if frontend is None or frontend.has_run:
            return
        self._left = self._refused(frontend)
        if self._left is None and error is None and _only_looked(frontend):
            self._in_vain += 1
            # To a port that connects itself nobody comes back sooner or later than it does that.
            pid = frontend.peer_pid if self._settings.mode == "server" else None
            self._visits.came_and_went(pid, self._since, time.monotonic())
            self._left = self._visits.why

    def _refused(self, frontend: Frontend) -> str | None:
        for name, why in frontend.refused.items():
            hint = _HINTS.get(name)
            return f"the frontend was refused {name}: {why}" + (f"; {hint}" if hint else "")
        return None

    @property
    def reason(self) -> str | None:
        """Why the port does not forward, or what is worth knowing if it does; None: nothing."""
        frontend = self._frontend
        if frontend is None:
            return self._left
        refused = self._refused(frontend)
        if refused is not None:
            return refused
        if frontend.has_run:
            return None
        if self._is_big_endian(frontend):
            return f"the frontend began to set up rings and did not go on: {_BIG_ENDIAN}"
        return self._left

    def _is_big_endian(self, frontend: Frontend) -> bool:
        """QEMU says where a ring is only after its byte order, which it cannot say here."""
        return (
            frontend.silent_s >= SILENCE_S
            and Request.SET_FEATURES in frontend.asked
            and Feature.VERSION_1 not in frontend.features
            and Request.SET_VRING_BASE in frontend.asked
            and not frontend.has_placed
        )

    def of_fault(self, size: int, text: str) -> str:
        """What a ring's fault, an index that is too large, may mean; "" if nothing."""
        frontend = self._frontend
        found = re.search(r"\d+", text)
        if frontend is None or found is None or Feature.VERSION_1 in frontend.features:
            return ""
        value = int(found[0])
        swapped = (value & 0xFF) << 8 | value >> 8
        if value > 0xFFFF or swapped > size:
            return ""
        return f". In the other byte order it would be {swapped}: {_BIG_ENDIAN}"

    @property
    def nobody_may(self) -> str | None:
        """Why nobody has ever connected, perhaps."""
        return self._rights if time.monotonic() >= self._opened + NOBODY_S else None

    def check(self) -> None:
        """Once a second: say in the log what is new. A refusal was said when it was made."""
        reason = self.reason
        if reason is None or (self._frontend is not None and self._frontend.refused):
            return
        if reason != self._logged and (self.is_pattern or self._frontend is not None):
            log.warning("port %s: %s", self._settings.name, reason)
            self._logged = reason


class VainVisits:
    """Frontends that looked at what a port offers and left, and what they want by how they did.

    What they say is the same. But one that starts is done with it: it ends, or tries again at once,
    and one whose guest's device was made earlier waits before it does.
    """

    def __init__(self, pairs: int) -> None:
        self._pairs = f"{pairs} queue {'pair' if pairs == 1 else 'pairs'}"
        self._pid: int | None = None
        self._left_at = 0.0
        self._starting = self._running = 0

    def came_and_went(self, pid: int | None, came: float, left: float) -> None:
        """Process `pid`, if that is known, was here between these monotonic seconds."""
        if pid is not None and self._pid is not None:
            if pid == self._pid and came - self._left_at >= AT_ONCE_S:
                self._running += 1
            else:
                self._starting += 1
        self._pid, self._left_at = pid, left

    @property
    def why(self) -> str:
        what = "the frontend looked at what the port offers and left"
        give_back = (
            "its guest's device was made when the port offered more (`queues`, `offloads`, "
            "`features`): give the port that back, or start the frontend anew, for which a reboot "
            "of the guest is not enough"
        )
        if self._running > self._starting:
            return f"{what}, and tries again now and then: {give_back}"
        if self._starting > self._running:
            return (
                f"{what}, and does not get past its start: it wants more than {self._pairs} (QEMU: "
                "queues=N, and says so itself): give the port as many (`queues`), or it no more"
            )
        return (
            f"{what}. If nobody ended it, it wants more than {self._pairs} (QEMU: queues=N; the "
            f"port: `queues`), or {give_back}"
        )


def _only_looked(frontend: Frontend) -> bool:
    """Whether a frontend asked what the port offers and took nothing of it."""
    asked = frontend.asked
    return Request.GET_PROTOCOL_FEATURES in asked and Request.SET_FEATURES not in asked
