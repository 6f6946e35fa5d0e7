"""What can be configured: the switch, its ports and its uplinks as validated, frozen values.

The same models check a TOML file (`vswitch.config.read`) and the parameters that come over the
control socket, so that both accept the same values and complain in the same words.
"""

from __future__ import annotations

import difflib
import grp
import os
import pwd
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from vswitch.bounds import MTU_MAX, MTU_MIN, QUEUE_PAIRS_MAX, WORKERS_MAX
from vswitch.config import feature_names
from vswitch.config.feature_names import Frontend

SUN_PATH_LEN_MAX = 107
"""Bytes of a Unix socket's path: `sun_path` has 108 with the terminating NUL."""
INTERFACE_NAME_LEN_MAX = 15
"""Bytes of an interface's name: IFNAMSIZ is 16 with the terminating NUL."""
CPU_MAX = 1023

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_OCTAL = re.compile(r"0?[0-7]{3}")

OFFLOADS = ("csum", "tso4", "tso6", "ecn", "uso", "ufo")
"""What `offloads` can name. All but csum rest on csum (VIRTIO 1.2, 5.1.3.1)."""

OffloadSetting = bool | list[str]
"""True: all, False: none, or those named."""

Mode = Literal["server", "client"]
Polling = Literal["adaptive", "busy", "sleep"]
LogLevel = Literal["debug", "info", "warning", "error"]


def _bad(reason: str) -> PydanticCustomError:
    # A brace in the text would be taken for a placeholder.
    return PydanticCustomError("vswitch", reason.replace("{", "(").replace("}", ")"))


def check_name(value: str) -> str:
    """A port's, uplink's or switch's name: 1 to 32 of letters, digits, `_`, `.` and `-`."""
    if not value:
        raise _bad("must not be empty")
    if len(value) > 32:
        raise _bad(f"has {len(value)} characters, 32 are allowed")
    if not _NAME.fullmatch(value):
        raise _bad("may contain only letters, digits, '_', '.' and '-'")
    return value


def check_interface_name(value: str) -> str:
    """A network interface's name as the kernel takes it, without its `%d` patterns."""
    check_name(value)
    if len(value) > INTERFACE_NAME_LEN_MAX:
        raise _bad(
            f"has {len(value)} characters, an interface name has at most {INTERFACE_NAME_LEN_MAX}"
        )
    if value in (".", ".."):
        raise _bad("is not a possible interface name")
    return value


def _path_from_text(value: object, info: ValidationInfo) -> Path:
    """Resolve a socket path against the context's `base` directory and check its length."""
    if not isinstance(value, (str, Path)):
        raise _bad("must be a path in quotes")
    text = str(value)
    if not text:
        raise _bad("must not be empty")
    if "\0" in text:
        raise _bad("contains a NUL byte")
    path = Path(text)
    if not path.is_absolute():
        base = (info.context or {}).get("base")
        if base is None:
            raise _bad("must be an absolute path")
        path = Path(base) / path
    try:
        len_bytes = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise _bad("contains characters that a path cannot have") from None
    if len_bytes > SUN_PATH_LEN_MAX:
        whole = "" if text == str(path) else f" as '{path}'"
        raise _bad(
            f"is {len_bytes} bytes long{whole}, a Unix socket path has at most {SUN_PATH_LEN_MAX}"
        )
    return path


def check_permissions(value: str) -> str:
    """An octal mode such as "0660"; no more than the nine permission bits."""
    if not _OCTAL.fullmatch(value):
        raise _bad('must be three octal digits in quotes such as "0660"')
    return value


def find_uid(owner: str) -> int | None:
    """The uid of a user given by name or number; None if there is no such user."""
    if owner.isascii() and owner.isdigit():
        return int(owner) if int(owner) < 2**32 - 1 else None
    try:
        return pwd.getpwnam(owner).pw_uid
    except (KeyError, ValueError):
        return None


