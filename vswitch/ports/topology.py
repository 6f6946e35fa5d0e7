"""Networks and cables while the switch runs: what can be done to them, and to the ports in them."""

from __future__ import annotations

import logging
import time

from vswitch.api import Event, EventName, LinkInfo, NetworkInfo
from vswitch.config.settings import LinkSettings, NetworkSettings
from vswitch.dataplane.handover import HandOver
from vswitch.errors import ExistsError
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.fdb import Fdb
from vswitch.ports.cables import Cables
from vswitch.ports.events import Events
from vswitch.ports.kinds import SwitchPort
from vswitch.ports.networks import Networks, grow, show, withdraw
from vswitch.ports.table import PortTable

log = logging.getLogger("vswitch.switch")


class Topology:
    """Changes where frames go. One at a time: whoever calls a coroutine of it sees to that."""

    def __init__(
        self,
        engine: Engine,
        handover: HandOver,
        networks: Networks,
        cables: Cables,
        ports: PortTable,
        events: Events,
    ) -> None:
        self._engine = engine
        self._handover = handover
        self._networks = networks
        self._cables = cables
        self._ports = ports
        self._events = events

    def grow(self, fdb: Fdb) -> None:
        """Have workers look into a larger table, if it is time to."""
        grow(fdb, self._handover)
        self._handover.publish()

    def add_network(self, settings: NetworkSettings) -> NetworkInfo:
        network = self._networks.add(settings)
        log.info("network %s: added", network.name)
        self._tell("network-added", network=network.name)
        return self._networks.info(network)

    def del_network(self, name: str) -> None:
        self._networks.remove(name)
        log.info("network %s: removed", name)
        self._tell("network-removed", network=name)

    async def move(self, port: SwitchPort, network: str | None) -> None:
        """Have a port be in a network from now on. Raises NotFoundError, ExistsError."""
        found = self._networks.find(network)
        self._cables.check_free(port.name, "it can be in no network")
        if port.fast.network is not found.fast:
            await self._networks.move(port.fast, found, self._handover)
            port.change({"network": network, "static_macs": []})
        else:
            port.change({"network": network})

    async def add_link(self, settings: LinkSettings) -> LinkInfo:
        ends = [self._ports.find(name) for name in settings.ports]
        for end in ends:
            if end.settings.network is not None:
                raise ExistsError(
                    f'"{end.name}" is in network "{end.settings.network}": a cable is in none',
                    hint=f'have it leave: vswitchctl set-port {end.name} --network ""',
                )
        self._cables.add(settings)
        for end in ends:
            end.change({"static_macs": []})
        await withdraw(self._handover, *(end.fast for end in ends))
        self._cables.plug(ends[0].fast)
        await show(self._handover, *(end.fast for end in ends))
        log.info("link %s: between %s and %s", settings.title, *settings.ports)
        self._tell("link-added", cable=settings.title)
        return LinkInfo(name=settings.title, ports=settings.ports)

    async def del_link(self, name: str) -> None:
        link = self._cables.remove(name)
        ends = [self._ports.find(end) for end in link.ports]
        await withdraw(self._handover, *(end.fast for end in ends))
        for end in ends:
            end.fast.join(self._engine.default)
            end.change({"network": None})  # its limits are those of a network again
        await show(self._handover, *(end.fast for end in ends))
        log.info("link %s: removed", name)
        self._tell("link-removed", cable=name)

    def _tell(self, event: EventName, **what: str) -> None:
        record = Event(event=event, time=time.time(), port=None)
        record.update(what)  # type: ignore[typeddict-item]  # `network` or `cable`
        self._events.send(record)
