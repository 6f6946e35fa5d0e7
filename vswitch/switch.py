"""The switch: ports, uplinks, workers and the FDB put together.

Everything here runs on the event loop's thread. What workers may see changes only through
`dataplane.handover`. Ports are of kinds that nobody here tells apart (`ports/kinds.py`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self, cast

from vswitch.api import (
    PAGE_MAX,
    Changes,
    Event,
    FdbEntry,
    LinkInfo,
    NetworkInfo,
    Page,
    PortInfo,
    PortStats,
    QueueInfo,
    Unsaved,
    WorkerInfo,
)
from vswitch.config.settings import (
    AnySettings,
    LinkSettings,
    NetworkSettings,
    PortSettings,
    Settings,
    SwitchSettings,
    UplinkSettings,
)
from vswitch.dataplane.events import WorkerEvent, WorkerEvents
from vswitch.dataplane.handover import HandOver
from vswitch.dataplane.placement import Placement
from vswitch.dataplane.threads import WorkerThreads
from vswitch.dataplane.ticker import Ticker
from vswitch.fastpath.main.engine import Engine
from vswitch.ports import every_kind as every_kind
from vswitch.ports import rounds
from vswitch.ports.cables import Cables
from vswitch.ports.events import Events
from vswitch.ports.fault_process import unavailable
from vswitch.ports.fdb_entries import FdbEntries
from vswitch.ports.journals import Journals
from vswitch.ports.kinds import Parts, SwitchPort, kind_of
from vswitch.ports.networks import Networks
from vswitch.ports.table import PORT_WEIGHT, PortTable
from vswitch.ports.topology import Topology
from vswitch.relay.process import Relay

log = logging.getLogger("vswitch.switch")

_SERIAL_BITS = 32
"""Of where a page goes on within tables of one kind."""


class Switch:
    """A running switch. Implements `vswitch.api.SwitchApi`; make one with `create`."""

    def __init__(self, settings: Settings, relay: Relay, journals: Path | None) -> None:
        switch = settings.switch
        idle_ns = {"adaptive": switch.idle_us * 1000, "sleep": 0, "busy": None}[switch.polling]
        self._switch_settings = switch
        fdb_size, learning = Networks.of_default(switch, settings.networks)
        self._engine = Engine(
            workers=switch.workers, fdb_size=fdb_size, idle_ns=idle_ns, learning=learning
        )
        self._networks = Networks(switch, settings.networks, self._engine)
        self._handover = HandOver(self._engine)
        self._say_how_to_notify()
        if (reason := unavailable()) is not None:
            log.warning("postcopy migration is not offered: %s", reason)
        self._placement = Placement(self._engine)
        self._threads = WorkerThreads(self._engine, switch.cpus)
        self._ports = PortTable(switch.control)
        self._cables = Cables(settings.links, self._ports.fast)
        self._events = Events(self._engine, self._ports)
        self._worker_events = WorkerEvents(self._engine, self._hear, self._check_memory)
        self._parts = Parts(
            engine=self._engine,
            handover=self._handover,
            networks=self._networks,
            cables=self._cables,
            placement=self._placement,
            relay=relay,
            journals=None if journals is None else Journals(journals),
            notify=self._events.emit,
        )
        self._topology = Topology(
            self._engine, self._handover, self._networks, self._cables, self._ports, self._events
        )
        self._fdb_entries = FdbEntries(self._networks, self._ports, self._topology.grow)
        self._ticker = Ticker(
            self._networks.clock,
            lambda: self._networks.age(self._events.aged),
            lambda: self._networks.grow(self._handover),
            self._handover.collect,
            self._look,
        )
        self._lock = asyncio.Lock()

    @classmethod
    async def create(cls, settings: Settings, relay: Relay, journals: Path | None = None) -> Self:
        """Start workers, open all ports and uplinks. Raises VswitchError, and then nothing is left.

        The sockets of ports are `relay`'s, which stays the caller's. `journals` is a directory for
        what lets guests with packed rings survive a restart.
        Must be called on the loop that the switch is to live on.
        """
        switch = cls(settings, relay, journals)
        try:
            switch._threads.start()
            switch._worker_events.open()
            switch._ticker.start()
            for port in settings.ports:
                await switch.add_port(port)
            for uplink in settings.uplinks:
                await switch.add_uplink(uplink)
        except BaseException:
            await switch.close()
            raise
        return switch

    async def close(self) -> None:
        """Disconnect everybody, remove the sockets and TAPs, end the workers.

        Raises VswitchError if a worker does not end, and then nothing is freed.
        """
        self._ticker.stop()
        # The workers first: while ports go one by one, frames for those that are gone would be
        # flooded to those that are left.
        self._threads.stop()
        for port in self._ports:
            await self._remove(port)
        self._handover.collect()
        self._worker_events.close()

    @property
    def failed(self) -> asyncio.Future[None]:
        """Gets an exception when a worker ends although nobody told it to."""
        return self._threads.failed

    def stuck_workers(self) -> list[int]:
        """Workers that have made no progress since the last call."""
        return self._threads.stuck()

    @property
    def name(self) -> str:
        return self._switch_settings.name

    @property
    def switch_settings(self) -> SwitchSettings:
        return self._switch_settings

    @property
    def settings(self) -> Settings:
        tables: dict[str, list[Any]] = {"ports": [], "uplinks": []}
        for port in self._ports:
            tables[port.settings.table].append(port.settings)
        # Without validation: each of them has been, and that their paths differ has as well.
        return Settings.model_construct(
            switch=self._switch_settings,
            networks=self._networks.settings,
            ports=tables["ports"],
            uplinks=tables["uplinks"],
            links=self._cables.settings,
        )

    def unsaved(self) -> Unsaved:
        return Unsaved(
            links_down=[port.name for port in self._ports if port.fast.link_down],
        )

    def tables(
        self, after: int = 0, most: int = PAGE_MAX
    ) -> Page[AnySettings | NetworkSettings | LinkSettings]:
        sources: tuple[Callable[[int, int], Page[Any]], ...] = (
            self._networks.declared,
            lambda at, most: self._ports.page(at, most, lambda port: (port.settings, PORT_WEIGHT)),
            self._cables.declared,
        )
        number, at = after >> _SERIAL_BITS, after & (1 << _SERIAL_BITS) - 1
        if number >= len(sources):
            return Page([], None)
        items, following = sources[number](at, most)
        if following is not None:
            return Page(items, number << _SERIAL_BITS | following)
        return Page(items, number + 1 << _SERIAL_BITS if number + 1 < len(sources) else None)

    @property
    def n_ports(self) -> tuple[int, int]:
        counted = Counter(port.settings.table for port in self._ports)
        return counted["ports"], counted["uplinks"]

    # Ports and uplinks

    async def add_port(self, settings: PortSettings) -> PortInfo:
        async with self._lock:
            port = await self._add(settings)
            self._events.emit(port.name, "port-added")
            return port.info()

    async def del_port(self, name: str) -> None:
        async with self._lock:
            await self._delete(self._ports.guest(name))
            log.info("port %s: removed", name)
            self._events.emit(name, "port-removed")

    async def add_uplink(self, settings: UplinkSettings) -> PortInfo:
        async with self._lock:
            port = await self._add(settings)
            self._events.emit(port.name, "uplink-added")
            return port.info()

    async def del_uplink(self, name: str) -> None:
        async with self._lock:
            await self._delete(self._ports.uplink(name))
            log.info("uplink %s: removed", name)
            self._events.emit(name, "uplink-removed")

    async def _add(self, settings: AnySettings) -> SwitchPort:
        self._ports.check_free(settings)
        port = kind_of(settings).make(settings, self._parts)
        self._ports.enter(port)
        try:
            self._fdb_entries.pin_all(port)
            await port.open()
        except BaseException:
            self._ports.remove(port)  # nobody is to see it while it goes
            await self._remove(port)
            raise
        return port

    async def _delete(self, port: SwitchPort) -> None:
        self._cables.check_free(port.name, "it cannot be deleted")
        await self._remove(port)
        port.forget()

    async def _remove(self, port: SwitchPort) -> None:
        await port.close()
        await self._parts.leave(port.fast)
        self._ports.remove(port)
        port.free()

    def ports(self, after: int = 0, most: int = PAGE_MAX) -> Page[PortInfo]:
        def one(port: SwitchPort) -> tuple[PortInfo, int]:
            info = port.info()
            return info, PORT_WEIGHT + len(info["rings"]) + len(info["memory"])

        return self._ports.page(after, most, one)

    def port(self, name: str) -> PortInfo:
        return self._ports.find(name).info()

    def stats(
        self, name: str | None = None, after: int = 0, most: int = PAGE_MAX
    ) -> Page[PortStats]:
        def one(port: SwitchPort) -> tuple[PortStats, int]:
            counters = self._engine.stats(port.fast)
            stats = cast(PortStats, {"name": port.name, "id": port.fast.id, **counters})
            return stats, PORT_WEIGHT + len(self._engine.workers)

        if name is not None:
            return Page([one(self._ports.find(name))[0]], None)
        return self._ports.page(after, most, one)

    async def set_link(self, name: str, up: bool) -> PortInfo:
        port = self._ports.find(name)
        if await port.set_link(up):
            link: Literal["up", "down"] = "up" if up else "down"
            log.info("port %s: link set %s", name, link)
            self._events.send(Event(event="port-link", time=time.time(), port=name, link=link))
        return port.info()

    async def set_port(self, name: str, changes: Changes) -> PortInfo:
        if "network" in changes:
            async with self._lock:
                network = cast("str | None", changes["network"])
                await self._topology.move(self._ports.find(name), network)
        port = self._ports.find(name)
        port.change({key: value for key, value in changes.items() if key != "network"})
        log.info(
            "port %s: %s", name, ", ".join(f"{k} = {v or 'default'}" for k, v in changes.items())
        )
        return port.info()

    def _check_memory(self) -> None:
        for port in self._ports:
            port.check_memory()

    def _look(self) -> Iterator[None]:
        return rounds.look(self._ports, self._placement)

    def _hear(self, event: WorkerEvent) -> None:
        if event.kind == "fdb-grows":
            port = self._ports.by_id(event.port)
            if port is not None and port.fast.network is not None:
                self._topology.grow(port.fast.network.fdb)
        else:
            self._events.hear(event)

    # Networks and cables

    async def add_network(self, settings: NetworkSettings) -> NetworkInfo:
        return self._topology.add_network(settings)

    async def del_network(self, name: str) -> None:
        async with self._lock:
            self._topology.del_network(name)

    def networks(self, after: int = 0, most: int = PAGE_MAX) -> Page[NetworkInfo]:
        return self._networks.page(after, most)

    def network(self, name: str) -> NetworkInfo:
        return self._networks.info(self._networks.find(name))

    async def add_link(self, settings: LinkSettings) -> LinkInfo:
        async with self._lock:
            return await self._topology.add_link(settings)

    async def del_link(self, name: str) -> None:
        async with self._lock:
            await self._topology.del_link(name)

    def links(self, after: int = 0, most: int = PAGE_MAX) -> Page[LinkInfo]:
        return self._cables.page(after, most)

    # Workers

    def workers(self, after: int = 0, most: int = PAGE_MAX) -> Page[WorkerInfo]:
        def one(port: SwitchPort) -> tuple[list[tuple[int, QueueInfo]], int]:
            return self._placement.queues(port.fast), PORT_WEIGHT + len(port.fast.rings)

        ports = self._ports.page(after, most, one)
        queues: dict[int, list[QueueInfo]] = {}
        for of_port in ports.items:
            for worker, queue in of_port:
                queues.setdefault(worker, []).append(queue)
        return Page(self._threads.info(queues), ports.next)

    async def worker_pin(self, port: str, worker: int | None) -> int:
        target = self._ports.guest(port)
        self._placement.check_worker(worker)
        target.change({"worker": worker})
        self._placement.pin(port, worker)
        return 0 if worker is None else await self.worker_rebalance()

    async def worker_rebalance(self) -> int:
        async with self._lock:
            moves = [(ring, to) for ring, to in self._placement.plan() if ring.begin_move()]
            if not moves:
                return 0
            # Between the two nobody polls them: a ring has one worker at a time.
            await self._handover.settle()
            moved = sum(self._engine.finish_move(ring, to) for ring, to in moves)
            await self._handover.settle()
            log.info("moved %d queues between workers", moved)
            return moved

    def _say_how_to_notify(self) -> None:
        error = self._engine.aio_error
        if not error:
            log.info("notifications: by AIO, no frontend can hold them up")
            return
        log.warning(
            "notifications: by write(2), for the kernel gives no AIO context (%s): a malicious "
            "frontend may hold up the switch. Allow io_setup and io_submit in the sandbox, or "
            "raise fs.aio-max-nr",
            os.strerror(error),
        )

    # FDB

    def fdb(
        self, network: str | None = None, after: int = 0, most: int = PAGE_MAX
    ) -> Page[FdbEntry]:
        return self._fdb_entries.page(network, after, most)

    def fdb_add(self, mac: str, port: str, vlan: int = 0) -> None:
        self._fdb_entries.add(mac, port, vlan)

    def fdb_del(self, mac: str, vlan: int = 0, network: str | None = None) -> None:
        self._fdb_entries.delete(mac, vlan, network)

    async def fdb_flush(self, port: str | None = None, network: str | None = None) -> int:
        return await self._fdb_entries.flush(port, network)

    # Events

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        return self._events.subscribe(callback)