def find_gid(group: str) -> int | None:
    """The gid of a group given by name or number; None if there is no such group."""
    if group.isascii() and group.isdigit():
        return int(group) if int(group) < 2**32 - 1 else None
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        return None


def _check_owner(value: str) -> str:
    if find_uid(value) is None:
        raise _bad("no such user on this machine")
    return value


def _check_group(value: str) -> str:
    if find_gid(value) is None:
        raise _bad("no such group on this machine")
    return value


def _check_cpu(value: int) -> int:
    if not 0 <= value <= CPU_MAX:
        raise _bad(f"must be a CPU number from 0 to {CPU_MAX}")
    return value


def _check_offloads(value: object) -> OffloadSetting:
    names = ", ".join(f'"{name}"' for name in OFFLOADS)
    if isinstance(value, bool):
        return value
    if not isinstance(value, list):
        raise _bad(f"must be true, false or a list of {names}")
    for name in value:
        if name not in OFFLOADS:
            raise _bad(f"names no offload with {name!r}; there are {names}")
    if len(set(value)) != len(value):
        raise _bad("names an offload twice")
    if value and "csum" not in value:
        raise _bad(f'must have "csum" as well: {value[0]} is not possible without')
    return value


def _check_features(words: object, info: ValidationInfo) -> list[str]:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise _bad('must be a list of features such as "-CTRL_VQ"')
    for word in words:
        name = word.removeprefix("-")
        known = (*feature_names.OFFERED, *feature_names.NEVER_OFFERED)
        if name not in known:
            close = difflib.get_close_matches(name.upper(), known, n=1)
            raise _bad(
                f"names no feature with {word!r}"
                + (f" (did you mean {word[: -len(name)] + close[0]!r}?)" if close else "")
                + "; docs/compatibility.md has them all"
            )
        if word == name and name in feature_names.NEVER_OFFERED:
            raise _bad(f"{name} is not offered by any port")
        if word == name and name in feature_names.OF_OFFLOADS:
            raise _bad(f"{name} is for `offloads` to offer; only -{name} can stand here")
    names = [word.removeprefix("-") for word in words]
    if len(set(names)) != len(names):
        raise _bad("names a feature twice")
    gone = feature_names.withheld(info.data.get("frontend"), words)
    for name in gone.intersection(words):
        raise _bad(f"{name} rests on {feature_names.missing(name, gone)}, which is not offered")
    return words


Features = Annotated[list[str], PlainValidator(_check_features)]
Offloads = Annotated[OffloadSetting, PlainValidator(_check_offloads)]
Name = Annotated[str, AfterValidator(check_name)]
InterfaceName = Annotated[str, AfterValidator(check_interface_name)]
SocketPath = Annotated[Path, BeforeValidator(_path_from_text)]
Permissions = Annotated[str, AfterValidator(check_permissions)]
Owner = Annotated[str, AfterValidator(_check_owner)]
Group = Annotated[str, AfterValidator(_check_group)]
Cpu = Annotated[int, AfterValidator(_check_cpu)]
Mtu = Annotated[int, Field(ge=MTU_MIN, le=MTU_MAX)]
MacLimit = Annotated[int, Field(ge=1, le=1_048_576)]
WorkerNumber = Annotated[int, Field(ge=0, le=WORKERS_MAX - 1)]
StormRate = Annotated[int, Field(ge=1, le=10_000_000)]


