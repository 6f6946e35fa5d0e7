"""An uplink's port: a TAP interface of the host in the fast path."""

from __future__ import annotations

import logging
import os

from vswitch.api import Changes, PortInfo, PortState
from vswitch.config.settings import UplinkSettings
from vswitch.fastpath.main.port import Port
from vswitch.host.tap import Tap, link_state, open_tap
from vswitch.ports import limits, offloads
from vswitch.ports.ethernet import ETH_OVERHEAD
from vswitch.ports.kinds import Parts, register
from vswitch.ports.table import no_guests_port

log = logging.getLogger("vswitch.uplink")


class TapPort:
    """One `[uplink]`; owns its TAP."""

    def __init__(self, settings: UplinkSettings, tap: Tap, port: Port, parts: Parts) -> None:
        self.settings = settings
        self.fast = port
        self._parts = parts
        limits.apply(settings, port)
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

    async def open(self) -> None:
        await self._parts.handover.settle()
        log.info("uplink %s: %s", self.name, self.state)
        if error := self._parts.engine.uring_error:
            log.info(
                "uplink %s: each frame to it costs a system call, for the kernel gives no "
                "io_uring (%s)",
                self.name,
                os.strerror(error),
            )

    async def close(self) -> None:
        """Nobody is connected to a TAP but the host."""

    def free(self) -> None:
        self._tap.close()

    def forget(self) -> None:
        """The interface goes with its descriptor, or stays if it was there before."""

    def check(self) -> None:
        """Once a second: follow the interface's MTU, which anybody may change."""
        state = link_state(self._tap.name)
        if state is not None:
            self._mtu = state[1]
        self.fast.max_len = self._mtu + ETH_OVERHEAD

    def change(self, changes: Changes) -> None:
        """Go on with other limits."""
        self.settings = self.settings.model_copy(update=changes)
        limits.changed(self.settings, self.fast, changes)

    def check_memory(self) -> None:
        """Nobody shares memory with it."""

    async def set_link(self, up: bool) -> bool:  # noqa: ARG002
        raise no_guests_port(self.name)

    def hear(self, event: str, value: int) -> None:  # noqa: ARG002
        if event == "tap-lost":
            self._lost = True
            log.error("uplink %s: %s", self.name, self._lost_text)
            self._parts.notify(self.name, "port-fault", self._lost_text)

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
        macs, max_macs = limits.macs(self.settings, self.fast)
        warning = self._tap.warning
        if state == "down":
            warning = f"the interface is down; bring it up: ip link set {self._tap.name} up"
        return PortInfo(
            name=self.name,
            id=self.fast.id,
            kind=self.settings.kind,
            state=state,
            link="up",
            network=None if self.fast.network is None else self.fast.network.name,
            peer=None if self.fast.peer is None else self.fast.peer.name,
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
            macs=macs,
            max_macs=max_macs,
            storm=limits.storm_info(self.settings),
            limits=limits.told(self.settings),
            memory=[],
            rings=[],
        )


@register("tap", fdb_share=2)  # behind an uplink there is a network
def make(settings: UplinkSettings, parts: Parts) -> TapPort:
    """Open the interface, or make it. Raises UplinkError."""
    tap = open_tap(
        settings.name,
        mtu=settings.mtu,
        bridge=settings.bridge,
        offloads=offloads.mask(settings.offloads),
    )
    try:
        return TapPort(settings, tap, parts.join(settings, tap.fd), parts)
    except BaseException:
        tap.close()
        raise
