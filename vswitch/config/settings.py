"""What can be configured: the switch, its ports and its uplinks as validated, frozen values.

The same models check a TOML file (`vswitch.config.read`) and the parameters that come over the
control socket, so that both accept the same values and complain in the same words.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vswitch.bounds import WORKERS_MAX
from vswitch.config import checks
from vswitch.config.checks import bad
from vswitch.config.keys import (
    AGING_MAX_S,
    FDB_SIZE_MIN,
    MACS_MAX,
    LinkKeys,
    LogLevel,
    NetworkKeys,
    PortKeys,
    RuntimeKeys,
    UplinkKeys,
)
from vswitch.config.kind_names import GuestKind, UplinkKind
from vswitch.config.relations import Tables, find_clashes

Polling = Literal["adaptive", "busy", "sleep"]
Table = Literal["networks", "ports", "uplinks", "links"]
"""The lists of `Settings`."""


Name = Annotated[str, AfterValidator(checks.check_name)]
SocketPath = Annotated[Path, BeforeValidator(checks.socket_path)]
Permissions = Annotated[str, AfterValidator(checks.check_permissions)]
Owner = Annotated[str, AfterValidator(checks.check_owner)]
Group = Annotated[str, AfterValidator(checks.check_group)]
Cpu = Annotated[int, AfterValidator(checks.check_cpu)]


def _if_told(check: Callable[[str], str]) -> Callable[[str | None], str | None]:
    """The same check for a key that may be None."""

    def checked(value: str | None) -> str | None:
        return None if value is None else check(value)

    return checked


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
        le=AGING_MAX_S,
        description="seconds until a silent MAC is forgotten, 0 = never",
    )
    fdb_size: int = Field(
        default=65536, ge=FDB_SIZE_MIN, le=MACS_MAX, description="most MAC addresses kept"
    )
    log_level: LogLevel = Field(default="info", description="least level that is logged")

    @field_validator("group")
    @classmethod
    def _group_of_a_user(cls, group: str | None, info: ValidationInfo) -> str | None:
        if group is not None and info.data.get("user", "") is None:
            raise bad("goes with `user`, which is missing")
        return group

    @field_validator("cpus")
    @classmethod
    def _one_cpu_per_worker(cls, cpus: list[int] | None, info: ValidationInfo) -> list[int] | None:
        workers = info.data.get("workers")
        if cpus is not None:
            if workers is not None and len(cpus) != workers:
                raise bad(f"must name one CPU per worker: {len(cpus)} for workers = {workers}")
            if len(set(cpus)) != len(cpus):
                raise bad("names a CPU twice")
        return cpus


class PortSettings(RuntimeKeys, PortKeys, _Model):
    """One `[[port]]` table: a vhost-user socket that a frontend is connected through."""

    table: ClassVar[Table] = "ports"

    _name = field_validator("name")(checks.check_name)
    _socket = field_validator("socket", mode="before")(checks.socket_path)
    _owner = field_validator("owner")(_if_told(checks.check_owner))
    _group = field_validator("group")(_if_told(checks.check_group))
    _permissions = field_validator("permissions")(_if_told(checks.check_permissions))
    _offloads = field_validator("offloads", mode="plain")(checks.check_offloads)
    _features = field_validator("features", mode="plain")(checks.check_features)
    _static_macs = field_validator("static_macs")(checks.check_static_macs)

    @field_validator("owner", "group", "permissions")
    @classmethod
    def _ownership_is_for_servers(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("mode") == "client":
            raise bad('is for mode = "server" only: in client mode the frontend creates the socket')
        return value

    @property
    def kind(self) -> GuestKind:
        return "vhost-user"

    @property
    def permission_bits(self) -> int | None:
        """`permissions` as a number, e.g. 0o660; None where the umask decides."""
        return None if self.permissions is None else int(self.permissions, 8)


class UplinkSettings(RuntimeKeys, UplinkKeys, _Model):
    """One `[uplink]` table: a TAP interface that joins the switch to the host."""

    table: ClassVar[Table] = "uplinks"

    _name = field_validator("name")(checks.check_interface_name)
    _bridge = field_validator("bridge")(_if_told(checks.check_interface_name))
    _offloads = field_validator("offloads", mode="plain")(checks.check_offloads)
    _static_macs = field_validator("static_macs")(checks.check_static_macs)

    @field_validator("bridge")
    @classmethod
    def _not_its_own_bridge(cls, bridge: str | None, info: ValidationInfo) -> str | None:
        if bridge is not None and bridge == info.data.get("name"):
            raise bad("must be another interface than the uplink itself")
        return bridge

    @property
    def kind(self) -> UplinkKind:
        return self.type


AnySettings = PortSettings | UplinkSettings
"""What a port of the switch is told. `kind` says what makes one of it, `table` where it belongs."""


class NetworkSettings(NetworkKeys, _Model):
    """One `[[network]]` table: a broadcast domain, with a table of addresses of its own."""

    table: ClassVar[Table] = "networks"

    _name = field_validator("name")(checks.check_name)


class LinkSettings(LinkKeys, _Model):
    """One `[[link]]` table: what enters one end leaves the other."""

    table: ClassVar[Table] = "links"

    _name = field_validator("name")(_if_told(checks.check_name))

    @field_validator("ports")
    @classmethod
    def _two_ends(cls, ports: list[str]) -> list[str]:
        if len(ports) != 2:
            raise bad("must be the names of its two ends")
        for name in ports:
            checks.check_name(name)
        if ports[0] == ports[1]:
            raise bad("has the same end twice")
        return ports

    @property
    def title(self) -> str:
        """Its name, or what it is called without."""
        return self.name or "--".join(self.ports)


class Settings(_Model):
    """A whole configuration: what a file says, or what runs now."""

    switch: SwitchSettings = SwitchSettings()
    networks: list[NetworkSettings] = []
    ports: list[PortSettings] = []
    uplinks: list[UplinkSettings] = []
    links: list[LinkSettings] = []

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        kinds = (self.ports, self.uplinks, self.networks, self.links)
        tables = Tables(*([dict(one) for one in some] for some in kinds))
        clashes = find_clashes(self.switch.control, self.switch.workers, tables)
        if clashes:
            raise bad("; ".join(f"{kind}[{i}].{key} {why}" for kind, i, key, why in clashes))
        return self
