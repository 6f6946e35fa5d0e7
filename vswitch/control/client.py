"""Talk to a running switch from Python: `vswitch.Client`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from vswitch._version import __version__
from vswitch.bounds import PAGE_MAX
from vswitch.control.channel import Channel, usual_paths
from vswitch.control.protocol import PROTOCOL_VERSION

if TYPE_CHECKING:
    # Programs that talk to a switch start quickly: of these they need the names only.
    from vswitch.api import (
        Event,
        EventLoopInfo,
        EventName,
        FdbEntry,
        HelloInfo,
        LinkInfo,
        NetworkInfo,
        PortInfo,
        PortStats,
        Unsaved,
        VersionInfo,
        WorkerInfo,
    )


class Client:
    """A connection to the control socket of a switch; a context manager.

    Every method is a request of docs/control-protocol.md (for lists, one a page) and waits for its
    answer. Errors are the
    VswitchError subclasses that the switch raised (NotFoundError, ExistsError, ...), and
    ControlError, whose `code` is `unreachable`, `timeout` or `disconnected`, for the connection.
    For use by one thread at a time.

    >>> with Client("/run/vswitch/control.sock") as switch:
    ...     switch.add_port("vm1", "/run/vswitch/vm1.sock")
    ...     for event in switch.events("port-ready"):
    ...         print(event["port"])
    """

    def __init__(self, path: Path | str | None = None, *, timeout: float | None = 10.0) -> None:
        """Connect to `path` (default: as `vswitchctl` does) and greet.

        `timeout` is in seconds for connecting and for each answer; None waits for ever.
        """
        self.unsaved: Unsaved | None = None
        """What the last `save` had no word for."""
        self._channel = Channel(usual_paths() if path is None else [Path(path)], timeout)
        try:
            self.switch: HelloInfo = self._call(
                "hello", protocol=PROTOCOL_VERSION, client=f"python {__version__}"
            )
        except BaseException:
            self._channel.close()
            raise

    @property
    def path(self) -> Path:
        """The control socket."""
        return self._channel.path

    @property
    def timeout(self) -> float | None:
        """Seconds for each answer; None waits for ever."""
        return self._channel.timeout

    @timeout.setter
    def timeout(self, value: float | None) -> None:
        self._channel.timeout = value

    @property
    def events_lost(self) -> int:
        """Events that the switch or this client dropped because nobody took them in time."""
        return self._channel.events_lost

    def close(self) -> None:
        """Close the connection; may be called twice."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # The switch.

    def ping(self) -> float:
        """Ask for a sign of life; returns the round trip in seconds."""
        start = time.perf_counter()
        self._call("ping")
        return time.perf_counter() - start

    def version(self) -> VersionInfo:
        """Versions, process and uptime of the switch."""
        return cast("VersionInfo", self._call("version"))

    def settings(self) -> dict[str, Any]:
        """The running configuration: the tables of ports.toml with their keys.

        `switch` is one of them; `networks`, `ports`, `uplinks` and `links` are lists.
        """
        pages = list(self._pages("settings"))
        lists = ("networks", "ports", "uplinks", "links")
        found: dict[str, Any] = {"switch": pages[-1]["switch"]}
        return found | {name: [each for page in pages for each in page[name]] for name in lists}

    def log_level(self, level: str | None = None) -> str:
        """The level of the log: debug, info, warning or error; sets it first if one is given."""
        return str(self._call("log_level", level=level)["level"])

    def save(self, path: Path | str | None = None, *, force: bool = False) -> Path:
        """Write the running configuration to `path`, or to the file the switch was started with.

        A file that says what the switch has neither read nor written there is left alone
        (ConfigError, code `changed`), unless `force`. `unsaved` has what could not be written.
        """
        absolute = None if path is None else str(Path(path).absolute())
        result = self._call("save", path=absolute, force=force)
        self.unsaved = cast("Unsaved", result["unsaved"])
        return Path(result["path"])

    def stop(self) -> None:
        """Stop the switch and wait until it has closed its ports and removed its sockets."""
        self._call("stop")
        self._channel.until_disconnected()

    # Ports and uplinks.

    def add_port(self, name: str, socket: Path | str, **settings: Any) -> PortInfo:
        """Open a vhost-user port. `settings` are keys of a `[[port]]` table (config/ports.toml)."""
        path = str(Path(socket).absolute())
        return cast("PortInfo", self._call("add_port", name=name, socket=path, **settings))

    def del_port(self, name: str) -> None:
        """Close a vhost-user port."""
        self._call("del_port", name=name)

    def ports(self) -> list[PortInfo]:
        """All ports and uplinks."""
        return self._all("ports")

    def port(self, name: str) -> PortInfo:
        """One port or uplink."""
        return cast("PortInfo", self._call("port", name=name))

    def add_uplink(self, name: str, **settings: Any) -> PortInfo:
        """Open a TAP interface, created if need be. `settings` are keys of an `[uplink]` table."""
        return cast("PortInfo", self._call("add_uplink", name=name, **settings))

    def del_uplink(self, name: str) -> None:
        """Close an uplink."""
        self._call("del_uplink", name=name)

    def stats(self, name: str | None = None) -> list[PortStats]:
        """Counters of one port or of all."""
        return self._all("stats", name=name)

    def event_loop(self) -> EventLoopInfo:
        """The loop of the main thread."""
        return cast("EventLoopInfo", self._call("event_loop"))

    def workers(self) -> list[WorkerInfo]:
        """The poll threads."""
        workers: dict[int, WorkerInfo] = {}
        for page in self._pages("workers"):
            for worker in page["items"]:
                # Each page has all of them, with queues of its own.
                if (before := workers.get(worker["id"])) is not None:
                    worker["queues"] = before["queues"] + worker["queues"]
                workers[worker["id"]] = worker
        return list(workers.values())

    def worker_pin(self, port: str, worker: int | None) -> int:
        """Have one worker poll all queues of a port, or any (None); returns how many moved."""
        return int(self._call("worker_pin", port=port, worker=worker)["moved"])

    def worker_rebalance(self) -> int:
        """Spread the queues over the workers by their load; returns how many moved."""
        return int(self._call("worker_rebalance")["moved"])

    def set_port(self, name: str, **changes: int | str | None) -> PortInfo:
        """Change what can be changed while a port or uplink runs; None for the default.

        `changes`: keys of its table, those of `RuntimeKeys` in vswitch/config/keys.py.
        """
        return cast("PortInfo", self._call("set_port", name=name, **changes))

    def set_link(self, name: str, up: bool) -> PortInfo:
        """Switch a port's link on or off: while off, all frames from and to it are dropped."""
        return cast("PortInfo", self._call("set_link", name=name, up=up))

    # Networks and cables.

    def add_network(self, name: str, **settings: Any) -> NetworkInfo:
        """Add a network. `settings` are keys of a `[[network]]` table (config/ports.toml)."""
        return cast("NetworkInfo", self._call("add_network", name=name, **settings))

    def del_network(self, name: str) -> None:
        """Delete a network that no port is in."""
        self._call("del_network", name=name)

    def networks(self) -> list[NetworkInfo]:
        """All networks."""
        return self._all("networks")

    def network(self, name: str) -> NetworkInfo:
        """One network."""
        return cast("NetworkInfo", self._call("network", name=name))

    def add_link(self, port: str, other: str, *, name: str | None = None) -> LinkInfo:
        """Plug a cable into two ports."""
        return cast("LinkInfo", self._call("add_link", name=name, ports=[port, other]))

    def del_link(self, name: str) -> None:
        """Pull a cable."""
        self._call("del_link", name=name)

    def links(self) -> list[LinkInfo]:
        """All cables."""
        return self._all("links")

    # MAC addresses.

    def fdb(self, network: str | None = None) -> list[FdbEntry]:
        """All MAC addresses known, of one network or all, by network, VLAN and address.

        They are asked for a page at a time: what is learned or forgotten meanwhile may be among
        them or not.
        """
        entries: list[FdbEntry] = self._all("fdb", network=network)
        entries.sort(key=itemgetter("network", "vlan", "mac"))
        return entries

    def fdb_add(self, mac: str, port: str, *, vlan: int = 0) -> None:
        """Add a static entry."""
        self._call("fdb_add", mac=mac, port=port, vlan=vlan)

    def fdb_del(self, mac: str, *, vlan: int = 0, network: str | None = None) -> None:
        """Delete an entry of a network, by default of the only one that has it."""
        self._call("fdb_del", mac=mac, vlan=vlan, network=network)

    def fdb_flush(self, port: str | None = None, *, network: str | None = None) -> int:
        """Delete the learned entries, of one port, one network or all; returns how many."""
        return int(self._call("fdb_flush", port=port, network=network)["removed"])

    # Events.

    def subscribe(self, *events: EventName | str) -> None:
        """Have the named events sent from now on, or all; replaces an earlier subscription."""
        self._call("subscribe", events=list(events) or None)

    def unsubscribe(self) -> None:
        """Have no more events sent."""
        self._call("unsubscribe")

    def events(self, *events: EventName | str, timeout: float | None = None) -> Iterator[Event]:
        """Subscribe at once and iterate over the events as they come.

        Ends after `timeout` seconds without an event (None: never). Other methods may be called
        meanwhile; what arrives during them is kept. ControlError if the switch goes away.
        """
        self.subscribe(*events)
        return self._iterate(timeout)

    def _iterate(self, timeout: float | None) -> Iterator[Event]:
        while True:
            try:
                event = self._channel.next_event(timeout)
            except TimeoutError:
                return
            yield event

    # Requests and responses.

    def _pages(self, method: str, **params: Any) -> Iterator[dict[str, Any]]:
        """The answers to one request after the other, until there is no next page."""
        after: int | None = 0
        while after is not None:
            page = self._call(method, after=after, limit=PAGE_MAX, **params)
            yield page
            after = page["next"]

    def _all(self, method: str, **params: Any) -> list[Any]:
        """What is in all pages."""
        return [item for page in self._pages(method, **params) for item in page["items"]]

    def _call(self, method: str, **params: Any) -> Any:
        """One request, by its name on the wire, and its result."""
        return self._channel.call(method, params)
