"""Parameters of the methods of the control socket, and what makes them of what came."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from vswitch.api import PAGE_MAX, EventName
from vswitch.config.checks import MAC, VLAN_MAX, bad, spelled_mac, why_no_station
from vswitch.config.keys import LogLevel, RuntimeKeys
from vswitch.config.read import problems_of
from vswitch.control.protocol import PROTOCOL_VERSION
from vswitch.errors import ConfigError

_PROBLEMS_MAX = 16  # told of one request
_P = TypeVar("_P", bound=BaseModel)


def _check_mac(value: str) -> str:
    """A unicast MAC address in lower case with colons."""
    if not re.fullmatch(MAC, value):
        raise bad("must be a MAC address such as 52:54:00:12:34:56")
    mac = spelled_mac(value)
    if (why := why_no_station(mac)) is not None:
        raise bad(why)
    return mac


Mac = Annotated[str, AfterValidator(_check_mac)]
Vlan = Annotated[int, Field(ge=0, le=VLAN_MAX)]


class _Params(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class NoParams(_Params):
    """For methods without parameters."""


class HelloParams(_Params):
    """`protocol` is the version the client speaks, `client` who it is, for the log."""

    protocol: int = PROTOCOL_VERSION
    client: str = Field(default="", max_length=200)


class NameParams(_Params):
    """A port's or uplink's name."""

    name: str


class PageParams(_Params):
    """`limit`: answer with a page of so many elements at most; `after`: the `next` of the last one.

    Without `limit` the answer is all there is.
    """

    after: Annotated[int, Field(ge=0, lt=2**53)] = 0
    limit: Annotated[int, Field(ge=1, le=PAGE_MAX)] | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.after and self.limit is None:
            raise PydanticCustomError("vswitch", "`after` goes with `limit`, which is missing")
        return self


class StatsParams(PageParams):
    """A port's or uplink's name; all of them without."""

    name: str | None = None


class MaybePortParams(_Params):
    """A port's or uplink's name; all of them without."""

    port: str | None = None


class SetLinkParams(_Params):
    """A port's name and whether its link is to be up."""

    name: str
    up: bool


class SetPortParams(RuntimeKeys, _Params):
    """A port's or uplink's name and what changes; nil for the default, keys not named stay."""

    name: str


class WorkerPinParams(_Params):
    """A port's name and the worker for its queues; none to let the switch choose again."""

    port: str
    worker: int | None = None


class FdbParams(PageParams):
    """A network's name; all of them without."""

    network: str | None = None


class FdbFlushParams(MaybePortParams):
    """A port's or uplink's name, or a network's; all of them without."""

    network: str | None = None


class FdbKeyParams(_Params):
    """An address in a VLAN, and its network; without, the only one that has it."""

    mac: Mac
    vlan: Vlan = 0
    network: str | None = None


class FdbAddParams(_Params):
    """An address in a VLAN and the port it is behind."""

    mac: Mac
    vlan: Vlan = 0
    port: str


class LogLevelParams(_Params):
    """The level to set; none to ask."""

    level: LogLevel | None = None


class SaveParams(_Params):
    """The file to write, an absolute path; the one the switch was started with if none.

    `force`: whatever is there now.
    """

    path: str | None = Field(default=None, max_length=4095)
    force: bool = False


class SubscribeParams(_Params):
    """Names of events; all of them without."""

    events: list[EventName] | None = None


def checked(method: str, model: type[_P], params: Mapping[str, Any]) -> _P:
    """The parameters of a request, or ConfigError (`invalid-params`) with all that is wrong."""
    # Each unknown key is compared with the known ones, to guess what was meant.
    unknown = [key for key in params if key not in model.model_fields]
    left_out = frozenset(unknown[_PROBLEMS_MAX:])
    try:
        return model.model_validate({k: v for k, v in params.items() if k not in left_out})
    except ValidationError as exc:
        problems = problems_of(exc, model, "", most=_PROBLEMS_MAX)
        lines = [f"{method}: {problem}" for problem in problems]
        more = exc.error_count() - len(problems) + len(left_out)
        if more:
            lines.append(f"{method}: and {more} more")
        raise ConfigError("\n".join(lines), code="invalid-params") from exc
