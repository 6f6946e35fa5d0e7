"""How many entries a guest's rings have, as its own driver says."""

from __future__ import annotations

import re

from vswitch.lab.qemu.guest import Guest


def ring_sizes(guest: Guest) -> list[int]:
    """Entries of a receiveq and of a transmitq.

    Not what QEMU was told: its 10.0.13 gives every ring behind a vhost-user socket 1024 entries.
    """
    said = guest.check("ethtool -g eth0").partition("Current hardware settings:")[2]
    return [int(re.findall(rf"^{kind}:\s+(\d+)", said, re.MULTILINE)[0]) for kind in ("RX", "TX")]


def obeys(guest: Guest) -> bool:
    """Whether the guest's QEMU is one of those that give rings the sizes that they are told."""
    return guest.qemu_version < (10, 0)
