"""A SwitchApi without a fast path, for tests of what stands in front of the switch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from vswitch.api import (
    PAGE_MAX,
    Changes,
    Event,
    FdbEntry,
    LinkInfo,
    NetworkInfo,
    Page,
    PortCounters,
    PortInfo,
    PortStats,
    QueueInfo,
    Unsaved,
    WorkerInfo,
)
from vswitch.config.keys import LIMIT_KEYS
from vswitch.config.settings import (
    AnySettings,
    LinkSettings,
    NetworkSettings,
    PortSettings,
    Settings,
    SwitchSettings,
    UplinkSettings,
)
from vswitch.errors import ExistsError, NotFoundError, SocketError
from vswitch.host.unixsocket import listen, unlink_if_ours


class FakeSwitch:
    """Keeps ports and FDB entries in dictionaries and opens the sockets of server ports."""

    def __init__(self, settings: Settings) -> None:
        self._switch = settings.switch
        self._ports: dict[str, PortSettings] = {}
        self._uplinks: dict[str, UplinkSettings] = {}
        self._listeners: dict[str, Any] = {}
        self._fdb: dict[tuple[str, int], FdbEntry] = {}
        self._callbacks: list[Callable[[Event], None]] = []
        self._ids: dict[str, int] = {}
        self._links: dict[str, Literal["up", "down"]] = {}
        self._networks = {"default": NetworkSettings(name="default")}
        self._cables: dict[str, LinkSettings] = {}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed = False
        self.page_max = PAGE_MAX
        self.pages = 0
        self.queues: list[QueueInfo] = [
            {"port": "vm1", "index": 1, "frames": 1007, "frames_per_s": 12, "pinned": False}
        ]
        self.may_go_on = asyncio.Event()
        """Until then, adding a port named `slow` waits. One named `blocked` blocks the loop until
        somebody has written to its socket, which is a named pipe, and closed it."""

    @classmethod
    async def create(cls, settings: Settings, *_: object, **__: object) -> FakeSwitch:
        switch = cls(settings)
        try:
            for port in settings.ports:
                await switch.add_port(port)
            for uplink in settings.uplinks:
                await switch.add_uplink(uplink)
        except BaseException:
            await switch.close()
            raise
        return switch

    @property
    def name(self) -> str:
        return self._switch.name

    @property
    def switch_settings(self) -> SwitchSettings:
        return self._switch

    def unsaved(self) -> Unsaved:
        return {
            "links_down": [name for name, link in self._links.items() if link == "down"],
        }

    def tables(
        self, after: int = 0, most: int = PAGE_MAX
    ) -> Page[AnySettings | NetworkSettings | LinkSettings]:
        named = [each for each in self._networks.values() if each.name != "default"]
        ports = [*self._ports.values(), *self._uplinks.values()]
        return self._page([*named, *ports, *self._cables.values()], after, most)

    @property
    def n_ports(self) -> tuple[int, int]:
        return len(self._ports), len(self._uplinks)

    def _page(self, items: list[Any], after: int, most: int) -> Page[Any]:
        """Counts the pages that were given."""
        self.pages += 1
        most = min(most, self.page_max)
        end = after + most
        return Page(items[after:end], end if end < len(items) else None)

    @property
    def settings(self) -> Settings:
        return Settings(
            switch=self._switch,
            networks=[each for each in self._networks.values() if each.name != "default"],
            links=list(self._cables.values()),
            ports=list(self._ports.values()),
            uplinks=list(self._uplinks.values()),
        )

    def stuck_workers(self) -> list[int]:
        """One, as long as there is a port named `stuck`."""
        return [0] if "stuck" in self._ids else []

    def emit(self, event: str, port: str | None = None, **details: Any) -> None:
        for callback in list(self._callbacks):
            callback(cast("Event", {"event": event, "time": 1.5, "port": port, **details}))

    @property
    def subscribers(self) -> int:
        return len(self._callbacks)

    async def add_port(self, settings: PortSettings) -> PortInfo:
        if settings.name in self._ids:
            raise ExistsError(f'port "{settings.name}" exists', hint="choose another name")
        if settings.name == "no-socket":
            raise SocketError("cannot listen", hint="choose another path")
        if settings.name == "slow":
            await self.may_go_on.wait()
        if settings.name == "blocked":
            pipe = Path(settings.socket)
            pipe.read_bytes()
            pipe.unlink()
        if settings.name == "bug":
            raise RuntimeError("an error nobody thought of")
        if settings.mode == "server":
            self._listeners[settings.name] = listen(
                settings.socket, mode=settings.permission_bits, owner=None, group=None
            )
        self._ids[settings.name] = len(self._ids)
        self._ports[settings.name] = settings
        self.emit("port-added", settings.name)
        return self.port(settings.name)

    async def del_port(self, name: str) -> None:
        if name not in self._ports:
            raise NotFoundError(f'no port "{name}"', hint="`vswitchctl list-ports` lists them")
        del self._ports[name], self._ids[name]
        self._links.pop(name, None)
        listener = self._listeners.pop(name, None)
        if listener is not None:
            unlink_if_ours(listener.path, listener)
            listener.close()
        self.emit("port-removed", name)

    def ports(self, after: int = 0, most: int = PAGE_MAX) -> Page[PortInfo]:
        return self._page([self.port(name) for name in self._ids], after, most)

    def port(self, name: str) -> PortInfo:
        if name not in self._ids:
            raise NotFoundError(f'no port "{name}"', hint="`vswitchctl list-ports` lists them")
        info: PortInfo = {
            "name": name,
            "id": self._ids[name],
            "kind": "tap",
            "state": "up",
            "link": self._links.get(name, "up"),
            "network": "default",
            "peer": None,
            "socket": None,
            "mode": None,
            "queues": 1,
            "mtu": None,
            "features": 0,
            "feature_names": [],
            "protocol_features": 0,
            "protocol_feature_names": [],
            "peer_pid": None,
            "connects": 0,
            "connected_since": None,
            "error": None,
            "warning": None,
            "macs": 0,
            "max_macs": 8192,
            "storm": {"broadcast": None, "multicast": None, "unknown": None, "burst": None},
            "limits": dict.fromkeys(LIMIT_KEYS),
            "memory": [],
            "rings": [],
        }
        if name in self._ports:
            port = self._ports[name]
            info.update(
                {
                    "kind": "vhost-user",
                    "state": "ready",
                    "socket": str(port.socket),
                    "mode": port.mode,
                    "queues": port.queues,
                    "mtu": port.mtu,
                    "max_macs": port.max_macs or 8192,
                    "storm": {
                        "broadcast": port.storm_broadcast,
                        "multicast": port.storm_multicast,
                        "unknown": port.storm_unknown,
                        "burst": port.storm_burst,
                    },
                    "limits": {name: getattr(port, name) for name in LIMIT_KEYS},
                    "features": 1 << 32 | 1 << 15,
                    "feature_names": ["MRG_RXBUF", "VERSION_1"],
                    "protocol_features": 1,
                    "protocol_feature_names": ["MQ"],
                    "peer_pid": 4711,
                    "connects": 2,
                    "connected_since": 1_700_000_000.0,
                    "warning": "guest [vm] memory is small",
                    "memory": [
                        {"gpa": 0, "size": 256 << 20, "uva": 0x7F0000000000, "mmap_offset": 0}
                    ],
                    "rings": [
                        {
                            "index": i,
                            "type": "transmitq" if i & 1 else "receiveq",
                            "size": 256,
                            "started": True,
                            "enabled": True,
                            "avail_idx": 300,
                            "used_idx": 44,
                            "fault": None,
                        }
                        for i in range(2 * port.queues)
                    ],
                }
            )
        return info

    async def add_uplink(self, settings: UplinkSettings) -> PortInfo:
        if settings.name in self._ids:
            raise ExistsError(f'uplink "{settings.name}" exists', hint="choose another name")
        self._ids[settings.name] = len(self._ids)
        self._uplinks[settings.name] = settings
        self.emit("uplink-added", settings.name)
        return self.port(settings.name)

    async def del_uplink(self, name: str) -> None:
        if name not in self._uplinks:
            raise NotFoundError(f'no uplink "{name}"')
        del self._uplinks[name], self._ids[name]
        self.emit("uplink-removed", name)

    def stats(
        self, name: str | None = None, after: int = 0, most: int = PAGE_MAX
    ) -> Page[PortStats]:
        names = list(self._ids) if name is None else [self.port(name)["name"]]
        none = cast("PortCounters", dict.fromkeys(PortCounters.__annotations__, 0))
        stats: list[PortStats] = [
            {
                **none,
                "name": each,
                "id": self._ids[each],
                "ingress_frames": 1000,
                "ingress_bytes": 1_500_000,
                "egress_frames": 7,
                "egress_bytes": 420,
                "drops": {"runt": 3},
                "kicks": 5,
                "calls": 6,
            }
            for each in names
        ]
        return self._page(stats, after, most)

    async def add_network(self, settings: NetworkSettings) -> NetworkInfo:
        if settings.name in self._networks:
            raise ExistsError(f'network "{settings.name}" exists', hint="choose another name")
        self._networks[settings.name] = settings
        self.emit("network-added", network=settings.name)
        return self.network(settings.name)

    async def del_network(self, name: str) -> None:
        self.network(name)
        del self._networks[name]
        self.emit("network-removed", network=name)

    def networks(self, after: int = 0, most: int = PAGE_MAX) -> Page[NetworkInfo]:
        return self._page([self.network(name) for name in self._networks], after, most)

    def network(self, name: str) -> NetworkInfo:
        if name not in self._networks:
            raise NotFoundError(f'no network "{name}"')
        return {
            "name": name,
            "learning": self._networks[name].learning,
            "mac_aging_s": self._networks[name].mac_aging_s or 0,
            "fdb_size": self._networks[name].fdb_size or 65536,
            "macs": 2,
            "ports": list(self._ids) if name == "default" else [],
        }

    async def add_link(self, settings: LinkSettings) -> LinkInfo:
        if settings.title in self._cables:
            raise ExistsError(f'link "{settings.title}" exists', hint="choose another name")
        for end in settings.ports:
            self.port(end)
        self._cables[settings.title] = settings
        self.emit("link-added", cable=settings.title)
        return {"name": settings.title, "ports": settings.ports}

    async def del_link(self, name: str) -> None:
        if name not in self._cables:
            raise NotFoundError(f'no link "{name}"')
        del self._cables[name]
        self.emit("link-removed", cable=name)

    def links(self, after: int = 0, most: int = PAGE_MAX) -> Page[LinkInfo]:
        found = [LinkInfo(name=each.title, ports=each.ports) for each in self._cables.values()]
        return self._page(found, after, most)

    def fdb(
        self, network: str | None = None, after: int = 0, most: int = PAGE_MAX
    ) -> Page[FdbEntry]:
        if network is not None:
            self.network(network)
        return self._page(list(self._fdb.values()), after, most)

    def _entry(self, mac: str, port: str, vlan: int, static: bool) -> FdbEntry:
        age_s = 0 if static else 9
        return {
            "mac": mac,
            "vlan": vlan,
            "network": "default",
            "port": port,
            "static": static,
            "age_s": age_s,
        }

    def learn(self, mac: str, port: str, vlan: int = 0) -> None:
        self._fdb[mac, vlan] = self._entry(mac, port, vlan, False)
        self.emit("mac-learned", port, mac=mac, vlan=vlan)

    def fdb_add(self, mac: str, port: str, vlan: int = 0) -> None:
        self.port(port)
        entry = self._fdb.get((mac, vlan))
        if entry is not None and entry["static"]:
            raise ExistsError(f"{mac} is a static entry already", hint="delete it first")
        self._fdb[mac, vlan] = self._entry(mac, port, vlan, True)

    def fdb_del(self, mac: str, vlan: int = 0, network: str | None = None) -> None:
        if network is not None:
            self.network(network)
        if (mac, vlan) not in self._fdb:
            raise NotFoundError(f"no entry for {mac} in VLAN {vlan}")
        del self._fdb[mac, vlan]

    async def fdb_flush(self, port: str | None = None, network: str | None = None) -> int:
        if network is not None:
            self.network(network)
        if port is not None:
            self.port(port)
        dynamic = [
            key
            for key, entry in self._fdb.items()
            if not entry["static"] and port in (None, entry["port"])
        ]
        for key in dynamic:
            del self._fdb[key]
        return len(dynamic)

    def workers(self, after: int = 0, most: int = PAGE_MAX) -> Page[WorkerInfo]:
        queues = self._page(self.queues, after, most)
        worker: WorkerInfo = {
            "id": 0,
            "cpu": None,
            "rings": 3,
            "state": "sleeping",
            "loops": 10,
            "bursts": 4,
            "frames": 1007,
            "sleeps": 2,
            "wakeups": 2,
            "notify": "aio",
            "busy_ns": 5_000_000,
            "idle_ns": 95_000_000,
            "cycles_per_frame": 130.5,
            "events_lost": 3,
            "turns": {
                "last_10_s": {"longest_ns": 21_000, "run_delay_ns": 0, "own_ns": 21_000},
                "last_minute": {
                    "longest_ns": 4_000_000,
                    "run_delay_ns": 3_950_000,
                    "own_ns": 60_000,
                },
                "since_start": {
                    "longest_ns": 9_800_000,
                    "run_delay_ns": None,
                    "own_ns": 9_800_000,
                },
            },
            "queues": queues.items,
        }
        return Page([worker], queues.next)

    async def worker_pin(self, port: str, worker: int | None) -> int:
        self.port(port)
        if worker not in (None, 0):
            raise NotFoundError(f"there is no worker {worker}")
        self._ports[port] = self._ports[port].model_copy(update={"worker": worker})
        return 0 if worker is None else 1

    async def worker_rebalance(self) -> int:
        return 2

    async def set_link(self, name: str, up: bool) -> PortInfo:
        self.port(name)
        self._links[name] = "up" if up else "down"
        self.emit("port-link", name, link=self._links[name])
        return self.port(name)

    async def set_port(self, name: str, changes: Changes) -> PortInfo:
        self.port(name)
        if name in self._ports:
            self._ports[name] = self._ports[name].model_copy(update=changes)
        return self.port(name)

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    async def close(self) -> None:
        for name in list(self._ports):
            await self.del_port(name)
        self.closed = True
