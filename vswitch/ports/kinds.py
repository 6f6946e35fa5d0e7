"""Kinds of ports: what each has to give, and which there are.

A kind has a word that settings say (`config/kind_names.py`) and a factory that is registered under
it. Nobody else knows kinds apart: the switch has ports, and what a kind does otherwise than others
is in the methods of its ports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from vswitch.api import Changes, EventName, PortInfo
from vswitch.config.settings import AnySettings
from vswitch.dataplane import addresses
from vswitch.dataplane.handover import HandOver
from vswitch.dataplane.placement import Placement
from vswitch.errors import VswitchError
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.port import Port
from vswitch.ports.cables import Cables
from vswitch.ports.journals import Journals
from vswitch.ports.networks import Networks
from vswitch.relay.process import Relay


class SwitchPort(Protocol):
    """A port of the switch, of whatever kind: made, opened, closed and freed, in this order."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> AnySettings:
        """What it was told, up to now. `settings.table` is the list that it belongs to."""
        ...

    @property
    def fast(self) -> Port:
        """The port as workers have it."""
        ...

    def info(self) -> PortInfo:
        """Itself in words, as `show` has it."""
        ...

    async def open(self) -> None:
        """Begin: frames may come from now on. It is in the switch's list already.

        Raises VswitchError; it is closed and freed then.
        """
        ...

    async def close(self) -> None:
        """Part from whoever is at the other end. Workers know the port still, if they run."""
        ...

    def free(self) -> None:
        """No worker knows it any more: close what they used."""
        ...

    def forget(self) -> None:
        """It was deleted, and not closed with the switch: nothing is kept for a successor."""
        ...

    def check(self) -> None:
        """Once a second: notice what nobody tells."""
        ...

    def check_memory(self) -> None:
        """Memory that somebody shared with the switch is gone: see whether it was this port's."""
        ...

    def hear(self, event: str, value: int) -> None:
        """A worker says something of this port: a word of `EVENT_NAMES`, and a vring's index.

        Addresses are not its concern; a kind ignores what it has no use for.
        """
        ...

    def change(self, changes: Changes) -> None:
        """Go on with other values of these settings: limits, and the worker where there is one.

        And the network, which it is in already.
        """
        ...

    async def set_link(self, up: bool) -> bool:
        """Let frames through or not; whether that is news.

        Raises NotFoundError for a kind whose link is somebody else's.
        """
        ...


Notify = Callable[[str, EventName, str | None], None]
"""Called with a port's name, an event and, for faults and disconnects, the reason."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a switch has for those who make its ports.

    Sockets are `relay`'s. `journals` is None where nothing is to survive the switch.
    """

    engine: Engine
    handover: HandOver
    networks: Networks
    cables: Cables
    placement: Placement
    relay: Relay
    journals: Journals | None
    notify: Notify

    def join(self, settings: AnySettings, tap_fd: int = -1) -> Port:
        """A port of the engine, `tap_fd` of which frames are read from, if it has one.

        It is in its network, or at the end of its cable. Workers see it after the next publish.
        Raises NotFoundError for an unknown network, ExistsError for a network at the end of a
        cable, and VswitchError when there are too many ports.
        """
        network = self.networks.find(settings.network)
        if settings.network is not None:
            self.cables.check_free(settings.name, "it can be in no network")
        try:
            port = self.engine.add_port(settings.name, tap_fd)
        except OSError as exc:
            raise VswitchError(f'port "{settings.name}": {exc}') from exc
        if not self.cables.plug(port):
            port.join(network.fast)
        return port

    async def leave(self, port: Port) -> None:
        """Take a port out of the engine and wait until no worker knows it."""
        # Both flush the FDB, which has little of the port any more: that takes turns.
        await addresses.flush_port(port, statics=True)
        self.engine.remove_port(port)
        self.cables.unplug(port)
        await self.handover.settle()
        await addresses.flush_port(port, statics=True)
        self.engine.forget(port)
        self.placement.forget(port)


Make = Callable[[Any, Parts], SwitchPort]
"""Makes a port of a kind's settings. Raises VswitchError, and then nothing is left."""

M = TypeVar("M", bound=Make)


class Kind(NamedTuple):
    """A row of the registry."""

    make: Make
    fdb_share: int
    """A port may fill one of so many parts of the FDB, unless `max_macs` says how much."""


_kinds: dict[str, Kind] = {}


def register(name: str, *, fdb_share: int) -> Callable[[M], M]:
    """A decorator for the factory of a kind."""

    def registered(make: M) -> M:
        assert name not in _kinds, f"there are two kinds {name}"
        _kinds[name] = Kind(make, fdb_share)
        return make

    return registered


def kind_of(settings: AnySettings) -> Kind:
    return _kinds[settings.kind]


def names() -> frozenset[str]:
    return frozenset(_kinds)