class _Model(BaseModel):
    # Strict: a quoted number or `1.0` queues is a mistake to report, not one to guess around.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SwitchSettings(_Model):
    """The `[switch]` table."""

    name: Name = Field(
        default="vswitch", description="name of the switch, shown in logs and by clients"
    )
    user: Owner | None = Field(
        default=None, description="user to run as once root has started the switch"
    )
    group: Group | None = Field(default=None, description="group to run as; default: the user's")
    control: SocketPath | None = Field(
        default=None, description="control socket path; default by user"
    )
    control_group: Group | None = Field(default=None, description="group of the control socket")
    control_permissions: Permissions | None = Field(
        default=None, description='octal permissions of the control socket, "0600" if not given'
    )
    workers: int = Field(default=1, ge=1, le=WORKERS_MAX, description="poll threads")
    cpus: list[Cpu] | None = Field(
        default=None, description="CPU to pin each worker to, one per worker"
    )
    polling: Polling = Field(default="adaptive", description="what a worker does without work")
    idle_us: int = Field(
        default=50,
        ge=0,
        le=1_000_000,
        description="microseconds without work before a worker sleeps",
    )
    mac_aging_s: int = Field(
        default=300,
        ge=0,
        le=1_000_000,
        description="seconds until a silent MAC is forgotten, 0 = never",
    )
    fdb_size: int = Field(default=65536, ge=16, le=1_048_576, description="most MAC addresses kept")
    log_level: LogLevel = Field(default="info", description="least level that is logged")

    @field_validator("group")
    @classmethod
    def _group_of_a_user(cls, group: str | None, info: ValidationInfo) -> str | None:
        if group is not None and info.data.get("user", "") is None:
            raise _bad("goes with `user`, which is missing")
        return group

    @field_validator("cpus")
    @classmethod
    def _one_cpu_per_worker(cls, cpus: list[int] | None, info: ValidationInfo) -> list[int] | None:
        workers = info.data.get("workers")
        if cpus is not None:
            if workers is not None and len(cpus) != workers:
                raise _bad(f"must name one CPU per worker: {len(cpus)} for workers = {workers}")
            if len(set(cpus)) != len(cpus):
                raise _bad("names a CPU twice")
        return cpus


StormBroadcast = Annotated[
    StormRate | None, Field(description="broadcast frames a second that it may send")
]
StormMulticast = Annotated[
    StormRate | None, Field(description="multicast frames a second that it may send")
]
StormUnknown = Annotated[
    StormRate | None, Field(description="frames a second to unknown addresses that it may send")
]
StormBurst = Annotated[
    StormRate | None,
    Field(description="frames at once within these rates, those of 0.1 s if not given"),
]


