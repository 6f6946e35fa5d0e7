"""The topologies in config/, each started as it is and wired with software guests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.frames import BROADCAST, frame, mac
from tests.support.running import Wire, silent
from vswitch.config.read import load
from vswitch.config.settings import Settings
from vswitch.lab.guest import SoftwareGuest

CONFIG = Path(__file__).parents[2] / "config"
LACP = "01:80:c2:00:00:02"


def lab(start: Callable[..., Wire], name: str) -> tuple[Wire, Settings, dict[str, SoftwareGuest]]:
    """A switch with such a file, its sockets in a directory of ours, and a guest on each port."""
    file = CONFIG / f"{name}.toml"
    settings = load(file)
    # Relative paths are of the directory that the file is in.
    wire = start(tables=file.read_text().replace("/run/vswitch/", ""))
    guests = {}
    for n, port in enumerate(settings.ports, 1):
        guests[port.name] = wire.enter(SoftwareGuest(mac(n), None))
        guests[port.name].connect(wire.switch.run_dir / port.socket.name)
    return wire, settings, guests


def hears(guests: dict[str, SoftwareGuest], sender: str, sent: bytes) -> set[str]:
    """Who gets a frame."""
    guests[sender].send([sent])
    guests[sender].drain()
    found = {name for name, guest in guests.items() if guest.poll_frames(2) == [sent]}
    assert silent(*guests.values())
    return found


@pytest.mark.parametrize("name", ["lag", "leaf-spine", "hub"])
def test_who_hears_whom(start: Callable[..., Wire], name: str) -> None:
    wire, settings, guests = lab(start, name)
    peers = dict(itertools.chain.from_iterable(
        (link.ports, link.ports[::-1]) for link in settings.links
    ))  # fmt: skip
    networks = {port.name: port.network for port in settings.ports}
    for tag, (port, guest) in enumerate(guests.items()):
        own = ":".join(f"{byte:02x}" for byte in guest.mac)
        for dst in (BROADCAST, LACP, mac(200)):
            expected = (
                {peers[port]}
                if port in peers
                else {other for other in guests if networks[other] == networks[port]} - {port}
            )
            assert hears(guests, port, frame(dst, own, tag=tag)) == expected
        assert wire.drops(port) == {}
    for link in settings.links:
        assert wire.info(link.ports[0])["peer"] == link.ports[1]
