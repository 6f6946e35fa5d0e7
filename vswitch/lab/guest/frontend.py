"""The vhost-user frontend protocol over a blocking socket: what QEMU speaks on a guest's behalf.

Orderly requests go through the methods named after them; tests that want to be disorderly use
`send_raw` and `request`. Every wait has a deadline.
"""

from __future__ import annotations

import array
import contextlib
import select
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from vswitch.lab.guest.errors import (
    BackendClosedError,
    BackendRefusedError,
    BackendTimeoutError,
    GuestError,
)
from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import (
    Feature,
    IotlbEntry,
    LogArea,
    MemRegion,
    ProtocolFeature,
    Request,
    Status,
    VringAddr,
    VringState,
)

DEFAULT_TIMEOUT_S = 30.0


class Listener:
    """A listening socket for backends in client mode."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            Path(self.path).unlink()
        try:
            self.socket.bind(self.path)
            self.socket.listen(4)
        except OSError as error:
            self.socket.close()
            raise GuestError(f"cannot listen on {self.path}: {error}") from error

    def accept(self, timeout: float = DEFAULT_TIMEOUT_S) -> Frontend:
        """Wait for a backend to connect. BackendTimeoutError when none did in `timeout` seconds."""
        self.socket.settimeout(timeout)
        try:
            peer, _ = self.socket.accept()
        except TimeoutError as error:
            raise BackendTimeoutError(
                f"no backend connected to {self.path} in {timeout:g} s"
            ) from error
        return Frontend(peer, self.path, timeout)

    def close(self) -> None:
        self.socket.close()
        with contextlib.suppress(FileNotFoundError):
            Path(self.path).unlink()


class Frontend:
    """One vhost-user connection to a backend, seen from the frontend.

    `timeout` is the longest any one message or reply may take, in seconds. Methods raise
    BackendClosedError, BackendTimeoutError or BackendRefusedError.
    """

    def __init__(
        self, connection: socket.socket, path: str, timeout: float = DEFAULT_TIMEOUT_S
    ) -> None:
        self.socket = connection
        self.path = path
        self.timeout = timeout
        self.offered_features = Feature(0)
        self.features = Feature(0)
        self.offered_protocol_features = ProtocolFeature(0)
        self.protocol_features = ProtocolFeature(0)
        self.max_queue_pairs = 1
        self._turn = threading.RLock()
        """A request and its reply: an IOMMU answers misses in a thread of its own."""

    @classmethod
    def connect(cls, path: str | Path, timeout: float = DEFAULT_TIMEOUT_S) -> Frontend:
        """Connect to a backend in server mode, trying again until `timeout` seconds are over."""
        deadline = time.monotonic() + timeout
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                connection.connect(str(path))
            except OSError as error:
                connection.close()
                if time.monotonic() >= deadline:
                    raise BackendTimeoutError(
                        f"cannot connect to {path} in {timeout:g} s: {error}",
                        hint="is the backend running, and is this its socket?",
                    ) from error
                time.sleep(0.01)
            else:
                return cls(connection, str(path), timeout)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def closed_by_backend(self) -> bool:
        """Whether the backend has closed the connection; does not wait."""
        if self.socket.fileno() < 0:
            return True
        if not self._turn.acquire(blocking=False):
            return False  # a thread talks to it: what there is to read is its reply
        try:
            return self._has_ended()
        finally:
            self._turn.release()

    def _has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self.socket, select.POLLIN | select.POLLHUP)
        for _, events in poll.poll(0):
            if events & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                return True
            try:
                return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except OSError:
                return True
        return False

    # Bytes.

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are, with file descriptors attached to the first of them."""
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        )
        try:
            # Here too it may be closed, by the guest's own thread while its IOMMU's answers.
            self.socket.settimeout(self.timeout)
            sent = self.socket.sendmsg([data], ancillary)
            if sent < len(data):
                self.socket.sendall(data[sent:])
        except TimeoutError as error:
            raise BackendTimeoutError(
                f"{self.path}: the backend took no message in {self.timeout:g} s"
            ) from error
        except OSError as error:
            raise BackendClosedError(
                f"{self.path}: the connection broke while sending: {error}"
            ) from error

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes."""
        deadline = time.monotonic() + self.timeout
        data = b""
        while len(data) < length:
            try:
                self.socket.settimeout(max(0.001, deadline - time.monotonic()))
                part = self.socket.recv(length - len(data))
            except TimeoutError as error:
                raise BackendTimeoutError(
                    f"{self.path}: no reply in {self.timeout:g} s "
                    f"({len(data)} of {length} bytes came)"
                ) from error
            except OSError as error:
                raise BackendClosedError(f"{self.path}: the connection broke: {error}") from error
            if not part:
                raise BackendClosedError(f"{self.path}: the backend closed the connection")
            data += part
        return data

    def read_to_end(self) -> bytes:
        """All that the backend still sends until it closes the connection."""
        data = b""
        while True:
            try:
                data += self.receive(1)
            except BackendClosedError:
                return data

    # Messages.

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0
    ) -> None:
        """Send one message and expect nothing."""
        self.send_raw(protocol.encode(request, payload, flags=flags), fds)

    def receive_reply(self, request: int) -> bytes:
        """The payload of the reply to `request`, which must come next."""
        name = protocol.request_name(request)
        try:
            header = protocol.decode_header(self.receive(protocol.HEADER_LEN))
        except protocol.MalformedError as error:
            raise BackendRefusedError(f"{self.path}: malformed reply to {name}: {error}") from error
        payload = self.receive(header.size)
        if header.request != request or not header.is_reply:
            raise BackendRefusedError(
                f"{self.path}: expected the reply to {name}, got "
                f"{protocol.request_name(header.request)} with flags {header.flags:#x}"
            )
        return payload

    def request(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0
    ) -> bytes:
        """Send one message and return the payload of its reply."""
        with self._turn:
            self.send(request, payload, fds, flags=flags)
            return self.receive_reply(request)

    def command(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request without a reply of its own, acknowledged if REPLY_ACK was negotiated."""
        if ProtocolFeature.REPLY_ACK not in self.protocol_features:
            with self._turn:
                self.send(request, payload, fds)
            return
        status = self._u64(request, payload, fds, flags=protocol.FLAG_NEED_REPLY)
        if status:
            raise BackendRefusedError(f"{self.path}: the backend refused {request.name} ({status})")

    def _u64(
        self, request: Request, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = 0
    ) -> int:
        reply = self.request(request, payload, fds, flags=flags)
        if len(reply) != 8:
            raise BackendRefusedError(
                f"{self.path}: the reply to {request.name} has {len(reply)} bytes, must have 8"
            )
        return protocol.decode_u64(reply)

    def sync(self) -> None:
        """Return when the backend has handled everything sent before (a GET_FEATURES answers)."""
        self.get_features()

    # The protocol's own requests, in the order of a usual start.

    def get_features(self) -> Feature:
        return Feature(self._u64(Request.GET_FEATURES))

    def set_features(self, features: int) -> None:
        self.command(Request.SET_FEATURES, protocol.encode_u64(features))

    def get_protocol_features(self) -> ProtocolFeature:
        return ProtocolFeature(self._u64(Request.GET_PROTOCOL_FEATURES))

    def set_protocol_features(self, features: int) -> None:
        # REPLY_ACK is in force only after this one, so there is no acknowledgement of it.
        self.send(Request.SET_PROTOCOL_FEATURES, protocol.encode_u64(features))
        self.protocol_features = ProtocolFeature(features)

    def get_queue_num(self) -> int:
        """The most queue pairs the backend supports."""
        return self._u64(Request.GET_QUEUE_NUM)

    def set_owner(self) -> None:
        self.command(Request.SET_OWNER)

    def reset_owner(self) -> None:
        self.command(Request.RESET_OWNER)

    def reset_device(self) -> None:
        self.command(Request.RESET_DEVICE)

    def set_mem_table(self, regions: list[MemRegion], fds: Sequence[int]) -> None:
        self.command(Request.SET_MEM_TABLE, protocol.encode_mem_table(regions), fds)
        if ProtocolFeature.REPLY_ACK not in self.protocol_features:
            self.sync()

    def get_max_mem_slots(self) -> int:
        """The most memory regions the backend takes at a time."""
        return self._u64(Request.GET_MAX_MEM_SLOTS)

    def add_mem_reg(self, region: MemRegion, fd: int) -> None:
        """Hot-plug one region of guest memory."""
        self.command(Request.ADD_MEM_REG, protocol.encode_mem_region(region), [fd])

    def rem_mem_reg(self, region: MemRegion) -> None:
        """Take one region away; the backend has unmapped it when this returns with REPLY_ACK."""
        self.command(Request.REM_MEM_REG, protocol.encode_mem_region(region))

    def set_log_base(self, fd: int, size: int, offset: int = 0) -> None:
        """Hand over the bitmap of written pages; `size` and `offset` are bytes."""
        payload = protocol.encode_log(LogArea(size, offset))
        reply = self.request(Request.SET_LOG_BASE, payload, [fd])
        if reply:
            raise BackendRefusedError(
                f"{self.path}: the reply to SET_LOG_BASE has {len(reply)} bytes, must have none"
            )

    def set_log_fd(self, fd: int) -> None:
        """Give the backend an eventfd for the news that something was logged."""
        self.command(Request.SET_LOG_FD, b"", [fd])

    def set_backend_req_fd(self, fd: int) -> None:
        """Give the backend a socket on which to make requests of its own."""
        self.command(Request.SET_BACKEND_REQ_FD, b"", [fd])

    def iotlb_msg(self, entry: IotlbEntry) -> None:
        """Tell the backend of a mapping that there is, or is no more."""
        self.command(Request.IOTLB_MSG, protocol.encode_iotlb(entry))

    def vring_kick(self, index: int) -> None:
        """Notify the device of new buffers by a message (INBAND_NOTIFICATIONS)."""
        self.command(Request.VRING_KICK, protocol.encode_vring_state(VringState(index, 0)))

    def set_status(self, status: int) -> None:
        """Device status bits; 0 resets the device."""
        self.command(Request.SET_STATUS, protocol.encode_u64(status))

    def get_status(self) -> Status:
        return Status(self._u64(Request.GET_STATUS))

    def set_vring_num(self, index: int, size: int) -> None:
        self.command(Request.SET_VRING_NUM, protocol.encode_vring_state(VringState(index, size)))

    def set_vring_base(self, index: int, base: int) -> None:
        self.command(Request.SET_VRING_BASE, protocol.encode_vring_state(VringState(index, base)))

    def set_vring_addr(self, addr: VringAddr) -> None:
        self.command(Request.SET_VRING_ADDR, protocol.encode_vring_addr(addr))

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        self._vring_fd(Request.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        self._vring_fd(Request.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        self._vring_fd(Request.SET_VRING_ERR, index, fd)

    def _vring_fd(self, request: Request, index: int, fd: int | None) -> None:
        if fd is None:
            self.command(request, protocol.encode_u64(index | protocol.VRING_NOFD))
        else:
            self.command(request, protocol.encode_u64(index), [fd])

    def set_vring_enable(self, index: int, enabled: bool) -> None:
        self.command(
            Request.SET_VRING_ENABLE, protocol.encode_vring_state(VringState(index, int(enabled)))
        )

    def get_vring_base(self, index: int) -> int:
        """Stop a ring; returns the avail index the device would have taken next."""
        reply = self.request(
            Request.GET_VRING_BASE, protocol.encode_vring_state(VringState(index, 0))
        )
        if len(reply) != 8:
            raise BackendRefusedError(
                f"{self.path}: the reply to GET_VRING_BASE has {len(reply)} bytes, must have 8"
            )
        state = protocol.decode_vring_state(reply)
        if state.vring != index:
            raise BackendRefusedError(
                f"{self.path}: GET_VRING_BASE of vring {index} was answered for {state.vring}"
            )
        return state.num

    def net_set_mtu(self, mtu: int) -> None:
        self.command(Request.NET_SET_MTU, protocol.encode_u64(mtu))

    def send_rarp(self, mac: bytes) -> None:
        """Ask the backend to announce that `mac` (6 bytes) is reached through it now."""
        self.command(Request.SEND_RARP, mac + b"\0\0")

    def negotiate(
        self,
        wanted: int,
        wanted_protocol: int,
        *,
        required: int = 0,
    ) -> None:
        """Features, protocol features, number of queues and owner, as QEMU begins a connection.

        SET_FEATURES itself is sent too. GuestError when a bit of `required` is not offered.
        """
        self.offered_features = self.get_features()
        missing = Feature(required) & ~self.offered_features
        if missing:
            raise GuestError(
                f"{self.path}: the backend does not offer {missing!r}, which this guest requires"
            )
        self.features = Feature(wanted) & self.offered_features
        if Feature.PROTOCOL_FEATURES in self.features:
            self.offered_protocol_features = self.get_protocol_features()
            self.set_protocol_features(
                ProtocolFeature(wanted_protocol) & self.offered_protocol_features
            )
            if ProtocolFeature.MQ in self.protocol_features:
                self.max_queue_pairs = self.get_queue_num()
        self.set_owner()
        self.set_features(self.features)
