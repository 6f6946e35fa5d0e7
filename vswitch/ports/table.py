"""The ports of a switch: by name, by number, and page by page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TypeVar

from vswitch.api import Page
from vswitch.config.relations import same_file_key
from vswitch.config.settings import AnySettings
from vswitch.errors import ExistsError, NotFoundError
from vswitch.fastpath.main.port import Port
from vswitch.ports import pages
from vswitch.ports.kinds import SwitchPort

T = TypeVar("T")

PORT_WEIGHT = 8
"""What a port takes on a page, in elements; each ring and region takes one more."""


class PortTable:
    """All ports of a switch, in the order in which they were added.

    `control` is the path of its control socket, which is no port's.
    """

    def __init__(self, control: Path | None) -> None:
        self._sockets: dict[str, str] = {}
        """Whose each socket is, by where its path led when it was opened."""
        self._socket_keys: dict[str, str] = {}
        """The same of each port: no other is looked at when one is added."""
        if control is not None:
            self._sockets[same_file_key(control)] = "switch.control"
        self._ports: dict[str, SwitchPort] = {}
        self._by_id: dict[int, SwitchPort] = {}
        self._serials: dict[str, int] = {}
        self._next_serial = count(1)

    def __iter__(self) -> Iterator[SwitchPort]:
        """Those that are there now, whoever comes or goes meanwhile."""
        return iter(list(self._ports.values()))

    def __len__(self) -> int:
        return len(self._ports)

    def enter(self, port: SwitchPort) -> None:
        self._ports[port.name] = port
        self._serials[port.name] = next(self._next_serial)
        self._by_id[port.fast.id] = port
        if (socket := _socket_of(port.settings)) is not None:
            key = self._socket_keys[port.name] = same_file_key(socket)
            self._sockets[key] = f'port "{port.name}"'

    def remove(self, port: SwitchPort) -> None:
        self._by_id.pop(port.fast.id, None)
        self._ports.pop(port.name, None)
        self._serials.pop(port.name, None)
        if (key := self._socket_keys.pop(port.name, None)) is not None:
            del self._sockets[key]

    def by_id(self, number: int) -> SwitchPort | None:
        """The port with a number of the engine's; None for one that is just being removed."""
        return self._by_id.get(number)

    def fast(self, name: str) -> Port | None:
        """The fast path's port of this name, None if there is none."""
        port = self._ports.get(name)
        return None if port is None else port.fast

    def find(self, name: str) -> SwitchPort:
        """Raises NotFoundError."""
        try:
            return self._ports[name]
        except KeyError:
            raise NotFoundError(
                f'there is no port or uplink "{name}"', hint="vswitchctl list-ports lists them"
            ) from None

    def guest(self, name: str) -> SwitchPort:
        """A `[[port]]`. Raises NotFoundError."""
        port = self.find(name)
        if port.settings.table != "ports":
            raise no_guests_port(name)
        return port

    def uplink(self, name: str) -> SwitchPort:
        """An `[uplink]`. Raises NotFoundError."""
        port = self.find(name)
        if port.settings.table != "uplinks":
            raise NotFoundError(
                f'"{name}" is a port, not an uplink', hint=f"vswitchctl del-port {name}"
            )
        return port

    def check_free(self, new: AnySettings) -> None:
        """Raise ExistsError if the name or the socket is in use."""
        if new.name in self._ports:
            raise ExistsError(
                f'there is a port or uplink "{new.name}" already', hint="choose another name"
            )
        socket = _socket_of(new)
        if socket is not None and (owner := self._sockets.get(same_file_key(socket))) is not None:
            raise ExistsError(
                f'port "{new.name}": socket {socket} is already the socket of {owner}',
                hint="choose another path",
            )

    def page(self, after: int, most: int, one: Callable[[SwitchPort], tuple[T, int]]) -> Page[T]:
        """What `one` makes of each port, from the one on that was added after number `after`.

        It also says what that weighs: a page is full with `most` of them, or PAGE_MAX of weight.
        """
        rows = ((self._serials[name], port) for name, port in self._ports.items())
        return pages.page(rows, after, most, one)


def _socket_of(settings: AnySettings) -> Path | None:
    """The path of a kind that has a socket."""
    return getattr(settings, "socket", None)


def no_guests_port(name: str) -> NotFoundError:
    """What cannot be done to an uplink."""
    return NotFoundError(
        f'"{name}" is an uplink, not a guest\'s port',
        hint="uplinks are changed with `vswitchctl uplink` and `ip link`",
    )
