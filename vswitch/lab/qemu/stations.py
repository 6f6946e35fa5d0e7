"""Who takes part in the demo's pings: QEMU guests, software guests, and this host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.qemu import host
from vswitch.lab.qemu.command_line import GuestSettings
from vswitch.lab.qemu.guest import Guest
from vswitch.lab.qemu.image import GuestImage

Progress = Callable[[str], None]

PING_TIMEOUT_S = 5.0


class Station(Protocol):
    """Somebody on the wire who can ping."""

    @property
    def name(self) -> str: ...

    @property
    def ip(self) -> str: ...

    def ping_ms(self, address: str) -> float | None:
        """Round trip in milliseconds, None if `address` did not answer."""
        ...


@dataclass(frozen=True, slots=True)
class Plug:
    """A port of the switch and who shall be plugged into it; `ip` is without prefix length."""

    port: str
    socket: Path
    mode: Literal["server", "client"]
    mac: str
    ip: str


@dataclass(frozen=True, slots=True)
class QemuStation:
    guest: Guest

    @property
    def name(self) -> str:
        return self.guest.name

    @property
    def ip(self) -> str:
        return self.guest.ip

    def ping_ms(self, address: str) -> float | None:
        return self.guest.ping_ms(address, count=3, timeout_s=PING_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class SoftwareStation:
    guest: SoftwareGuest
    name: str
    ip: str

    def ping_ms(self, address: str) -> float | None:
        # The first one resolves the address; the second is measured.
        if not self.guest.ping(address, timeout=PING_TIMEOUT_S):
            return None
        start = time.perf_counter()
        if not self.guest.ping(address, timeout=PING_TIMEOUT_S):
            return None
        return (time.perf_counter() - start) * 1000


@dataclass(frozen=True, slots=True)
class HostStation:
    ip: str
    name: str = "host"

    def ping_ms(self, address: str) -> float | None:
        # The first one resolves the address; the second is measured.
        if host.ping_ms(address, PING_TIMEOUT_S) is None:
            return None
        return host.ping_ms(address, PING_TIMEOUT_S)


@contextmanager
def qemu_stations(
    plugs: list[Plug], image: GuestImage, directory: Path, progress: Progress
) -> Iterator[list[Station]]:
    """Boot a QEMU guest for every plug, all at once; stops them at the end of the block."""
    with ExitStack() as stack:
        guests = []
        for plug in plugs:
            settings = GuestSettings(
                name=plug.port,
                socket=plug.socket,
                listen=plug.mode == "client",
                mac=plug.mac,
                ip=f"{plug.ip}/24",
            )
            guests.append(stack.enter_context(Guest(settings, image, directory)))
        for guest in guests:
            progress(f"waiting for {guest.name} to boot")
            guest.wait_up()
        yield [QemuStation(guest) for guest in guests]


@contextmanager
def software_stations(plugs: list[Plug]) -> Iterator[list[Station]]:
    """A software guest for every plug; closed at the end of the block."""
    with ExitStack() as stack:
        stations: list[Station] = []
        for plug in plugs:
            guest = stack.enter_context(SoftwareGuest(plug.mac, plug.ip))
            if plug.mode == "server":
                guest.connect(plug.socket)
            else:
                guest.listen(plug.socket)
                guest.accept()
            guest.start_responder()
            stations.append(SoftwareStation(guest, plug.port, plug.ip))
        yield stations
