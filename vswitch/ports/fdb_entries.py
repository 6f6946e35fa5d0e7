"""The FDB in words: MAC addresses as people write them, and ports by name."""

from __future__ import annotations

from vswitch.api import FdbEntry, Page
from vswitch.dataplane import addresses
from vswitch.errors import ConfigError, ExistsError, NotFoundError, VswitchError
from vswitch.fastpath.main.fdb import Fdb, key_mac, mac_key
from vswitch.ports.table import PortTable


class FdbEntries:
    """What clients ask of the FDB, as `vswitch.api.SwitchApi` has it."""

    def __init__(self, fdb: Fdb, ports: PortTable) -> None:
        self._fdb = fdb
        self._ports = ports

    def page(self, after: int, most: int) -> Page[FdbEntry]:
        entries, following = self._fdb.page(after, most)
        found = []
        for key, number, static, age in entries:
            port = self._ports.by_id(number)
            if port is None:
                continue  # it is just being removed
            mac, vlan = key_mac(key)
            found.append(FdbEntry(mac=mac, vlan=vlan, port=port.name, static=static, age_s=age))
        return Page(found, following)

    def add(self, mac: str, port: str, vlan: int) -> None:
        key = _key(mac, vlan)
        target = self._ports.find(port)
        number, static = self._fdb.find(key) or (-1, False)
        owner = self._ports.by_id(number) if static else None
        if owner is not None and owner is not target:
            raise ExistsError(
                f"{mac} (VLAN {vlan}) is a static entry of port {owner.name}",
                hint="delete it first: vswitchctl fdb del "
                + (mac if not vlan else f"{mac} --vlan {vlan}"),
            )
        if not self._fdb.add_static(key, target.fast.id):
            raise VswitchError(
                f"no room for {mac} in the FDB ({self._fdb.size} addresses)",
                hint="flush it, or set a greater fdb_size in [switch]",
            )

    def delete(self, mac: str, vlan: int) -> None:
        if not self._fdb.delete(_key(mac, vlan)):
            raise NotFoundError(
                f"{mac} (VLAN {vlan}) is not in the FDB", hint="vswitchctl fdb show lists it"
            )

    async def flush(self, port: str | None) -> int:
        number = None if port is None else self._ports.find(port).fast.id
        return await addresses.flush(self._fdb, number)


def _key(mac: str, vlan: int) -> int:
    try:
        return mac_key(mac, vlan)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
