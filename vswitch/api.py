"""What can be asked of a running switch: the interface behind the control socket and its values.

`vswitch.switch.Switch` implements `SwitchApi`; the control server calls it and the client gets the
same values back. Every result is made of what MessagePack can carry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import (
    TYPE_CHECKING,
    Generic,
    Literal,
    NamedTuple,
    NotRequired,
    Protocol,
    TypedDict,
    TypeVar,
)

from vswitch.bounds import PAGE_MAX as PAGE_MAX
from vswitch.config.kind_names import PortKind

if TYPE_CHECKING:
    # The client imports this module and must start quickly, hence without pydantic.
    from vswitch.config.settings import (
        AnySettings,
        LinkSettings,
        NetworkSettings,
        PortSettings,
        Settings,
        SwitchSettings,
        UplinkSettings,
    )

T = TypeVar("T")

PortState = Literal["listening", "connecting", "connected", "ready", "fault", "up", "down"]
EventName = Literal[
    "port-added",
    "port-removed",
    "port-connected",
    "port-disconnected",
    "port-ready",
    "port-fault",
    "port-link",
    "mac-learned",
    "mac-moved",
    "mac-aged",
    "mac-limit",
    "uplink-added",
    "uplink-removed",
    "network-added",
    "network-removed",
    "link-added",
    "link-removed",
]


Changes = dict[str, int | str | list[str] | None]
"""New values of settings by their names; None is what it is when nothing is said."""


class Page(NamedTuple, Generic[T]):
    """A part of what there is; `next` is the `after` of the next part, None behind the last one.

    What is there from the first page to the last is in exactly one of them. What comes or goes
    meanwhile may be in one or not.
    """

    items: list[T]
    next: int | None


class MemoryRegion(TypedDict):
    """A region of guest memory as the frontend handed it over; addresses and sizes in bytes."""

    gpa: int
    size: int
    uva: int
    mmap_offset: int


class RingInfo(TypedDict):
    """A virtqueue: `size` counts entries, the indices run modulo 2**16."""

    index: int
    type: Literal["receiveq", "transmitq"]
    size: int
    started: bool
    enabled: bool
    avail_idx: int
    used_idx: int
    fault: str | None


class PortInfo(TypedDict):
    """A guest's port or an uplink.

    `network` is the one that it is in, and None at the end of a cable, whose other end is `peer`.
    `link` is what `set_link` said, `mtu` is in bytes, `connected_since` a Unix time in seconds,
    `frontend` is that of the settings, `withheld` names the features that are not offered because
    of it or of `features` (both for guests' ports only),
    `macs` how many MAC addresses were learned from it, of `max_macs` at most, `storm` has the
    frames a second of each kind that it may have flooded, and at once (`burst`), `limits` what
    `set_port` changes, by its names: None where nothing was said. `error` is why the port
    does not forward, `warning` what is worth knowing although it does.
    """

    name: str
    id: int
    kind: PortKind
    state: PortState
    link: Literal["up", "down"]
    network: str | None
    peer: str | None
    socket: str | None
    mode: str | None
    queues: int
    mtu: int | None
    features: int
    feature_names: list[str]
    frontend: NotRequired[str | None]
    withheld: NotRequired[list[str]]
    protocol_features: int
    protocol_feature_names: list[str]
    peer_pid: int | None
    connects: int
    connected_since: float | None
    error: str | None
    warning: str | None
    macs: int
    max_macs: int
    storm: dict[str, int | None]
    limits: dict[str, int | None]
    memory: list[MemoryRegion]
    rings: list[RingInfo]


class PortCounters(TypedDict):
    """What workers count for a port, by the names of `Counters` in fastpath/shared/words.pxd.

    Ingress is from the guest or TAP into the switch, egress the other way. `kicks` are
    notifications received, `calls` notifications sent, `stalls` the times a receiveq was found
    without room, `macs_refused` the times an address was not learned because the port or the FDB
    had no room.
    """

    ingress_frames: int
    ingress_bytes: int
    egress_frames: int
    egress_bytes: int
    kicks: int
    calls: int
    stalls: int
    macs_refused: int


class PortStats(PortCounters):
    """Counters of a port since it was added; `drops` has frames by reason, those that occurred."""

    name: str
    id: int
    drops: dict[str, int]


class NetworkInfo(TypedDict):
    """A broadcast domain: `macs` of at most `fdb_size` MAC addresses are known in it.

    An address is forgotten after `mac_aging_s` seconds of silence (0: never). `ports` are the names
    of those in it.
    """

    name: str
    learning: bool
    mac_aging_s: int
    fdb_size: int
    macs: int
    ports: list[str]


class LinkInfo(TypedDict):
    """A cable between two ports, or uplinks, of these names."""

    name: str
    ports: list[str]


class FdbEntry(TypedDict):
    """A MAC address the switch knows; `vlan` 0 is untagged, `age_s` seconds since last seen."""

    mac: str
    vlan: int
    network: str
    port: str
    static: bool
    age_s: int


class QueueInfo(TypedDict):
    """A transmitq that a worker polls: its port, vring index, and frames since it was connected."""

    port: str
    index: int
    frames: int
    frames_per_s: int
    pinned: bool


class LongestTurn(TypedDict):
    """The longest turn of a thread's loop within some time, in nanoseconds, to a microsecond.

    In `run_delay_ns` of it the thread was runnable and no CPU ran it; None where the kernel does
    not count that. `own_ns` is the longest turn without that time, which may be another one.
    """

    longest_ns: int
    run_delay_ns: int | None
    own_ns: int


class TurnsInfo(TypedDict):
    """The longest turns of a loop: of the last seconds, and since it was first measured."""

    last_10_s: LongestTurn
    last_minute: LongestTurn
    since_start: LongestTurn


class EventLoopInfo(TypedDict):
    """The main thread's loop. `turns` is None where they are not measured; the log says why."""

    turns: TurnsInfo | None


class WorkerInfo(TypedDict):
    """A poll thread and what it did since the start; `*_ns` are nanoseconds.

    `frames` were taken in `bursts` by `loops` looks at all rings, in `busy_ns` altogether.
    `cycles_per_frame` are cycles of the machine's time-stamp counter in which the worker was busy,
    for each frame; None before the first one, and where the machine has no such counter.
    `notify` is how it signals eventfds: "write" where the kernel has no AIO. `events_lost` is how
    often the main thread was too slow to be told something. `turns` counts the present turn as far
    as it has come.
    """

    id: int
    cpu: int | None
    rings: int
    state: Literal["busy", "sleeping"]
    loops: int
    bursts: int
    frames: int
    sleeps: int
    wakeups: int
    notify: Literal["aio", "write"]
    busy_ns: int
    idle_ns: int
    cycles_per_frame: float | None
    events_lost: int
    turns: TurnsInfo
    queues: list[QueueInfo]


class Unsaved(TypedDict):
    """What runs otherwise than the file says after `save`, for the file has no word for it.

    `links_down` names the ports whose link was
    set down, `log_level` is what it was set to at run time, if it was.
    """

    links_down: list[str]
    log_level: NotRequired[str]


class HelloInfo(TypedDict):
    """Who answers on a control socket: the switch's name, versions and process."""

    name: str
    version: str
    protocol: int
    pid: int


class VersionInfo(HelloInfo):
    """What runs; `config` is the file it was started with, `uptime_s` seconds since its start."""

    python: str
    config: str | None
    uptime_s: float


class Event(TypedDict):
    """Something that happened at `time` (Unix time in seconds), to `port` if to one.

    `network` and `cable` come with the `network-*` and `link-*` events and name what came or went.
    `mac` and `vlan` come with the `mac-*` events, `previous_port` with `mac-moved`, `link` with
    `port-link`, `reason` with `port-fault` and `port-disconnected` where one is known.
    """

    event: EventName
    time: float
    port: str | None
    network: NotRequired[str]
    cable: NotRequired[str]
    mac: NotRequired[str]
    vlan: NotRequired[int]
    previous_port: NotRequired[str]
    link: NotRequired[Literal["up", "down"]]
    reason: NotRequired[str]


class SwitchApi(Protocol):
    """A running switch. Errors are VswitchError subclasses; nothing here blocks.

    What grows with the switch is given in pages: `most` is how many elements one may have, and it
    has fewer where they are long, so that a page never takes the event loop for long.
    """

    @property
    def name(self) -> str:
        """What the switch is called."""
        ...

    @property
    def settings(self) -> Settings:
        """What runs now, ports and uplinks as added and removed; `save` writes it."""
        ...

    @property
    def switch_settings(self) -> SwitchSettings:
        """The `[switch]` table of `settings`."""
        ...

    def unsaved(self) -> Unsaved:
        """What `settings` does not tell of what runs."""
        ...

    def tables(
        self, after: int = 0, most: int = PAGE_MAX
    ) -> Page[AnySettings | NetworkSettings | LinkSettings]:
        """Networks, ports and uplinks, and links of `settings`, a page of them."""
        ...

    @property
    def n_ports(self) -> tuple[int, int]:
        """How many guests' ports and how many uplinks there are."""
        ...

    async def add_port(self, settings: PortSettings) -> PortInfo:
        """Open a port. ExistsError if name or socket is in use, SocketError if it cannot be."""
        ...

    async def del_port(self, name: str) -> None:
        """Close a port and forget its MAC addresses. NotFoundError; not for uplinks."""
        ...

    def ports(self, after: int = 0, most: int = PAGE_MAX) -> Page[PortInfo]:
        """Guests' ports and uplinks, in the order in which they were added."""
        ...

    def port(self, name: str) -> PortInfo:
        """One port or uplink. NotFoundError."""
        ...

    async def add_uplink(self, settings: UplinkSettings) -> PortInfo:
        """Open an uplink. ExistsError, UplinkError."""
        ...

    async def del_uplink(self, name: str) -> None:
        """Close an uplink. NotFoundError; not for guests' ports."""
        ...

    def stats(
        self, name: str | None = None, after: int = 0, most: int = PAGE_MAX
    ) -> Page[PortStats]:
        """Counters of one port or of all. NotFoundError."""
        ...

    async def add_network(self, settings: NetworkSettings) -> NetworkInfo:
        """Add a network without ports. ExistsError."""
        ...

    async def del_network(self, name: str) -> None:
        """Delete a network that no port is in. NotFoundError, ExistsError."""
        ...

    def networks(self, after: int = 0, most: int = PAGE_MAX) -> Page[NetworkInfo]:
        """All networks, in the order in which they were added; the default one is the first."""
        ...

    def network(self, name: str) -> NetworkInfo:
        """One network. NotFoundError."""
        ...

    async def add_link(self, settings: LinkSettings) -> LinkInfo:
        """Plug a cable into two ports that are in no network of their own.

        NotFoundError (port), ExistsError (name or end in use).
        """
        ...

    async def del_link(self, name: str) -> None:
        """Pull a cable; its ends are in the default network then. NotFoundError."""
        ...

    def links(self, after: int = 0, most: int = PAGE_MAX) -> Page[LinkInfo]:
        """All cables, in the order in which they were added."""
        ...

    def fdb(
        self, network: str | None = None, after: int = 0, most: int = PAGE_MAX
    ) -> Page[FdbEntry]:
        """The MAC addresses known, of one network or all, in no order. NotFoundError."""
        ...

    def fdb_add(self, mac: str, port: str, vlan: int = 0) -> None:
        """Add a static entry, in place of a dynamic one. NotFoundError (port), ExistsError."""
        ...

    def fdb_del(self, mac: str, vlan: int = 0, network: str | None = None) -> None:
        """Delete an entry, static or dynamic, of a network: by default, of the only one with it.

        NotFoundError, ExistsError if several networks have it.
        """
        ...

    async def fdb_flush(self, port: str | None = None, network: str | None = None) -> int:
        """Delete the dynamic entries, of one port, one network or all; how many. NotFoundError."""
        ...

    def workers(self, after: int = 0, most: int = PAGE_MAX) -> Page[WorkerInfo]:
        """All poll threads, each with those of its queues that belong to a page of the ports."""
        ...

    async def worker_pin(self, port: str, worker: int | None) -> int:
        """Have one worker poll all of a port's queues, or any (None); how many queues moved.

        NotFoundError (port, worker).
        """
        ...

    async def worker_rebalance(self) -> int:
        """Spread the queues over the workers by their load; how many moved."""
        ...

    async def set_link(self, name: str, up: bool) -> PortInfo:
        """Switch a port's link on or off. NotFoundError; not for uplinks."""
        ...

    async def set_port(self, name: str, changes: Changes) -> PortInfo:
        """Change limits and network of a port or uplink by the names of their settings.

        NotFoundError (port, network), ExistsError for the network of a cable's end.
        """
        ...

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Have `callback` called with every event, on the loop; returns what ends that."""
        ...

    async def close(self) -> None:
        """Close all ports and uplinks and end the workers."""
        ...
