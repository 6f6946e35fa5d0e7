"""An uplink's port: a TAP interface of the host in the fast path."""

from __future__ import annotations

import logging

from vswitch.api import PortInfo, PortState
from vswitch.config.settings import UplinkSettings
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.port import Port
from vswitch.host.tap import Tap, link_state
from vswitch.ports import limits
from vswitch.ports.ethernet import ETH_OVERHEAD

log = logging.getLogger("vswitch.uplink")


class TapPort:
    """One `[uplink]`; owns its TAP."""

    def __init__(self, settings: UplinkSettings, tap: Tap, engine: Engine, port: Port) -> None:
        self.settings = settings
        self.fast = port
        self._fdb = engine.fdb
        limits.apply(settings, port, self._fdb)
        self._tap = tap
        port.offloads = tap.offloads
        self._lost = False
        self._mtu = tap.mtu
        self.check()
        if tap.warning:
            log.warning('uplink "%s": %s', settings.name, tap.warning)

    @property
    def name(self) -> str:
        return self.settings.name

    def check(self) -> None:
        """Once a second: follow the interface's MTU, which anybody may change."""
        state = link_state(self._tap.name)
        if state is not None:
            self._mtu = state[1]
        self.fast.max_len = self._mtu + ETH_OVERHEAD

    def change(self, changes: dict[str, int | None]) -> None:
        """Go on with other limits."""
        self.settings = self.settings.model_copy(update=changes)
        limits.apply(self.settings, self.fast, self._fdb)

    def close(self) -> None:
        """Close the TAP; no worker may be using it any more."""
        self._tap.close()

    def lost(self) -> str:
        """The interface was deleted under us; returns what to tell people."""
        self._lost = True
        return self._lost_text

    @property
    def _lost_text(self) -> str:
        return (
            f"interface {self._tap.name} was deleted; to have it back: "
            f"vswitchctl uplink del {self.name}, vswitchctl uplink add {self.name}"
        )

    @property
    def state(self) -> PortState:
        if self._lost:
            return "fault"
        state = link_state(self._tap.name)
        return "up" if state is not None and state[0] else "down"

    def info(self) -> PortInfo:
        state = self.state
        warning = self._tap.warning
        if state == "down":
            warning = f"the interface is down; bring it up: ip link set {self._tap.name} up"
        return PortInfo(
            name=self.name,
            id=self.fast.id,
            kind="tap",
            state=state,
            link="up",
            socket=None,
            mode=None,
            queues=1,
            mtu=self._mtu,
            features=0,
            feature_names=[],
            protocol_features=0,
            protocol_feature_names=[],
            peer_pid=None,
            connects=0,
            connected_since=None,
            error=self._lost_text if self._lost else None,
            warning=warning if state != "fault" else None,
            macs=self._fdb.learned(self.fast.id),
            max_macs=limits.max_macs(self.settings, self._fdb),
            storm=limits.storm_info(self.settings),
            limits=limits.told(self.settings),
            memory=[],
            rings=[],
        )
