"""The driver of a software guest's network card: rings in its memory, and frames through them."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from vswitch.lab.guest.driver import ReceiveQueue, TransmitQueue
from vswitch.lab.guest.errors import BackendClosedError, BackendTimeoutError
from vswitch.lab.guest.frontend import DEFAULT_TIMEOUT_S
from vswitch.lab.guest.memory import GuestMemory
from vswitch.lab.guest.queues import (
    GuestQueue,
    build_receive_queue,
    build_transmit_queue,
)
from vswitch.lab.guest.shapes import BufferOptions
from vswitch.lab.guest.vnet import VnetHeader
from vswitch.vhost_user.protocol import Feature

AnyQueue = GuestQueue[ReceiveQueue] | GuestQueue[TransmitQueue]

_CLOSED_CHECK_S = 0.01
"""How often a polling guest looks whether the backend is still there."""


class NetDriver:
    """The driver's side of one virtio-net interface. Of the device it knows its rings only.

    Who connects these to a device tells it by `watched`, `take_requests` and `check_backend`.
    `polling` (never sleep, ask the device for no notifications) and `auto_post` (post receive
    buffers again once they were read) can be set at any time.
    """

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        buffers: BufferOptions,
        *,
        queues: int,
        strict: bool,
        polling: bool,
    ) -> None:
        self.name = name
        self.memory = memory
        self.queue_pairs = queues
        self.polling = polling
        self.auto_post = True
        self._strict = strict
        self._buffers = buffers
        self.features = Feature(0)
        """What was negotiated with the backend."""
        self.receiveqs: list[GuestQueue[ReceiveQueue]] = []
        self.transmitqs: list[GuestQueue[TransmitQueue]] = []
        self.lock = threading.RLock()
        """Held around every use of the rings; take it to use them from another thread."""
        self._inbox: deque[bytes] = deque()

    # Rings.

    def build_offline(self, features: int) -> None:
        """Set the rings up as if `features` had been negotiated; nobody is on the other side."""
        with self.lock:
            self.features = Feature(features)
            self.build_rings()

    def build_rings(self) -> None:
        """Set fresh rings up, with receive buffers posted, in memory that is as good as new."""
        self.close_rings()
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

    def close_rings(self) -> None:
        """Close their eventfds and forget them."""
        for queue in self.queues():
            queue.close()
        self.receiveqs, self.transmitqs = [], []

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

        BackendClosedError when the backend goes away before anything came.
        """
        deadline = time.monotonic() + timeout
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
        """As `recv`, each frame with its virtio-net header."""
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
        if extra_fd is not None:
            poll.register(extra_fd, select.POLLIN)
        for each in self.watched():
            poll.register(each, select.POLLIN)
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
                self.check_backend()
                if left <= 0:
                    return False
        finally:
            with self.lock:
                for queue in queues:
                    queue.ring.calls_off()

    # Who is on the other side; here nobody.

    def watched(self) -> list[socket.socket]:
        """What becomes readable when there is something to look at besides the rings."""
        return []

    def take_requests(self) -> None:
        """Handle what the backend has asked for or notified by messages since the last look."""

    def check_backend(self) -> None:
        """BackendClosedError if the backend has closed the connection."""

    def _spin(self, queues: Sequence[AnyQueue], deadline: float) -> bool:
        check = 0.0
        while True:
            if any(queue.ring.more_used() for queue in queues):
                return True
            now = time.monotonic()
            if now >= check:
                self.check_backend()
                check = now + _CLOSED_CHECK_S
            if now >= deadline:
                return False
            time.sleep(0)
