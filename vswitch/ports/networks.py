"""Networks: broadcast domains by name, and which of them each port is in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from vswitch.api import NetworkInfo, Page
from vswitch.config.keys import DEFAULT_NETWORK
from vswitch.config.settings import NetworkSettings, SwitchSettings
from vswitch.dataplane import addresses
from vswitch.dataplane.handover import HandOver
from vswitch.errors import ExistsError, NotFoundError
from vswitch.fastpath.main import network as fastpath
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.fdb import Fdb
from vswitch.fastpath.main.port import Port
from vswitch.ports import pages

NETWORKS_A_TURN = 64
"""That are gone through before it is everybody else's turn."""
_NAMED_MAX = 8
"""Ports that an error names."""


@dataclass(frozen=True, slots=True)
class Network:
    """One network: what it was told, and what workers have of it."""

    settings: NetworkSettings
    fast: fastpath.Network
    serial: int
    """Where it comes in lists; no other has or had it."""

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def fdb(self) -> Fdb:
        return self.fast.fdb


class Networks:
    """All networks of a switch. `declared` are those of its file; the default one always exists."""

    def __init__(
        self, switch: SwitchSettings, declared: Sequence[NetworkSettings], engine: Engine
    ) -> None:
        self._switch = switch
        self._engine = engine
        self._by_name: dict[str, Network] = {}
        self._next_serial = count(1)
        self._started = time.monotonic()
        own = [one for one in declared if one.name == DEFAULT_NETWORK]
        self._enter(own[0] if own else NetworkSettings(name=DEFAULT_NETWORK), engine.default)
        self._default_at = declared.index(own[0]) if own else None
        """Where the file has a table for the default one, if it has one."""
        for settings in declared:
            if settings.name != DEFAULT_NETWORK:
                self.add(settings)

    @staticmethod
    def of_default(switch: SwitchSettings, declared: Sequence[NetworkSettings]) -> tuple[int, bool]:
        """The size of the default network's FDB and whether it learns: the engine makes it."""
        for one in declared:
            if one.name == DEFAULT_NETWORK:
                return one.fdb_size or switch.fdb_size, one.learning
        return switch.fdb_size, True

    def _enter(self, settings: NetworkSettings, fast: fastpath.Network) -> Network:
        network = Network(settings, fast, next(self._next_serial))
        network.fdb.tick = self._tick
        self._by_name[settings.name] = network
        return network

    # What there is

    def __iter__(self) -> Iterator[Network]:
        """Those that are there now, whoever comes or goes meanwhile."""
        return iter(list(self._by_name.values()))

    @property
    def settings(self) -> list[NetworkSettings]:
        """What a file would have of them."""
        found = [each.settings for each in self if each.name != DEFAULT_NETWORK]
        if self._default_at is not None:
            found.insert(self._default_at, self.find(None).settings)
        return found

    def find(self, name: str | None) -> Network:
        """The network of this name; None: the default one. Raises NotFoundError."""
        try:
            return self._by_name[DEFAULT_NETWORK if name is None else name]
        except KeyError:
            raise NotFoundError(
                f'there is no network "{name}"',
                hint=f"vswitchctl network list lists them; add it: vswitchctl network add {name}",
            ) from None

    def declared(self, after: int, most: int) -> Page[NetworkSettings]:
        """What a file would have of them, from those behind number `after` on, `most` of them."""
        rows = (
            (network.serial, network.settings)
            for network in self
            if network.name != DEFAULT_NETWORK or self._default_at is not None
        )
        return pages.page(rows, after, most, lambda settings: (settings, 1))

    def page(self, after: int, most: int) -> Page[NetworkInfo]:
        """Networks from those behind number `after` on, `most` of them."""
        members = self._members()

        def one(network: Network) -> tuple[NetworkInfo, int]:
            ports = members[network.name]
            return self._info(network, ports), 1 + len(ports)

        return pages.page(((each.serial, each) for each in self), after, most, one)

    def info(self, network: Network) -> NetworkInfo:
        return self._info(network, self._members()[network.name])

    def _info(self, network: Network, members: list[str]) -> NetworkInfo:
        return NetworkInfo(
            name=network.name,
            learning=network.settings.learning,
            mac_aging_s=self._aging_s(network),
            fdb_size=network.fdb.size,
            macs=len(network.fdb),
            ports=members,
        )

    def _members(self) -> dict[str, list[str]]:
        """The names of the ports in each network."""
        found: dict[str, list[str]] = {name: [] for name in self._by_name}
        for port in self._engine.ports.values():
            if port.network is not None and not port.removed:
                found[port.network.name].append(port.name)
        return found

    def _aging_s(self, network: Network) -> int:
        told = network.settings.mac_aging_s
        return self._switch.mac_aging_s if told is None else told

    # Networks come and go

    def add(self, settings: NetworkSettings) -> Network:
        """Raises ExistsError if the name is in use."""
        if settings.name in self._by_name:
            raise ExistsError(
                f'there is a network "{settings.name}" already', hint="choose another name"
            )
        size = settings.fdb_size or self._switch.fdb_size
        return self._enter(
            settings, self._engine.add_network(settings.name, size, settings.learning)
        )

    def remove(self, name: str) -> None:
        """Raises NotFoundError, and ExistsError if it is the default one or ports are in it."""
        self.find(name)
        if name == DEFAULT_NETWORK:
            raise ExistsError(
                f'the network "{name}" always exists', hint="ports that name no other are in it"
            )
        if members := self._members()[name]:
            names = ", ".join(members[:_NAMED_MAX])
            more = f" and {len(members) - _NAMED_MAX} more" if len(members) > _NAMED_MAX else ""
            raise ExistsError(
                f'ports are in the network "{name}": {names}{more}',
                hint="delete them, or have them leave: vswitchctl set-port NAME --network OTHER",
            )
        del self._by_name[name]

    # Ports come and go

    async def move(self, port: Port, network: Network, handover: HandOver) -> None:
        """Have a port leave its network, with all its addresses, and be in another one."""
        if port.network is network.fast:
            return
        await withdraw(handover, port)
        port.join(network.fast)
        await show(handover, port)

    # Once a second

    @property
    def _tick(self) -> int:
        # From 1: 0 in an entry's stamp would look like one that was never set.
        return 1 + int(time.monotonic() - self._started)

    def clock(self) -> None:
        """Set the clock of each FDB."""
        tick = self._tick
        for network in self._by_name.values():
            network.fdb.tick = tick

    def age(self, gone: Callable[[int, int], None]) -> Iterator[None]:
        """A round through the FDBs; `gone` gets the key and port number of what is forgotten."""
        for number, network in enumerate(self, 1):
            if aging_s := self._aging_s(network):
                yield from addresses.age(network.fdb, aging_s, gone)
            if number % NETWORKS_A_TURN == 0:
                yield

    def grow(self, handover: HandOver) -> None:
        """Give larger tables to FDBs whose workers asked for one, should the event be lost."""
        for network in self._by_name.values():
            if network.fdb.must_grow:
                grow(network.fdb, handover)


def grow(fdb: Fdb, handover: HandOver) -> None:
    """Have workers look into a larger table, if it is time to."""
    handover.retire(fdb.grow())


async def withdraw(handover: HandOver, *ports: Port) -> None:
    """Have no worker see ports, and forget their addresses. Whoever calls this shows them again."""
    for port in ports:
        port.paused = True
    await handover.settle()
    for port in ports:
        await addresses.flush_port(port, statics=True)


async def show(handover: HandOver, *ports: Port) -> None:
    """Have workers see ports again, in the place that they were given meanwhile."""
    for port in ports:
        port.paused = False
    await handover.settle()
