"""The FDB in words: MAC addresses as people write them, and ports by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vswitch.api import FdbEntry, Page
from vswitch.config.checks import static_mac, written_mac
from vswitch.dataplane import addresses
from vswitch.errors import ConfigError, ExistsError, NotFoundError, VswitchError
from vswitch.fastpath.main.fdb import SLOTS_A_TURN, Fdb, key_mac, mac_key
from vswitch.ports.kinds import SwitchPort
from vswitch.ports.networks import NETWORKS_A_TURN, Networks
from vswitch.ports.table import PortTable

_PLACE_BITS = 32
"""Of a place in an FDB, as Fdb.page has it."""


class FdbEntries:
    """What clients ask of the FDB, as `vswitch.api.SwitchApi` has it."""

    def __init__(self, networks: Networks, ports: PortTable, grow: Callable[[Fdb], None]) -> None:
        self._networks = networks
        self._grow = grow
        self._ports = ports

    def page(self, network: str | None, after: int, most: int) -> Page[FdbEntry]:
        """Of small networks a page has several, and no more places of them than of a large one."""
        serial, start = after >> _PLACE_BITS, after & (1 << _PLACE_BITS) - 1
        some = self._networks if network is None else [self._networks.find(network)]
        found: list[FdbEntry] = []
        looked = 0
        for here in some:
            if here.serial < serial:
                continue
            if len(found) == most or looked >= SLOTS_A_TURN:
                return Page(found, here.serial << _PLACE_BITS)
            first = start if here.serial == serial else 0
            entries, following = here.fdb.page(first, most - len(found))
            found += filter(None, (self._entry(here.name, *entry) for entry in entries))
            if following is not None:
                return Page(found, here.serial << _PLACE_BITS | following)
            looked += here.fdb.slots
        return Page(found, None)

    def _entry(
        self, network: str, key: int, number: int, static: bool, age: int
    ) -> FdbEntry | None:
        """An entry in words; None if its port is just being removed."""
        port = self._ports.by_id(number)
        if port is None:
            return None
        mac, vlan = key_mac(key)
        return FdbEntry(
            mac=mac, vlan=vlan, network=network, port=port.name, static=static, age_s=age
        )

    def add(self, mac: str, port: str, vlan: int) -> None:
        target = self._ports.find(port)
        self._pin(target, mac, vlan)
        told = [*target.settings.static_macs]
        if (text := written_mac(mac, vlan)) not in told:
            target.change({"static_macs": [*told, text]})

    def pin_all(self, port: SwitchPort) -> None:
        """Add what a port's settings say. Raises as `add` does, and then some may be there."""
        for text in port.settings.static_macs:
            self._pin(port, *static_mac(text))

    def _pin(self, target: SwitchPort, mac: str, vlan: int) -> None:
        key = _key(mac, vlan)
        network = target.fast.network
        if network is None:
            raise ExistsError(
                f'"{target.name}" is the end of a cable, which has no addresses',
                hint="vswitchctl link list has its other end",
            )
        fdb = network.fdb
        number, static = fdb.find(key) or (-1, False)
        owner = self._ports.by_id(number) if static else None
        if owner is not None and owner is not target:
            raise ExistsError(
                f"{mac} (VLAN {vlan}) is a static entry of port {owner.name}",
                hint="delete it first: vswitchctl fdb del "
                + (mac if not vlan else f"{mac} --vlan {vlan}"),
            )
        added = fdb.add_static(key, target.fast.id)
        if fdb.must_grow:
            self._grow(fdb)
            added = added or fdb.add_static(key, target.fast.id)
        if not added:
            raise VswitchError(
                f"no room for {mac} in the FDB of network {network.name} ({fdb.size} addresses)",
                hint="flush it, or set a greater fdb_size for the network",
            )

    def delete(self, mac: str, vlan: int, network: str | None) -> None:
        key = _key(mac, vlan)
        some = self._networks if network is None else [self._networks.find(network)]
        having = [one for one in some if one.fdb.find(key) is not None]
        if not having:
            raise NotFoundError(
                f"{mac} (VLAN {vlan}) is not in the FDB"
                + ("" if network is None else f" of network {network}"),
                hint="vswitchctl fdb show lists it",
            )
        if len(having) > 1:
            names = ", ".join(one.name for one in having)
            raise ExistsError(
                f"{mac} (VLAN {vlan}) is in several networks: {names}", hint="name one: --network"
            )
        number, static = having[0].fdb.find(key) or (-1, False)
        having[0].fdb.delete(key)
        port = self._ports.by_id(number)
        if static and port is not None:
            text = written_mac(*key_mac(key))
            left = [one for one in port.settings.static_macs if one != text]
            port.change({"static_macs": left})

    async def flush(self, port: str | None, network: str | None) -> int:
        """Of a port, of a network, or all; of a port in another network there is nothing."""
        some = [self._networks.find(network)] if network is not None else list(self._networks)
        if port is None:
            removed = 0
            for number, one in enumerate(some, 1):
                removed += await addresses.flush(one.fdb, None)
                if number % NETWORKS_A_TURN == 0:
                    await asyncio.sleep(0)
            return removed
        fast = self._ports.find(port).fast
        if fast.network not in [one.fast for one in some]:
            return 0
        return await addresses.flush_port(fast)


def _key(mac: str, vlan: int) -> int:
    try:
        return mac_key(mac, vlan)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
