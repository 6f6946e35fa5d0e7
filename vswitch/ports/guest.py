"""A guest's port: its socket, its present frontend and what becomes of both."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal, cast

from vswitch.api import Changes, EventName, MemoryRegion, PortInfo, PortState, RingInfo
from vswitch.config.settings import PortSettings
from vswitch.dataplane import addresses
from vswitch.dataplane.handover import HandOver
from vswitch.errors import ProtocolError
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.port import MAX_VRINGS, Port
from vswitch.fastpath.main.ring import Ring
from vswitch.ports import features, limits
from vswitch.ports.datapath import PortDatapath
from vswitch.ports.diagnosis import PortDiagnosis
from vswitch.ports.health import Notify, PortHealth
from vswitch.ports.journals import Journals
from vswitch.ports.kinds import Parts, register
from vswitch.ports.ring import GuestRing
from vswitch.relay.process import Relay
from vswitch.vhost_user.connection import Connection
from vswitch.vhost_user.endpoint import Connector, Endpoint, Listener
from vswitch.vhost_user.frontend import Frontend
from vswitch.vhost_user.net import NetBackend
from vswitch.vhost_user.protocol import Feature, ProtocolFeature

log = logging.getLogger("vswitch.port")


class VhostPort:
    """One `[[port]]`: has a socket, a datapath with its guest's memory and rings, and a health.

    Its socket is `relay`'s. `choose` names the worker for a ring, `notify` hears of the port's
    events. One of `journals` is its rings', so that these survive a restart.
    """

    def __init__(
        self,
        settings: PortSettings,
        engine: Engine,
        port: Port,
        relay: Relay,
        handover: HandOver,
        choose: Callable[[Ring], int],
        notify: Notify,
        journals: Journals | None = None,
    ) -> None:
        self.fast = port
        self._engine = engine
        self._notify = notify
        self._backend: Frontend | None = None
        self._diagnosis = PortDiagnosis(settings)
        self._health = PortHealth(settings.name, notify)
        self.datapath = PortDatapath(
            settings, engine, port, handover, choose, self._health, lambda: self._backend,
            self._diagnosis.of_fault, self._rings_changed,
        )  # fmt: skip
        self._rings = self.datapath.rings
        self._journals = journals
        self._endpoint: Endpoint
        if settings.mode == "server":
            self._endpoint = Listener(
                relay,
                settings.socket,
                mode=settings.permission_bits,
                owner=settings.owner,
                group=settings.group,
            )
        else:
            self._endpoint = Connector(relay, settings.socket)
        self._task: asyncio.Task[None] | None = None
        self._connects = 0
        self._connected_at: float | None = None
        self._was_ready = False
        self._problem_logged: str | None = None
        limits.apply(settings, port)

    @property
    def settings(self) -> PortSettings:
        return self.datapath.settings

    @settings.setter
    def settings(self, settings: PortSettings) -> None:
        self.datapath.settings = settings

    @property
    def name(self) -> str:
        return self.settings.name

    # Life

    async def open(self) -> None:
        """Listen, or begin to connect. Raises SocketError."""
        self._endpoint.open()
        if self._journals is not None:
            # Not before: a port that cannot be opened leaves none behind.
            journal = self._journals.open(self.name, MAX_VRINGS, 2 * self.settings.queues)
            if journal is not None:
                self.fast.use_journal(journal)
        self._diagnosis.opened()
        self._task = asyncio.create_task(self._serve_for_ever(), name=f"port {self.name}")
        log.info("port %s: %s %s", self.name, self.state, self.settings.socket)

    async def close(self) -> None:
        """Disconnect the frontend, free its memory and close the socket."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._endpoint.close()

    def free(self) -> None:
        """Its frontend's end, in `close`, left nothing that workers use."""

    def forget(self) -> None:
        if self._journals is not None:
            self._journals.forget(self.name)

    def hear(self, event: str, value: int) -> None:
        if event == "ring-fault":
            self.ring_fault(value)
        elif event == "iotlb-miss":
            self.iotlb_missed(value)

    def check(self) -> None:
        """Once a second: notice what happens to the socket and say it once.

        And find rings that are at fault although their worker's event was lost.
        """
        self._rings.check()
        if self._backend is None:
            self._endpoint.check()
            problem = self._endpoint.problem
            if problem != self._problem_logged and problem is not None:
                log.warning("port %s: %s", self.name, problem)
            self._problem_logged = problem
        self._diagnosis.check()

    async def _serve_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._diagnosis.pause_s)
            connection = Connection(await self._endpoint.next())
            try:
                await self._serve(connection)
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("port %s: internal error, frontend disconnected", self.name)
            finally:
                connection.close()

    async def _serve(self, connection: Connection) -> None:
        """One frontend, from its connection to its end."""
        pid = connection.peer_pid
        backend = NetBackend(
            self.name,
            connection,
            self.datapath,
            self._rings_changed,
            withheld=features.withheld(self.settings),
            counts_virtqueues=self.settings.frontend in features.COUNT_VIRTQUEUES,
            translates=self.settings.frontend not in features.TRANSLATE_NOTHING,
        )
        self._backend = backend
        self._connects += 1
        self._connected_at = time.time()
        self._health.connected()
        self.datapath.connected()
        self._diagnosis.connected(backend)
        log.log(
            self._diagnosis.level,
            "port %s: frontend connected (pid %s)",
            self.name,
            pid or "unknown",
        )
        self._notify("port-connected", None)
        guard = asyncio.create_task(self._endpoint.guard(connection, self._refused))
        reason = "closed by the frontend"
        try:
            await backend.run()
        except ProtocolError as exc:
            reason = self._health.last_error = exc.message
            log.error("port %s: frontend disconnected: %s", self.name, exc.message)
        except asyncio.CancelledError:
            reason = "closed by the switch"
            raise
        finally:
            guard.cancel()
            # Its last act is to stop watching the listening socket, which `next` is to watch then.
            await asyncio.gather(guard, return_exceptions=True)
            self._backend = None
            self._connected_at = None
            self._was_ready = False
            self._health.disconnected()
            self.datapath.disconnected()
            await addresses.flush_port(self.fast)
            self._diagnosis.disconnected(self._health.last_error)
            log.log(self._diagnosis.level, "port %s: disconnected: %s", self.name, reason)
            self._notify("port-disconnected", reason)

    def _refused(self, pid: int | None) -> None:
        log.log(
            logging.DEBUG if self._diagnosis.is_pattern else logging.WARNING,
            "port %s: refused a second frontend (pid %s): one is connected already",
            self.name, pid or "unknown",
        )  # fmt: skip

    def change(self, changes: Changes) -> None:
        """Go on with other limits, or with another worker, which is the placement's to obey."""
        self.settings = self.settings.model_copy(update=changes)
        limits.changed(self.settings, self.fast, changes)

    @property
    def link(self) -> Literal["up", "down"]:
        """What `set_link` said."""
        return "down" if self.fast.link_down else "up"

    async def set_link(self, up: bool) -> bool:
        """Let frames through or not, whatever frontends say; whether that is news.

        While the link is down the port is to others as one that is down is in a bridge: what its
        guest sends is dropped, its learned addresses are forgotten, so that frames for them are
        flooded to the others, and what is for its static ones is dropped.
        """
        if self.link == ("up" if up else "down"):
            return False
        self.fast.link_down = not up
        await self._rings.set_link(up)
        if not up:
            # Its addresses are nobody's now: what is for them is flooded to the others.
            await addresses.flush_port(self.fast)
        self._rings_changed()
        return True

    # State

    def ring_fault(self, index: int) -> None:
        """A worker stopped a ring for what its driver did; the port is at fault until a reset."""
        self._rings.look_for_fault(index)

    def iotlb_missed(self, index: int) -> None:
        """A worker stopped at a buffer whose address is not translated."""
        self._rings.missed(index)

    def check_memory(self) -> None:
        """Some guest's memory was taken away; see whether it was this one's."""
        self._rings.check_memory()

    @property
    def state(self) -> PortState:
        if self._backend is None:
            return self._endpoint.waiting_state
        if self._health.fault is not None:
            return "fault"
        return "ready" if self._is_ready() else "connected"

    def info(self) -> PortInfo:
        backend = self._backend
        negotiated = backend.features if backend else Feature(0)
        protocol_features = backend.protocol_features if backend else ProtocolFeature(0)
        macs, max_macs = limits.macs(self.settings, self.fast)
        return PortInfo(
            name=self.name,
            id=self.fast.id,
            kind=self.settings.kind,
            state=self.state,
            link=self.link,
            network=None if self.fast.network is None else self.fast.network.name,
            peer=None if self.fast.peer is None else self.fast.peer.name,
            socket=str(self.settings.socket),
            mode=self.settings.mode,
            queues=self.settings.queues,
            mtu=self.settings.mtu,
            features=int(negotiated),
            feature_names=[str(f.name) for f in negotiated],
            frontend=self.settings.frontend,
            withheld=[str(f.name) for f in features.withheld(self.settings)],
            protocol_features=int(protocol_features),
            protocol_feature_names=[str(f.name) for f in protocol_features],
            peer_pid=backend.peer_pid if backend else None,
            connects=self._connects,
            connected_since=self._connected_at,
            error=self._error(),
            warning=self._health.warning or self._postcopy_note() or self._note(),
            macs=macs,
            max_macs=max_macs,
            storm=limits.storm_info(self.settings),
            limits=limits.told(self.settings),
            memory=self._memory_info(),
            rings=[
                _ring_info(ring)
                for _, ring in sorted(self._rings.by_index.items())
                if ring.setup is not None
            ],
        )

    def _postcopy_note(self) -> str | None:
        postcopy = self._rings.postcopy
        if postcopy is None or not postcopy.listening:
            return None
        if self._rings.iotlb is not None:
            return "the guest is in postcopy migration: behind an IOMMU its rings wait for the end"
        return (
            "the guest is in postcopy migration: "
            f"{postcopy.waited_for} pages of its memory are waited for"
        )

    def _note(self) -> str | None:
        """What the frontend did not get although the port forwards, or why none comes."""
        if self._backend is None:
            return self._diagnosis.nobody_may if self._endpoint.problem is None else None
        return self._diagnosis.reason if self._is_ready() else None

    def _error(self) -> str | None:
        if self._backend is None:
            return self._endpoint.problem or self._health.last_error or self._diagnosis.reason
        if self._health.fault is None and not self._is_ready():
            return self._diagnosis.reason
        return self._health.fault

    def _memory_info(self) -> list[MemoryRegion]:
        return [
            MemoryRegion(gpa=gpa, size=size, uva=uva, mmap_offset=offset)
            for gpa, size, uva, offset in self.datapath.memory.mapped.regions
        ]

    def _is_ready(self) -> bool:
        return any(ring.started and ring.enabled for ring in self.fast.rings.values())

    def _rings_changed(self) -> None:
        ready = self._is_ready()
        if any(ring.started for ring in self.fast.rings.values()):
            self._diagnosis.rings_run()
        if ready and not self._was_ready:
            log.info("port %s: ready", self.name)
            self._notify("port-ready", None)
        self._was_ready = ready


def _ring_info(ring: GuestRing) -> RingInfo:
    fast = ring.fast
    fault = fast.fault if fast.started else None
    return RingInfo(
        index=ring.index,
        type="transmitq" if fast.is_transmitq else "receiveq",
        size=ring.known_setup.size,
        started=ring.is_started,
        enabled=fast.enabled,
        avail_idx=fast.base & 0xFFFF,
        used_idx=fast.used_idx,
        fault=fault[1] if fault else None,
    )


@register("vhost-user", fdb_share=8)  # behind it there is a guest, and not a network
def make(settings: PortSettings, parts: Parts) -> VhostPort:
    """A port with the worker that it is pinned to, if it is. Raises NotFoundError."""
    parts.placement.check_worker(settings.worker)
    port = VhostPort(
        settings,
        parts.engine,
        parts.join(settings),
        parts.relay,
        parts.handover,
        parts.placement.choose,
        lambda event, reason: parts.notify(settings.name, cast(EventName, event), reason),
        parts.journals,
    )
    parts.placement.pin(settings.name, settings.worker)
    return port
