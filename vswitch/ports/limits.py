"""What one port may take of what all ports share: FDB entries and flooded frames."""

from __future__ import annotations

from vswitch.api import Changes
from vswitch.config.keys import LIMIT_KEYS, RUNTIME_KEYS
from vswitch.config.settings import AnySettings
from vswitch.fastpath.main.fdb import Fdb
from vswitch.fastpath.main.port import Port
from vswitch.fastpath.shared.words import STORM_KINDS
from vswitch.ports.kinds import kind_of

_MACS_MIN = 8
"""What a port may learn in the smallest of tables."""


def max_macs(settings: AnySettings, fdb: Fdb) -> int:
    """The most addresses learned from a port: as configured, or a part of the FDB."""
    wanted = settings.max_macs or max(_MACS_MIN, fdb.size // kind_of(settings).fdb_share)
    return min(wanted, fdb.size)


def macs(settings: AnySettings, port: Port) -> tuple[int, int]:
    """How many addresses were learned from a port, and the most: none at the end of a cable."""
    if port.network is None:
        return 0, 0
    fdb = port.network.fdb
    return fdb.learned(port.id), max_macs(settings, fdb)


def apply(settings: AnySettings, port: Port) -> None:
    """Have workers keep to the limits of a port, in the network that it is in, from now on."""
    if port.network is not None:
        port.network.fdb.limit(port.id, max_macs(settings, port.network.fdb))
    port.mac_limit_told = False
    rates = [getattr(settings, f"storm_{kind}") for kind in STORM_KINDS]
    port.set_storm(rates, settings.storm_burst)


def changed(settings: AnySettings, port: Port, changes: Changes) -> None:
    """The same if one of them has changed; what a bucket has left stays when none has."""
    if not changes.keys().isdisjoint(RUNTIME_KEYS):
        apply(settings, port)


def storm_info(settings: AnySettings) -> dict[str, int | None]:
    """The limits of storm control as `show` has them."""
    return {kind: getattr(settings, f"storm_{kind}") for kind in (*STORM_KINDS, "burst")}


def told(settings: AnySettings) -> dict[str, int | None]:
    """The limits that `set_port` changes, as they are at present."""
    return {name: getattr(settings, name) for name in LIMIT_KEYS}
