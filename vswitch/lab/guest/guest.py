"""A guest without a virtual machine: memory, virtio-net driver and vhost-user frontend in one.

It speaks to any vhost-user-net backend. Used from one thread it is deterministic: nothing is sent,
received or posted but by the call that says so. With `start_responder` a thread answers pings.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from vswitch.lab.guest.backend_requests import BackendRequests
from vswitch.lab.guest.errors import BackendClosedError, GuestError
from vswitch.lab.guest.frontend import DEFAULT_TIMEOUT_S, Frontend, Listener
from vswitch.lab.guest.iommu import GPA_OFFSET, GuestIommu
from vswitch.lab.guest.memory import GuestMemory, Region, row
from vswitch.lab.guest.net_driver import AnyQueue, NetDriver
from vswitch.lab.guest.options import Wanted
from vswitch.lab.guest.packets import parse_mac
from vswitch.lab.guest.responder import Responder, ping
from vswitch.lab.guest.shapes import BufferOptions
from vswitch.lab.guest.stack import NetStack
from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import BackendRequest, Feature, ProtocolFeature, VringAddr

_WANTED = Wanted()
_BUFFERS = BufferOptions()


class SoftwareGuest(NetDriver):
    """One virtio-net interface on a vhost-user backend.

    mac: like "52:54:00:00:00:01". ip: IPv4 or IPv6 address to answer for; the link-local IPv6
        address is there anyway.
    queues: queue pairs; more than one asks for Feature.MQ.
    regions: a number from 1 to 8 (sizes are worked out) or the exact memory layout.
    spare_regions: memory for `plug`.
    iommu: all addresses are I/O virtual (ACCESS_PLATFORM), `iommu` translates them for the backend.
    strict: see ReceiveQueue; False for devices that are a little lax.
    polling: never sleep, ask the device for no notifications.
    """

    def __init__(
        self,
        mac: str,
        ip: str | None = None,
        wanted: Wanted = _WANTED,
        buffers: BufferOptions = _BUFFERS,
        *,
        queues: int = 1,
        regions: int | Sequence[Region] = 1,
        spare_regions: Sequence[Region] = (),
        iommu: bool = False,
        strict: bool = True,
        polling: bool = False,
    ) -> None:
        self.wanted = wanted.in_full(queues, iommu)
        if isinstance(regions, int):
            regions = buffers.layout(regions, self.wanted.features, queues)
        memory = GuestMemory(regions, spare_regions, GPA_OFFSET if iommu else 0)
        super().__init__(mac, memory, buffers, queues=queues, strict=strict, polling=polling)
        self.mac = parse_mac(mac)
        self.stack = NetStack(self.mac, ip)
        self.vring_errors: set[int] = set()
        """Vrings the backend has called broken by a message."""
        self._iommu = GuestIommu(memory) if iommu else None
        self._frontend: Frontend | None = None
        self._requests: BackendRequests | None = None
        self._listener: Listener | None = None
        self._path: str | Path | None = None
        self._responder: Responder | None = None

    @property
    def iommu(self) -> GuestIommu:
        """The guest's IOMMU. GuestError if it has none."""
        if self._iommu is None:
            raise GuestError(f"{self.name}: this guest has no IOMMU")
        return self._iommu

    # Connecting.

    @property
    def frontend(self) -> Frontend:
        """The protocol connection. GuestError while there is none."""
        if self._frontend is None:
            raise GuestError(f"{self.name}: this guest is not connected")
        return self._frontend

    @property
    def path(self) -> str:
        """The socket of the present or last connection."""
        if self._path is None:
            raise GuestError(f"{self.name}: this guest was never connected")
        return str(self._path)

    @property
    def connected(self) -> bool:
        """Whether there is a connection that the backend has not closed."""
        return self._frontend is not None and not self._frontend.closed_by_backend

    def connect(self, path: str | Path, timeout: float = DEFAULT_TIMEOUT_S) -> None:
        """Connect to a backend in server mode and start with fresh rings.

        An older connection is dropped first: backends take one frontend at a time.
        """
        self.drop()
        self._path = path
        self._start(Frontend.connect(path, timeout), fresh=True)

    def listen(self, path: str | Path) -> None:
        """Open a socket for a backend in client mode; `accept` goes on from there."""
        self._path = path
        self._listener = Listener(path)

    def accept(self, timeout: float = DEFAULT_TIMEOUT_S) -> None:
        """Wait for the backend to connect and start with fresh rings."""
        if self._listener is None:
            raise GuestError(f"{self.name}: this guest does not listen")
        self.drop()
        self._start(self._listener.accept(timeout), fresh=True)

    def reconnect(self, timeout: float = DEFAULT_TIMEOUT_S) -> None:
        """Get the backend back, in the way it was got before, and go on with the rings as they are.

        After `disconnect` the backend resumes where it said it stopped; after it died or `drop` it
        is told what QEMU would tell it, see GuestQueue.guess_base. GuestError if it now offers
        other features.
        """
        if self._path is None or not self.receiveqs:
            raise GuestError(f"{self.name}: this guest was never connected")
        self.drop()
        if self._listener is not None:
            frontend = self._listener.accept(timeout)
        else:
            frontend = Frontend.connect(self._path, timeout)
        self._start(frontend, fresh=False)

    def disconnect(self) -> None:
        """Stop all rings in good order and close the connection."""
        with self.lock:
            if self._frontend is not None:
                self.stop_rings()
                self._close_connection()

    def drop(self) -> None:
        """Close the connection without a word, as a frontend that was killed does."""
        with self.lock:
            if self._frontend is not None:
                for queue in self.queues():
                    queue.guess_base()
                self._close_connection()

    def reboot(self) -> None:
        """Stop the rings, forget everything in memory, and start anew on the same connection."""
        with self.lock:
            self.stop_rings()
            self.reboot_stopped()

    def reboot_stopped(self) -> None:
        """The rest of `reboot` after `stop_rings`; in between one may look at the old rings."""
        with self.lock:
            self.frontend.set_features(self.features)
            self.build_rings()
            self.start_rings()

    def close(self) -> None:
        """Close everything, without a word to the backend."""
        self.stop_responder()
        with self.lock:
            self._close_connection()
            if self._listener is not None:
                self._listener.close()
                self._listener = None
            self.close_rings()
            self.memory.close()
            if self._iommu is not None:
                self._iommu.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _close_connection(self) -> None:
        if self._frontend is not None:
            self._frontend.close()
            self._frontend = None
        if self._requests is not None:
            self._requests.close()
            self._requests = None
        if self._iommu is not None:
            self._iommu.disconnect()

    def _start(self, frontend: Frontend, *, fresh: bool) -> None:
        with self.lock:
            self._close_connection()
            try:
                frontend.negotiate(
                    self.wanted.features,
                    self.wanted.protocol_features,
                    required=self.wanted.required_features,
                )
                if frontend.max_queue_pairs < self.queue_pairs:
                    raise GuestError(
                        f"{self.name}: {self.queue_pairs} queue pairs are wanted, "
                        f"the backend has {frontend.max_queue_pairs}"
                    )
                if not fresh and frontend.features != self.features:
                    raise GuestError(
                        f"{self.name}: the backend's features were {self.features!r} and are "
                        f"{frontend.features!r} now; rings cannot go on"
                    )
            except BaseException:
                frontend.close()
                raise
            self._frontend = frontend
            self.features = frontend.features
            if fresh:
                self.build_rings()
            mtu = self.wanted.mtu
            if mtu is not None and ProtocolFeature.MTU in frontend.protocol_features:
                frontend.net_set_mtu(mtu)
            self.start_rings()

    def start_rings(self) -> None:
        """Hand memory and rings to the backend and enable them, each from its `base`.

        They are enabled before they start: a backend discards what lies in a transmitq that is
        started and disabled.
        """
        frontend = self.frontend
        inband = ProtocolFeature.INBAND_NOTIFICATIONS in frontend.protocol_features
        if inband and self._requests is None:
            self._requests = BackendRequests()
            frontend.set_backend_req_fd(self._requests.theirs.fileno())
        elif self._iommu is not None and not self._iommu.connected:
            self._iommu.connect(frontend)
        frontend.set_mem_table(*self.memory.table())
        if Feature.PROTOCOL_FEATURES in self.features:
            for queue in self.queues():
                frontend.set_vring_enable(queue.index, True)
        for queue in self.queues():
            frontend.set_vring_num(queue.index, queue.layout.size)
            frontend.set_vring_base(queue.index, queue.base)
            frontend.set_vring_addr(self.vring_addr(queue))
            if self._requests is not None:
                queue.kick_message = frontend.vring_kick
                continue
            queue.kick_message = None
            frontend.set_vring_call(queue.index, queue.call_fd)
            frontend.set_vring_err(queue.index, queue.err_fd)
            frontend.set_vring_kick(queue.index, queue.kick_fd)
        frontend.sync()
        for queue in self.queues():
            queue.kick()

    def plug(self, region: Region) -> None:
        """Hot-plug one of the spare regions; running rings go on."""
        self.frontend.add_mem_reg(row(region), self.memory.fd(region))
        self.memory.plug(region)

    def unplug(self, region: Region) -> None:
        """Take a region away. No ring may use it any more."""
        self.frontend.rem_mem_reg(row(region))
        self.memory.unplug(region)

    def stop_rings(self) -> None:
        """Disable and stop every ring, and keep the base the backend returns."""
        frontend = self.frontend
        for queue in self.queues():
            if Feature.PROTOCOL_FEATURES in self.features:
                frontend.set_vring_enable(queue.index, False)
            queue.base = frontend.get_vring_base(queue.index)

    def vring_addr(self, queue: AnyQueue) -> VringAddr:
        """What SET_VRING_ADDR says of a queue."""
        layout = queue.layout
        desc, used, avail = layout.desc_gpa, layout.used_gpa, layout.avail_gpa
        if self._iommu is None:
            desc, used, avail = map(self.memory.uva, (desc, used, avail))
        return VringAddr(queue.index, 0, desc, used, avail, 0)

    # What the driver asks of the connection.

    def watched(self) -> list[socket.socket]:
        found = [] if self._frontend is None else [self._frontend.socket]
        return found if self._requests is None else [*found, self._requests.socket]

    def take_requests(self) -> None:
        if self._requests is None:
            return
        queues = list(self.queues())
        for request, payload in self._requests.take():
            if request is BackendRequest.VRING_CALL:
                queues[protocol.decode_vring_state(payload).vring].calls += 1
            elif request is BackendRequest.VRING_ERR:
                self.vring_errors.add(protocol.decode_vring_state(payload).vring)

    def check_backend(self) -> None:
        if self._frontend is not None and self._frontend.closed_by_backend:
            raise BackendClosedError(f"{self.name}: the backend closed the connection")

    def recv(self, n: int, timeout: float = DEFAULT_TIMEOUT_S) -> list[bytes]:
        """While a responder runs, only frames that it does not take itself."""
        if self._responder is not None:
            return self._responder.take_frames(n, time.monotonic() + timeout)
        return super().recv(n, timeout)

    # Pings.

    def start_responder(self, *, reconnect: bool = False) -> None:
        """Answer ARP, neighbour solicitations and pings from a thread of its own.

        With `reconnect` the thread also gets a backend back that went away.
        """
        if self._responder is None:
            self._responder = Responder(self, self.stack, self.reconnect if reconnect else None)

    def stop_responder(self) -> None:
        """End the thread. What made it end early, if anything did, is raised here."""
        responder, self._responder = self._responder, None
        if responder is not None:
            responder.stop()

    def ping(self, ip: str, timeout: float = DEFAULT_TIMEOUT_S) -> bool:
        """Resolve `ip` and send it echo requests until one is answered; False at the timeout."""
        if self._responder is not None:
            return ping(self.stack, ip, timeout, self.send, self._responder.wait_for)
        return ping(self.stack, ip, timeout, self.send, self._pump)

    def _pump(self, done: Callable[[], bool], deadline: float) -> bool:
        """Handle received frames in this thread until `done()` or the deadline."""
        while not done():
            if not self.wait_used(self.receiveqs, deadline):
                return done()
            for frame in self.poll_frames(64):
                taken, replies = self.stack.handle(frame)
                if not taken:
                    self.requeue([frame])
                self.send(replies)
        return True