class PortSettings(_Model):
    """One `[[port]]` table: a vhost-user socket that a frontend is connected through."""

    name: Name = Field(description="unique among ports and uplinks")
    socket: SocketPath = Field(description="absolute path of the vhost-user socket")
    mode: Mode = Field(
        default="server", description="server: the switch listens; client: it connects"
    )
    owner: Owner | None = Field(default=None, description="user who owns the socket (server mode)")
    group: Group | None = Field(default=None, description="group of the socket (server mode)")
    permissions: Permissions | None = Field(
        default=None, description='octal permissions of the socket such as "0660" (server mode)'
    )
    queues: int = Field(default=1, ge=1, le=QUEUE_PAIRS_MAX, description="most queue pairs")
    mtu: Mtu | None = Field(
        default=None, description="largest MTU that the guest may use, in bytes; not told to it"
    )
    offloads: Offloads = Field(
        default=True, description="checksum and segmentation offloads offered to the guest"
    )
    frontend: Frontend | None = Field(
        default=None,
        description="frontend that needs another offer than others",
    )
    features: Features = Field(
        default=[], description="virtio features not to offer, as -NAME, or to offer all the same"
    )
    worker: WorkerNumber | None = Field(
        default=None, description="worker that polls all of its queues, counted from 0"
    )
    max_macs: MacLimit | None = Field(
        default=None,
        description="most MAC addresses learned from it, an eighth of fdb_size if not given",
    )
    storm_broadcast: StormBroadcast = None
    storm_multicast: StormMulticast = None
    storm_unknown: StormUnknown = None
    storm_burst: StormBurst = None

    @field_validator("owner", "group", "permissions")
    @classmethod
    def _ownership_is_for_servers(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("mode") == "client":
            raise _bad(
                'is for mode = "server" only: in client mode the frontend creates the socket'
            )
        return value

    @property
    def permission_bits(self) -> int | None:
        """`permissions` as a number, e.g. 0o660; None where the umask decides."""
        return None if self.permissions is None else int(self.permissions, 8)


class UplinkSettings(_Model):
    """One `[uplink]` table: a TAP interface that joins the switch to the host."""

    type: Literal["tap"] = Field(default="tap", description="kind of uplink")
    name: InterfaceName = Field(description="interface name, unique among ports and uplinks")
    mtu: Mtu | None = Field(default=None, description="MTU to set on the interface, in bytes")
    bridge: InterfaceName | None = Field(
        default=None, description="Linux bridge the interface joins"
    )
    offloads: Offloads = Field(
        default=True, description="checksum and segmentation offloads left to the kernel"
    )
    max_macs: MacLimit | None = Field(
        default=None,
        description="most MAC addresses learned from it, half of fdb_size if not given",
    )
    storm_broadcast: StormBroadcast = None
    storm_multicast: StormMulticast = None
    storm_unknown: StormUnknown = None
    storm_burst: StormBurst = None

    @field_validator("bridge")
    @classmethod
    def _not_its_own_bridge(cls, bridge: str | None, info: ValidationInfo) -> str | None:
        if bridge is not None and bridge == info.data.get("name"):
            raise _bad("must be another interface than the uplink itself")
        return bridge


class Settings(_Model):
    """A whole configuration: what a file says, or what runs now."""

    switch: SwitchSettings = SwitchSettings()
    ports: list[PortSettings] = []
    uplinks: list[UplinkSettings] = []

    @model_validator(mode="after")
    def _unique(self) -> Self:
        ports: list[dict[str, Any]] = [{"name": p.name, "socket": p.socket} for p in self.ports]
        uplinks: list[dict[str, Any]] = [{"name": u.name} for u in self.uplinks]
        clashes = find_clashes(self.switch.control, ports, uplinks)
        if clashes:
            raise _bad("; ".join(f"{kind}[{i}].{key} {why}" for kind, i, key, why in clashes))
        for i, port in enumerate(self.ports, 1):
            if (reason := no_such_worker(port.worker, self.switch)) is not None:
                raise _bad(f"port[{i}].worker {reason}")
        return self


def no_such_worker(number: int | None, switch: SwitchSettings) -> str | None:
    """Why a port cannot have this worker; None if it can."""
    if number is None or number < switch.workers:
        return None
    return f"must be below {switch.workers}, the number of workers in [switch]"


Clash = tuple[Literal["port", "uplink"], int, str, str]
"""Table kind, position counted from 1, key, reason."""


def find_clashes(
    control: Path | None, ports: list[dict[str, Any]], uplinks: list[dict[str, Any]]
) -> list[Clash]:
    """Names and sockets used twice, among tables whose other keys need not be valid.

    Each element of `ports` and `uplinks` holds `name` and `socket` as far as they are usable
    (missing otherwise); sockets are absolute paths.
    """
    clashes: list[Clash] = []
    names: dict[str, str] = {}
    sockets: dict[str, str] = {}
    if control is not None:
        sockets[_same_file_key(control)] = "switch.control"
    for i, port in enumerate(ports, 1):
        name, socket = port.get("name"), port.get("socket")
        if name is not None:
            if name in names:
                clashes.append(("port", i, "name", f"is already the name of {names[name]}"))
            else:
                names[name] = f"port[{i}]"
        if socket is not None:
            key = _same_file_key(socket)
            if key in sockets:
                clashes.append(("port", i, "socket", f"is already the socket of {sockets[key]}"))
            else:
                sockets[key] = f'port "{name}"' if name is not None else f"port[{i}]"
    for i, uplink in enumerate(uplinks, 1):
        name = uplink.get("name")
        if name is None:
            continue
        if name in names:
            clashes.append(("uplink", i, "name", f"is already the name of {names[name]}"))
        else:
            names[name] = f"uplink[{i}]"
    return clashes


def _same_file_key(path: Path) -> str:
    """Equal for two spellings of one path (`//`, `..`, links among its directories)."""
    return os.path.join(os.path.realpath(path.parent), path.name)  # noqa: PTH118
