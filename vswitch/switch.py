"""The switch: ports, uplinks, workers and the FDB put together.

Everything here runs on the event loop's thread. What workers may see changes only through
`dataplane.handover`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Literal, Self, TypeVar, cast

from vswitch.api import (
    PAGE_MAX,
    Event,
    EventName,
    FdbEntry,
    Page,
    PortInfo,
    PortStats,
    QueueInfo,
    Unsaved,
    WorkerInfo,
)
from vswitch.config.settings import (
    PortSettings,
    Settings,
    SwitchSettings,
    UplinkSettings,
    find_clashes,
)
from vswitch.dataplane import addresses
from vswitch.dataplane.handover import HandOver
from vswitch.dataplane.placement import Placement
from vswitch.dataplane.threads import WorkerThreads
from vswitch.errors import ConfigError, ExistsError, NotFoundError, VswitchError
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.fdb import key_mac, mac_key
from vswitch.fastpath.main.mapping import watch_lost_memory
from vswitch.fastpath.main.port import MAX_VRINGS, Port
from vswitch.host.tap import open_tap
from vswitch.ports import limits, offloads
from vswitch.ports.fault_process import unavailable
from vswitch.ports.guest import VhostPort
from vswitch.ports.journals import Journals
from vswitch.ports.tap import TapPort
from vswitch.relay.process import Relay

log = logging.getLogger("vswitch.switch")

AnyPort = VhostPort | TapPort
Subscriber = Callable[[Event], None]

_T = TypeVar("_T")

_PORT_WEIGHT = 8
"""What a port takes on a page, in elements; each ring and region takes one more."""
_EVENTS_A_TURN = 64
_PORTS_A_TURN = 16


class Switch:
    """A running switch. Implements `vswitch.api.SwitchApi`; make one with `create`."""

    def __init__(self, settings: Settings, relay: Relay, journals: Path | None) -> None:
        switch = settings.switch
        idle_ns = {"adaptive": switch.idle_us * 1000, "sleep": 0, "busy": None}[switch.polling]
        self._loop = asyncio.get_running_loop()
        self._relay = relay
        self._switch_settings = switch
        self._engine = Engine(workers=switch.workers, fdb_size=switch.fdb_size, idle_ns=idle_ns)
        self._handover = HandOver(self._engine)
        self._say_how_to_notify()
        if (reason := unavailable()) is not None:
            log.warning("postcopy migration is not offered: %s", reason)
        self._placement = Placement(self._engine)
        self._lost_fd = watch_lost_memory()
        self._threads = WorkerThreads(self._engine, switch.cpus)
        self._ports: dict[str, AnyPort] = {}
        self._by_id: dict[int, AnyPort] = {}
        self._serials: dict[str, int] = {}
        self._next_serial = count(1)
        self._subscribers: list[Subscriber] = []
        self._tick_started = time.monotonic()
        self._ticker: asyncio.TimerHandle | None = None
        self._looking = self._aging = False
        self._lock = asyncio.Lock()
        self._journals = None if journals is None else Journals(journals)

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
            switch._loop.add_reader(switch._engine.event_fd, switch._on_events)
            switch._loop.add_reader(switch._lost_fd, switch._on_lost_memory)
            switch._tick()
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
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        # The workers first: while ports go one by one, frames for those that are gone would be
        # flooded to those that are left.
        self._threads.stop()
        for port in list(self._ports.values()):
            await self._remove(port)
        self._handover.collect()
        self._loop.remove_reader(self._engine.event_fd)
        self._loop.remove_reader(self._lost_fd)

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
        ports = self._ports.values()
        # Without validation: each of them has been, and that their paths differ has as well.
        return Settings.model_construct(
            switch=self._switch_settings,
            ports=[port.settings for port in ports if isinstance(port, VhostPort)],
            uplinks=[port.settings for port in ports if isinstance(port, TapPort)],
        )

    def unsaved(self) -> Unsaved:
        ports = self._ports.values()
        return Unsaved(
            static_macs=sum(self._engine.fdb.pinned(port.fast.id) for port in ports),
            links_down=[port.name for port in ports if port.fast.link_down],
        )

    def port_settings(
        self, after: int = 0, most: int = PAGE_MAX
    ) -> Page[PortSettings | UplinkSettings]:
        return self._page(after, most, lambda port: (port.settings, _PORT_WEIGHT))

    @property
    def n_ports(self) -> tuple[int, int]:
        n_uplinks = sum(isinstance(port, TapPort) for port in self._ports.values())
        return len(self._ports) - n_uplinks, n_uplinks

    # Ports and uplinks

    async def add_port(self, settings: PortSettings) -> PortInfo:
        async with self._lock:
            self._check_free(settings)
            self._check_worker(settings.worker)
            port = VhostPort(
                settings,
                self._engine,
                self._new_fast_port(settings.name),
                self._relay,
                self._handover,
                self._placement.choose,
                lambda event, reason: self._emit(cast(EventName, event), settings.name, reason),
            )
            fresh = self._journals is not None and not self._journals.has(settings.name)
            if self._journals is not None:
                journal = self._journals.open(settings.name, MAX_VRINGS, 2 * settings.queues)
                if journal is not None:
                    port.fast.use_journal(journal)
            try:
                port.open()
            except BaseException:
                if fresh and self._journals is not None:
                    self._journals.forget(settings.name)
                await self._retire(port.fast)
                raise
            if settings.worker is not None:
                self._placement.pins[settings.name] = settings.worker
            self._enter(port)
            log.info("port %s: %s %s", port.name, port.state, settings.socket)
            self._emit("port-added", port.name)
            return port.info()

    async def del_port(self, name: str) -> None:
        async with self._lock:
            await self._remove(self._guest_port(name))
            self._placement.pins.pop(name, None)
            if self._journals is not None:
                self._journals.forget(name)
            log.info("port %s: removed", name)
            self._emit("port-removed", name)

    async def add_uplink(self, settings: UplinkSettings) -> PortInfo:
        async with self._lock:
            self._check_free(settings)
            tap = open_tap(
                settings.name,
                mtu=settings.mtu,
                bridge=settings.bridge,
                offloads=offloads.mask(settings.offloads),
            )
            try:
                port = TapPort(
                    settings, tap, self._engine, self._new_fast_port(settings.name, tap.fd)
                )
            except BaseException:
                tap.close()
                raise
            self._enter(port)
            await self._handover.settle()
            log.info("uplink %s: %s", settings.name, port.state)
            if self._engine.uring_error:
                log.info(
                    "uplink %s: each frame to it costs a system call, for the kernel gives no "
                    "io_uring (%s)",
                    settings.name,
                    os.strerror(self._engine.uring_error),
                )
            self._emit("uplink-added", settings.name)
            return port.info()

    async def del_uplink(self, name: str) -> None:
        async with self._lock:
            port = self._find(name)
            if not isinstance(port, TapPort):
                raise NotFoundError(
                    f'"{name}" is a port, not an uplink', hint=f"vswitchctl del-port {name}"
                )
            await self._remove(port)
            log.info("uplink %s: removed", name)
            self._emit("uplink-removed", name)

    def ports(self, after: int = 0, most: int = PAGE_MAX) -> Page[PortInfo]:
        def one(port: AnyPort) -> tuple[PortInfo, int]:
            info = port.info()
            return info, _PORT_WEIGHT + len(info["rings"]) + len(info["memory"])

        return self._page(after, most, one)

    def port(self, name: str) -> PortInfo:
        return self._find(name).info()

    def stats(
        self, name: str | None = None, after: int = 0, most: int = PAGE_MAX
    ) -> Page[PortStats]:
        def one(port: AnyPort) -> tuple[PortStats, int]:
            counters = self._engine.stats(port.fast)
            stats = cast(PortStats, {"name": port.name, "id": port.fast.id, **counters})
            return stats, _PORT_WEIGHT + len(self._engine.workers)

        if name is not None:
            return Page([one(self._find(name))[0]], None)
        return self._page(after, most, one)

    def _page(self, after: int, most: int, one: Callable[[AnyPort], tuple[_T, int]]) -> Page[_T]:
        """What `one` makes of each port, from the one on that was added after number `after`.

        It also says what that weighs: a page is full with `most` of them, or PAGE_MAX of weight.
        """
        items: list[_T] = []
        room = PAGE_MAX
        last = after
        for name, port in self._ports.items():
            if self._serials[name] <= after:
                continue
            if room <= 0 or len(items) == most:
                return Page(items, last)
            item, weight = one(port)
            items.append(item)
            room -= weight
            last = self._serials[name]
        return Page(items, None)

    def workers(self, after: int = 0, most: int = PAGE_MAX) -> Page[WorkerInfo]:
        def one(port: AnyPort) -> tuple[list[tuple[int, QueueInfo]], int]:
            return self._placement.queues(port.fast), _PORT_WEIGHT + len(port.fast.rings)

        ports = self._page(after, most, one)
        queues: dict[int, list[QueueInfo]] = {}
        for of_port in ports.items:
            for worker, queue in of_port:
                queues.setdefault(worker, []).append(queue)
        return Page(self._threads.info(queues), ports.next)

    async def worker_pin(self, port: str, worker: int | None) -> int:
        target = self._guest_port(port)
        self._check_worker(worker)
        target.settings = target.settings.model_copy(update={"worker": worker})
        if worker is None:
            self._placement.pins.pop(port, None)
            return 0
        self._placement.pins[port] = worker
        return await self.worker_rebalance()

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

    async def set_link(self, name: str, up: bool) -> PortInfo:
        port = self._guest_port(name)
        link: Literal["up", "down"] = "up" if up else "down"
        if port.link != link:
            await port.set_link(up)
            log.info("port %s: link set %s", name, link)
            self._send(Event(event="port-link", time=time.time(), port=name, link=link))
        return port.info()

    async def set_port(self, name: str, changes: dict[str, int | None]) -> PortInfo:
        port = self._find(name)
        port.change(changes)
        log.info(
            "port %s: %s", name, ", ".join(f"{k} = {v or 'default'}" for k, v in changes.items())
        )
        return port.info()

    # FDB

    def fdb(self, after: int = 0, most: int = PAGE_MAX) -> Page[FdbEntry]:
        entries, following = self._engine.fdb.page(after, most)
        found = []
        for key, number, static, age in entries:
            port = self._by_id.get(number)
            if port is None:
                continue  # it is just being removed
            mac, vlan = key_mac(key)
            found.append(FdbEntry(mac=mac, vlan=vlan, port=port.name, static=static, age_s=age))
        return Page(found, following)

    def fdb_add(self, mac: str, port: str, vlan: int = 0) -> None:
        key = _key(mac, vlan)
        target = self._find(port)
        number, static = self._engine.fdb.find(key) or (-1, False)
        if static and number != target.fast.id:
            raise ExistsError(
                f"{mac} (VLAN {vlan}) is a static entry of port {self._by_id[number].name}",
                hint="delete it first: vswitchctl fdb del "
                + (mac if not vlan else f"{mac} --vlan {vlan}"),
            )
        if not self._engine.fdb.add_static(key, target.fast.id):
            raise VswitchError(
                f"no room for {mac} in the FDB ({self._engine.fdb.size} addresses)",
                hint="flush it, or set a greater fdb_size in [switch]",
            )

    def fdb_del(self, mac: str, vlan: int = 0) -> None:
        if not self._engine.fdb.delete(_key(mac, vlan)):
            raise NotFoundError(
                f"{mac} (VLAN {vlan}) is not in the FDB", hint="vswitchctl fdb show lists it"
            )

    async def fdb_flush(self, port: str | None = None) -> int:
        number = None if port is None else self._find(port).fast.id
        return await addresses.flush(self._engine.fdb, number)

    # Events

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        self._subscribers.append(callback)
        self._engine.report_macs = True

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._subscribers.remove(callback)
            self._engine.report_macs = bool(self._subscribers)

        return unsubscribe

    def _emit(self, event: EventName, port: str | None, reason: str | None = None) -> None:
        if not self._subscribers:
            return
        record = Event(event=event, time=time.time(), port=port)
        if reason is not None:
            record["reason"] = reason
        self._send(record)

    def _send(self, record: Event) -> None:
        for subscriber in list(self._subscribers):
            subscriber(record)

    def _on_events(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._engine.event_fd)
        for event in self._engine.take_events(_EVENTS_A_TURN):
            self._on_event(*event)
        if self._engine.arm_events():
            # More have come: after everybody else's turn.
            self._loop.call_soon(self._on_more_events)

    def _on_more_events(self) -> None:
        if self._ticker is not None:  # not closed meanwhile
            self._on_events()

    def _on_lost_memory(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._lost_fd)
        for port in self._by_id.values():
            if isinstance(port, VhostPort):
                port.check_memory()

    def _on_event(self, kind: str, number: int, other: int, key: int) -> None:
        port = self._by_id.get(number)
        if port is None:
            return
        if kind == "ring-fault" and isinstance(port, VhostPort):
            port.ring_fault(other)
        elif kind == "iotlb-miss" and isinstance(port, VhostPort):
            port.iotlb_missed(other)
        elif kind == "tap-lost" and isinstance(port, TapPort):
            reason = port.lost()
            log.error("uplink %s: %s", port.name, reason)
            self._emit("port-fault", port.name, reason)
        elif kind == "mac-limit":
            most = limits.max_macs(port.settings, self._engine.fdb)
            reason = f"{most} MAC addresses were learned, the most it may have (max_macs)"
            log.warning("port %s: %s; further ones are not", port.name, reason)
            self._emit("mac-limit", port.name, reason)
        elif kind in ("mac-learned", "mac-moved") and self._subscribers:
            mac, vlan = key_mac(key)
            record = Event(
                event=cast(EventName, kind), time=time.time(), port=port.name, mac=mac, vlan=vlan
            )
            previous = self._by_id.get(other)
            if kind == "mac-moved" and previous is not None:
                record["previous_port"] = previous.name
            self._send(record)

    def _tick(self) -> None:
        """Once a second: the FDB's clock, aging, and a look at the sockets."""
        self._ticker = self._loop.call_later(1.0, self._tick)
        fdb = self._engine.fdb
        # From 1: 0 in an entry's stamp would look like one that was never set.
        fdb.tick = 1 + int(time.monotonic() - self._tick_started)
        # The rest of a turn each: whoever has a big switch waits no longer than others.
        if self._switch_settings.mac_aging_s and len(fdb) and not self._aging:
            self._aging = True
            self._age(0)
        self._handover.collect()
        if not self._looking:
            self._looking = True
            self._look(iter(list(self._ports.values())))

    def _age(self, start: int) -> None:
        """Forget addresses that have been silent for too long, from a place of the FDB on."""
        self._aging = False
        if self._ticker is None:
            return  # closed meanwhile
        gone, following = self._engine.fdb.age_on(start, self._switch_settings.mac_aging_s)
        for key, number in gone:
            port = self._by_id.get(number)
            if port is not None and self._subscribers:
                mac, vlan = key_mac(key)
                self._send(
                    Event(event="mac-aged", time=time.time(), port=port.name, mac=mac, vlan=vlan)
                )
        if following is not None:
            self._aging = True
            self._loop.call_soon(self._age, following)

    def _look(self, ports: Iterator[AnyPort]) -> None:
        """Look at the sockets of some ports, and at what came through their rings."""
        if self._ticker is None:
            return
        fdb = self._engine.fdb
        some = list(islice(ports, _PORTS_A_TURN))
        for port in some:
            if self._by_id.get(port.fast.id) is not port:
                continue  # removed meanwhile
            self._placement.count(port.fast)
            port.check()
            if 2 * fdb.learned(port.fast.id) < limits.max_macs(port.settings, fdb):
                port.fast.mac_limit_told = False  # to be told again, should it come to that again
        if some:
            self._loop.call_soon(self._look, ports)
        else:
            self._looking = False

    # Helpers

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

    def _find(self, name: str) -> AnyPort:
        try:
            return self._ports[name]
        except KeyError:
            raise NotFoundError(
                f'there is no port or uplink "{name}"', hint="vswitchctl list-ports lists them"
            ) from None

    def _guest_port(self, name: str) -> VhostPort:
        port = self._find(name)
        if not isinstance(port, VhostPort):
            raise NotFoundError(
                f'"{name}" is an uplink, not a guest\'s port',
                hint="uplinks are changed with `vswitchctl uplink` and `ip link`",
            )
        return port

    def _check_worker(self, number: int | None) -> None:
        if number is not None and not 0 <= number < len(self._engine.workers):
            raise NotFoundError(
                f"there is no worker {number}",
                hint=f"there are {len(self._engine.workers)}, counted from 0 (workers in [switch])",
            )

    def _check_free(self, new: PortSettings | UplinkSettings) -> None:
        """Raise ExistsError if the name or the socket is in use."""
        if new.name in self._ports:
            raise ExistsError(
                f'there is a port or uplink "{new.name}" already', hint="choose another name"
            )
        if isinstance(new, PortSettings):
            mine = {"name": new.name, "socket": new.socket}
            there = [
                {"name": port.name, "socket": port.settings.socket}
                for port in self._ports.values()
                if isinstance(port, VhostPort)
            ]
            for _, _, key, reason in find_clashes(
                self._switch_settings.control, [*there, mine], []
            ):
                raise ExistsError(
                    f'port "{new.name}": {key} {new.socket} {reason}', hint="choose another path"
                )

    def _new_fast_port(self, name: str, tap_fd: int = -1) -> Port:
        try:
            return self._engine.add_port(name, tap_fd)
        except OSError as exc:
            raise VswitchError(f'port "{name}": {exc}') from exc

    def _enter(self, port: AnyPort) -> None:
        self._ports[port.name] = port
        self._serials[port.name] = next(self._next_serial)
        self._by_id[port.fast.id] = port

    async def _remove(self, port: AnyPort) -> None:
        if isinstance(port, VhostPort):
            await port.close()
        await self._retire(port.fast)
        self._by_id.pop(port.fast.id, None)
        self._ports.pop(port.name, None)
        self._serials.pop(port.name, None)
        if isinstance(port, TapPort):
            port.close()

    async def _retire(self, fast: Port) -> None:
        """Take a port out of the engine and wait until no worker knows it."""
        # Both flush the FDB, which has little of the port any more: that takes turns.
        await addresses.flush(self._engine.fdb, fast.id, statics=True)
        self._engine.remove_port(fast)
        await self._handover.settle()
        await addresses.flush(self._engine.fdb, fast.id, statics=True)
        self._engine.forget(fast)
        self._placement.forget(fast)


def _key(mac: str, vlan: int) -> int:
    try:
        return mac_key(mac, vlan)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
