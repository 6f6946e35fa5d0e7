"""A guest without a virtual machine: memory, virtio-net driver and vhost-user frontend in one.

It speaks to any vhost-user-net backend. Used from one thread it is deterministic: nothing is sent,
received or posted but by the call that says so. With `start_responder` a thread answers pings.
"""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from vswitch.lab.guest.backend_requests import BackendRequests
from vswitch.lab.guest.driver import ReceiveQueue, TransmitQueue
from vswitch.lab.guest.errors import BackendClosedError, BackendTimeoutError, GuestError
from vswitch.lab.guest.frontend import DEFAULT_TIMEOUT_S, Frontend, Listener
from vswitch.lab.guest.iommu import GPA_OFFSET, GuestIommu
from vswitch.lab.guest.memory import GuestMemory, Region, row
from vswitch.lab.guest.packets import parse_mac
from vswitch.lab.guest.queues import (
    GuestQueue,
    build_receive_queue,
    build_transmit_queue,
)
from vswitch.lab.guest.responder import Responder, ping
from vswitch.lab.guest.shapes import BufferOptions
from vswitch.lab.guest.stack import NetStack
from vswitch.lab.guest.vnet import VnetHeader
from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import BackendRequest, Feature, ProtocolFeature, VringAddr

AnyQueue = GuestQueue[ReceiveQueue] | GuestQueue[TransmitQueue]

DEFAULT_FEATURES = (
    Feature.VERSION_1
    | Feature.MRG_RXBUF
    | Feature.RING_INDIRECT_DESC
    | Feature.RING_EVENT_IDX
    | Feature.ANY_LAYOUT
    | Feature.PROTOCOL_FEATURES
)
DEFAULT_PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.MTU
    | ProtocolFeature.RARP
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
_INBAND = (
    ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK
)
_IOMMU = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK
_CLOSED_CHECK_S = 0.01
"""How often a polling guest looks whether the backend is still there."""


