"""What a port or an uplink can be told: each key declared once, for all who know it by its name.

It is a key of a `[[port]]` or `[uplink]` table, a parameter of `add_port`, `add_uplink` or
`set_port`, and an option of vswitchctl. Its line here has its type, what it is unless it is told,
and its words. `vswitch.config.settings` makes models of these classes and adds what it takes more
than a type to check; vswitchctl makes options of them, without pydantic, for it has to start
quickly. config/ports.toml explains each to people.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    dataclass_transform,
    get_args,
    get_type_hints,
)

from vswitch.bounds import MTU_MAX, MTU_MIN, QUEUE_PAIRS_MAX, WORKERS_MAX
from vswitch.config.feature_names import Frontend
from vswitch.config.kind_names import UplinkKind

OFFLOADS = ("csum", "tso4", "tso6", "ecn", "uso", "ufo")
"""What `offloads` can name. All but csum rest on csum (VIRTIO 1.2, 5.1.3.1)."""

OffloadSetting = bool | list[str]
"""True: all, False: none, or those named."""

Mode = Literal["server", "client"]
LogLevel = Literal["debug", "info", "warning", "error"]

MACS_MAX = 1 << 20
"""MAC addresses that a switch can know, and so a port."""
FDB_SIZE_MIN = 16
AGING_MAX_S = 1_000_000
DEFAULT_NETWORK = "default"
"""The network that always exists, and that ports are in that name none."""
STORM_RATE_MAX = 10_000_000
"""Frames a second."""


class Key(NamedTuple):
    """What its type does not say: its help, for numbers the bounds, what help calls its value."""

    text: str
    least: int | None = None
    most: int | None = None
    metavar: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Have a model keep to the bounds; `int`, or `int | None`."""
        schema = handler(source)
        number = schema["schema"] if schema["type"] == "nullable" else schema
        if self.least is not None:
            number["ge"] = self.least
        if self.most is not None:
            number["le"] = self.most
        return schema


class Row(NamedTuple):
    """A key as its class declares it."""

    name: str
    type: Any
    default: Any
    """None: nothing in particular, or it has to be told."""
    key: Key


# For type checkers: what these classes declare, the models made of them take by name.
@dataclass_transform(kw_only_default=True)
class _Keys:
    pass


class PortKeys(_Keys):
    """A `[[port]]`, besides `RuntimeKeys`."""

    name: Annotated[str, Key("unique among ports and uplinks")]
    socket: Annotated[Path, Key("path of the vhost-user socket")]
    mode: Annotated[Mode, Key("server: the switch listens; client: it connects")] = "server"
    owner: Annotated[str | None, Key("user who owns the socket (server mode)")] = None
    group: Annotated[str | None, Key("group of the socket (server mode)")] = None
    permissions: Annotated[
        str | None, Key("permissions of the socket, e.g. 0660 (server mode)", metavar="OCTAL")
    ] = None
    queues: Annotated[int, Key("most queue pairs", 1, QUEUE_PAIRS_MAX)] = 1
    mtu: Annotated[
        int | None,
        Key("largest MTU of the guest, in bytes; QEMU tells it with host_mtu=", MTU_MIN, MTU_MAX),
    ] = None
    offloads: Annotated[
        OffloadSetting,
        Key("checksum and segmentation offloads: on, off, or some of " + ",".join(OFFLOADS)),
    ] = True
    frontend: Annotated[
        Frontend | None,
        Key("frontend that cannot use all that is offered, or means other things by it"),
    ] = None
    features: Annotated[
        list[str],
        Key(
            "virtio features not to offer, e.g. -CTRL_VQ,-STATUS; without -, to offer all the same"
        ),
    ] = []  # noqa: RUF012 - a model has a copy of it
    worker: Annotated[
        int | None, Key("worker that polls all of its queues, from 0", 0, WORKERS_MAX - 1)
    ] = None
    static_macs: Annotated[
        list[str],
        Key("addresses that are behind it for good: 52:54:00:12:34:56, or with ` vlan 10`"),
    ] = []  # noqa: RUF012 - a model has a copy of it


class UplinkKeys(_Keys):
    """An `[uplink]`, besides `RuntimeKeys`."""

    type: Annotated[UplinkKind, Key("kind of uplink")] = "tap"
    name: Annotated[str, Key("interface name, unique among ports and uplinks")]
    mtu: Annotated[int | None, Key("MTU to set on the interface, in bytes", MTU_MIN, MTU_MAX)] = (
        None
    )
    bridge: Annotated[str | None, Key("Linux bridge that the interface joins")] = None
    offloads: Annotated[
        OffloadSetting,
        Key("offloads left to the kernel: on, off, or some of " + ",".join(OFFLOADS)),
    ] = True
    static_macs: Annotated[
        list[str],
        Key("addresses that are behind it for good: 52:54:00:12:34:56, or with ` vlan 10`"),
    ] = []  # noqa: RUF012 - a model has a copy of it


class NetworkKeys(_Keys):
    """A `[[network]]`: a broadcast domain of its own."""

    name: Annotated[str, Key("unique among networks")]
    learning: Annotated[bool, Key("learn where addresses are; without, it is a hub")] = True
    mac_aging_s: Annotated[
        int | None,
        Key("seconds until a silent MAC is forgotten; default: [switch]'s", 0, AGING_MAX_S),
    ] = None
    fdb_size: Annotated[
        int | None, Key("most MAC addresses kept; default: [switch]'s", FDB_SIZE_MIN, MACS_MAX)
    ] = None


class LinkKeys(_Keys):
    """A `[[link]]`: a cable between two ports, either of which may be an uplink."""

    name: Annotated[str | None, Key("unique among links; default: its ends")] = None
    ports: Annotated[list[str], Key("its two ends, by their names")]


class RuntimeKeys(_Keys):
    """What a port and an uplink can be told while they run (`set_port`), too; None: as if never."""

    network: Annotated[str | None, Key(f"network that it is in; default: {DEFAULT_NETWORK}")] = None
    max_macs: Annotated[int | None, Key("most MAC addresses learned from it", 1, MACS_MAX)] = None
    storm_broadcast: Annotated[
        int | None, Key("broadcast frames a second that it may send", 1, STORM_RATE_MAX)
    ] = None
    storm_multicast: Annotated[
        int | None, Key("multicast frames a second that it may send", 1, STORM_RATE_MAX)
    ] = None
    storm_unknown: Annotated[
        int | None, Key("frames a second to unknown addresses that it may send", 1, STORM_RATE_MAX)
    ] = None
    storm_burst: Annotated[
        int | None, Key("frames at once within these rates", 1, STORM_RATE_MAX)
    ] = None


RUNTIME_KEYS = tuple(RuntimeKeys.__annotations__)
LIMIT_KEYS = tuple(name for name in RUNTIME_KEYS if name != "network")


def rows(table: type[_Keys]) -> Mapping[str, Row]:
    """The keys that a class declares, by name."""
    found = {}
    for name, hint in get_type_hints(table, include_extras=True).items():
        kind, key = get_args(hint)
        found[name] = Row(name, kind, getattr(table, name, None), key)
    return found