class SoftwareGuest:
    """One virtio-net interface on a vhost-user backend.

    mac: like "52:54:00:00:00:01". ip: IPv4 or IPv6 address to answer for; the link-local IPv6
        address is there anyway.
    queue_size, rx_queue_size: entries of each ring, 2 to 32768; a power of two in split rings.
    queues: queue pairs; more than one asks for Feature.MQ.
    features, protocol_features: what to take if it is offered. required_features: GuestError at
        connect if one of these is not offered.
    regions: a number from 1 to 8 (sizes are worked out) or the exact memory layout.
    spare_regions: memory for `plug`.
    max_frame_len: longest frame to send, and to receive without mergeable buffers, in bytes.
    mtu: told to the backend where MTU is negotiated as a protocol feature.
    tx_cuts, rx_cuts: where to cut buffers into descriptors, see shapes.cut(). Legacy layout
        (neither VERSION_1 nor ANY_LAYOUT) cuts after the header where the standard demands it.
    rx_buf_len: bytes of one receive buffer, header included. Default: 2048 with mergeable buffers,
        else as max_frame_len requires.
    indirect: use indirect descriptors when they are negotiated.
    rx_guard_len, slot_offset: see QueueShape; a guard makes every write past the reported length
        an error.
    first_idx: where the free-running indices of fresh rings begin, 0 to 65535; see VirtQueue.
    strict: see ReceiveQueue; False for devices that are a little lax.
    inband: where INBAND_NOTIFICATIONS is negotiated, kick and be called by messages.
    iommu: all addresses are I/O virtual (ACCESS_PLATFORM), `iommu` translates them for the backend.
    polling: never sleep, ask the device for no notifications. Settable at any time.
    auto_post: post receive buffers again once they were read. Settable at any time.
    """

    def __init__(
        self,
        mac: str,
        ip: str | None = None,
        *,
        queue_size: int = 256,
        rx_queue_size: int | None = None,
        queues: int = 1,
        features: int = DEFAULT_FEATURES,
        required_features: int = 0,
        protocol_features: int = DEFAULT_PROTOCOL_FEATURES,
        regions: int | Sequence[Region] = 1,
        spare_regions: Sequence[Region] = (),
        max_frame_len: int = 1518,
        mtu: int | None = None,
        tx_cuts: tuple[int, ...] = (),
        rx_cuts: tuple[int, ...] = (),
        rx_buf_len: int | None = None,
        indirect: bool = True,
        rx_guard_len: int = 0,
        slot_offset: int = 0,
        first_idx: int = 0,
        strict: bool = True,
        inband: bool = False,
        iommu: bool = False,
        polling: bool = False,
    ) -> None:
        self.name = mac
        self.mac = parse_mac(mac)
        self.stack = NetStack(self.mac, ip)
        self.queue_pairs = queues
        self.wanted_features = features | (Feature.MQ if queues > 1 else 0)
        self.required_features = required_features
        self.wanted_protocol_features = protocol_features
        if inband:
            self.wanted_protocol_features |= _INBAND
        if iommu:
            self.wanted_protocol_features |= _IOMMU
            self.wanted_features |= Feature.ACCESS_PLATFORM
            self.required_features |= Feature.ACCESS_PLATFORM
        self.max_frame_len = max_frame_len
        self.mtu = mtu
        self.polling = polling
        self.auto_post = True
        self._strict = strict
        self._buffers = BufferOptions(
            tx_size=queue_size,
            rx_size=rx_queue_size or queue_size,
            max_frame_len=max_frame_len,
            tx_cuts=tx_cuts,
            rx_cuts=rx_cuts,
            rx_buf_len=rx_buf_len,
            indirect=indirect,
            rx_guard_len=rx_guard_len,
            slot_offset=slot_offset,
            first_idx=first_idx,
        )

        self.features = Feature(0)
        """What was negotiated with the backend."""
        self.receiveqs: list[GuestQueue[ReceiveQueue]] = []
        self.transmitqs: list[GuestQueue[TransmitQueue]] = []
        if isinstance(regions, int):
            regions = self._buffers.layout(regions, self.wanted_features, queues)
        self.memory = GuestMemory(regions, spare_regions, GPA_OFFSET if iommu else 0)
        self._iommu = GuestIommu(self.memory) if iommu else None
        self._frontend: Frontend | None = None
        self._requests: BackendRequests | None = None
        self.vring_errors: set[int] = set()
        """Vrings the backend has called broken by a message."""
        self._listener: Listener | None = None
        self._path: str | Path | None = None
        self.lock = threading.RLock()
        """Held around every use of the rings; take it to use them from another thread."""
        self._inbox: deque[bytes] = deque()
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
            self._build()
            self.start_rings()

    def close(self) -> None:
        """Close everything, without a word to the backend."""
        self.stop_responder()
        with self.lock:
            self._close_connection()
            if self._listener is not None:
                self._listener.close()
                self._listener = None
            for queue in self.queues():
                queue.close()
            self.receiveqs, self.transmitqs = [], []
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
                    self.wanted_features,
                    self.wanted_protocol_features,
                    required=self.required_features,
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
                self._build()
            if self.mtu is not None and ProtocolFeature.MTU in frontend.protocol_features:
                frontend.net_set_mtu(self.mtu)
            self.start_rings()

    def build_offline(self, features: int) -> None:
        """Set the rings up as if `features` had been negotiated; nobody is on the other side."""
        with self.lock:
            self.features = Feature(features)
            self._build()

    def _build(self) -> None:
        for queue in self.queues():
            queue.close()
        self.memory.reset()
        receive = self._buffers.shape(self.features, transmit=False)
        transmit = self._buffers.shape(self.features, transmit=True)
        self.receiveqs = [
            build_receive_queue(self.memory, pair, receive, self.features, self.name)
            for pair in range(self.queue_pairs)
        ]
        self.transmitqs = [
            build_transmit_queue(self.memory, pair, transmit, self.features, self.name)
            for pair in range(self.queue_pairs)
        ]
        for queue in self.receiveqs:
            queue.ring.strict = self._strict
            if self.auto_post:
                queue.ring.post()

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

    def queues(self) -> Iterator[AnyQueue]:
        """Every queue in the order of the vring numbers."""
        for rx, tx in zip(self.receiveqs, self.transmitqs, strict=True):
            yield rx
            yield tx

    # Frames.

    def send(
        self,
        frames: Iterable[bytes],
        timeout: float = DEFAULT_TIMEOUT_S,
        *,
        queue: int = 0,
        header: bytes | None = None,
    ) -> None:
        """Give frames (without virtio-net header) to a transmitq, waiting for room in it.

        Returns when the device may take the last one, not when it has. BackendTimeoutError when
        there is no room for `timeout` seconds; BackendClosedError when the backend goes away.
        """
        frames = list(frames)
        sent = 0
        target = self.transmitqs[queue]
        deadline = time.monotonic() + timeout
        while True:
            with self.lock:
                target.ring.reap()
                n = target.ring.send(frames, sent, header)
                sent += n
                if n:
                    target.notify()
                    deadline = time.monotonic() + timeout
            if sent == len(frames):
                return
            if not self.wait_used([target], deadline):
                raise BackendTimeoutError(
                    f"{target.ring.name}: the device took no frame in {timeout:g} s "
                    f"({len(frames) - sent} of {len(frames)} left)"
                )

    def drain(self, timeout: float = DEFAULT_TIMEOUT_S) -> None:
        """Wait until the device has given back every frame sent. BackendTimeoutError if not."""
        deadline = time.monotonic() + timeout
        for queue in self.transmitqs:
            while True:
                with self.lock:
                    queue.ring.reap()
                    if not queue.ring.outstanding:
                        break
                if not self.wait_used([queue], deadline):
                    raise BackendTimeoutError(
                        f"{queue.ring.name}: {queue.ring.outstanding} frames were not given back "
                        f"in {timeout:g} s"
                    )

    def recv(self, n: int, timeout: float = DEFAULT_TIMEOUT_S) -> list[bytes]:
        """The next `n` frames of all receiveqs, or fewer when `timeout` seconds are over.

        While a responder runs, only frames that it does not take itself.
        BackendClosedError when the backend goes away before anything came.
        """
        deadline = time.monotonic() + timeout
        if self._responder is not None:
            return self._responder.take_frames(n, deadline)
        frames: list[bytes] = []
        while len(frames) < n and self._inbox:
            frames.append(self._inbox.popleft())
        while len(frames) < n:
            more = self.poll_frames(n - len(frames))
            frames += more
            if more:
                continue
            try:
                if not self.wait_used(self.receiveqs, deadline):
                    break
            except BackendClosedError:
                if frames:
                    break
                raise
        return frames

    def poll_frames(self, most: int) -> list[bytes]:
        """Up to `most` frames that are there now, straight from the rings."""
        return [frame for _, frame in self._poll_with_headers(most)]

    def _poll_with_headers(self, most: int) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        with self.lock:
            for queue in self.receiveqs:
                if len(found) < most and queue.ring.more_used():
                    found += queue.ring.recv_with_headers(most - len(found))
                    if self.auto_post and queue.ring.post():
                        queue.notify()
        return found

    def recv_with_headers(
        self, n: int, timeout: float = DEFAULT_TIMEOUT_S
    ) -> list[tuple[VnetHeader, bytes]]:
        """As `recv`, each frame with its virtio-net header; not for guests with a responder."""
        deadline = time.monotonic() + timeout
        found: list[tuple[VnetHeader, bytes]] = []
        while len(found) < n:
            more = self._poll_with_headers(n - len(found))
            found += [(VnetHeader.unpack(header), frame) for header, frame in more]
            if not more and not self.wait_used(self.receiveqs, deadline):
                break
        return found

    def requeue(self, frames: Iterable[bytes]) -> None:
        """Leave frames for the next `recv`."""
        self._inbox.extend(frames)

    def wait_used(
        self, queues: Sequence[AnyQueue], deadline: float, extra_fd: int | None = None
    ) -> bool:
        """Wait until one of `queues` has something to reap. False at the deadline (monotonic).

        Sleeps on the call eventfds, or polls if `polling` is set. `extra_fd` readable ends the wait
        with False as well. BackendClosedError when the backend closes the connection meanwhile.
        """
        if self.polling:
            return self._spin(queues, deadline)
        poll = select.poll()
        if self._frontend is not None:
            poll.register(self._frontend.socket, select.POLLIN)
        if extra_fd is not None:
            poll.register(extra_fd, select.POLLIN)
        if self._requests is not None:
            poll.register(self._requests.socket, select.POLLIN)
        for queue in queues:
            poll.register(queue.call_fd, select.POLLIN)
        try:
            while True:
                with self.lock:
                    if any([queue.ring.calls_on() for queue in queues]):
                        return True
                left = deadline - time.monotonic()
                events = poll.poll(max(0.0, left) * 1000)
                for queue in queues:
                    queue.take_calls()
                self.take_requests()
                if any(queue.ring.more_used() for queue in queues):
                    return True
                if any(fd == extra_fd for fd, _ in events):
                    return False
                self._check_backend()
                if left <= 0:
                    return False
        finally:
            with self.lock:
                for queue in queues:
                    queue.ring.calls_off()

    def take_requests(self) -> None:
        """Handle what the backend has asked for or notified by messages since the last look."""
        if self._requests is None:
            return
        queues = list(self.queues())
        for request, payload in self._requests.take():
            if request is BackendRequest.VRING_CALL:
                queues[protocol.decode_vring_state(payload).vring].calls += 1
            elif request is BackendRequest.VRING_ERR:
                self.vring_errors.add(protocol.decode_vring_state(payload).vring)

    def _spin(self, queues: Sequence[AnyQueue], deadline: float) -> bool:
        check = 0.0
        while True:
            if any(queue.ring.more_used() for queue in queues):
                return True
            now = time.monotonic()
            if now >= check:
                self._check_backend()
                check = now + _CLOSED_CHECK_S
            if now >= deadline:
                return False
            time.sleep(0)

    def _check_backend(self) -> None:
        if self._frontend is not None and self._frontend.closed_by_backend:
            raise BackendClosedError(f"{self.name}: the backend closed the connection")

    # Pings.

    def start_responder(self, *, reconnect: bool = False) -> None:
        """Answer ARP, neighbour solicitations and pings from a thread of its own.

        With `reconnect` the thread also gets a backend back that went away.
        """
        if self._responder is None:
            self._responder = Responder(self, reconnect=reconnect)

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
                    self._inbox.append(frame)
                self.send(replies)
        return True
