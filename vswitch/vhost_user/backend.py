"""The backend's state machine: what each request does to the device.

One `Backend` serves one connection from its first message to its last. QEMU's
docs/interop/vhost-user.rst is the specification; section names in quotes are its.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine

from vswitch.errors import ProtocolError
from vswitch.vhost_user import protocol
from vswitch.vhost_user.backend_channel import BackendChannel, take_socket
from vswitch.vhost_user.connection import Connection, ConnectionClosedError, Message
from vswitch.vhost_user.datapath import Datapath, DatapathError
from vswitch.vhost_user.device import one_vring
from vswitch.vhost_user.iotlb_requests import IotlbRequests
from vswitch.vhost_user.memory_requests import MemoryRequests
from vswitch.vhost_user.protocol import (
    BackendRequest,
    Feature,
    MalformedError,
    ProtocolFeature,
    Reply,
    Request,
    Status,
)
from vswitch.vhost_user.ring_requests import RingRequests

_INBAND_NEEDS = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.INBAND_NOTIFICATIONS
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.PAGEFAULT
)
"""What the backend offers in GET_PROTOCOL_FEATURES, the last one where the datapath can. Types of
devices add their own."""


class Backend(MemoryRequests, RingRequests, IotlbRequests):
    """A vhost-user device of any type, for as long as one frontend is connected.

    A type of device is a class of its own (net.py): it says how many virtqueues there are, adds its
    requests to `_handlers` and its features to `_offered_protocol`.
    """

    def __init__(
        self,
        name: str,
        connection: Connection,
        datapath: Datapath,
        virtqueues: int,
        changed: Callable[[], None] = lambda: None,
        *,
        withheld: int = 0,
        translates: bool = True,
    ) -> None:
        """`withheld`: features not to offer although they are the backend's own.

        `translates`: with ACCESS_PLATFORM the frontend's addresses are I/O virtual.
        """
        super().__init__(name, connection, datapath, virtqueues, changed)
        self._translates = translates
        self.status = Status(0)
        self.asked: set[Request] = set()
        """What the frontend has ever sent."""
        self.refused: dict[str, str] = {}
        """Requests by name that were refused and have not succeeded since, and why."""
        self._last_message = time.monotonic()
        self._features_refused = False
        self._offered_protocol = PROTOCOL_FEATURES
        if not datapath.has_postcopy:
            self._offered_protocol &= ~ProtocolFeature.PAGEFAULT
        self._offered = self._datapath.features | Feature.PROTOCOL_FEATURES | Feature.LOG_ALL
        self._offered &= ~Feature(withheld)
        self._handlers: dict[Request, Callable[[Message], Awaitable[bytes | None]]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_LOG_BASE: self._set_log_base,
            Request.SET_LOG_FD: self._set_log_fd,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.GET_INFLIGHT_FD: self._get_inflight_fd,
            Request.SET_INFLIGHT_FD: self._set_inflight_fd,
            Request.RESET_DEVICE: self._reset_device,
            Request.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
            Request.SET_STATUS: self._set_status,
            Request.GET_STATUS: self._get_status,
            Request.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            Request.VRING_KICK: self._vring_kick,
            Request.IOTLB_MSG: self._iotlb_msg,
            Request.POSTCOPY_ADVISE: self._postcopy_advise,
            Request.POSTCOPY_LISTEN: self._postcopy_listen,
            Request.POSTCOPY_END: self._postcopy_end,
        }

    @property
    def silent_s(self) -> float:
        """For how long the frontend has sent nothing, in seconds."""
        return time.monotonic() - self._last_message

    async def run(self) -> None:
        """Serve the connection until the frontend goes.

        Returns when it closes the connection between two messages; raises ProtocolError for
        anything that ends it otherwise. Either way all rings are stopped, the memory is unmapped
        and every descriptor is closed; closing the connection is the caller's.
        """
        try:
            while True:
                try:
                    message = await self.connection.receive()
                except ConnectionClosedError:
                    return
                with message:
                    await self._serve(message)
                # Somebody else's turn: a frontend that never stops sending is never waited for.
                await asyncio.sleep(0)
        except MalformedError as exc:
            raise ProtocolError(str(exc), hint="the frontend sent this: it is broken") from exc
        finally:
            await _to_the_end(self._release())

    # One message

    async def _serve(self, message: Message) -> None:
        """Handle one request and answer it as "Communication" and REPLY_ACK demand."""
        number = message.header.request
        self._last_message = time.monotonic()
        wants_ack = self._wants_ack(message)
        if message.header.is_reply:
            raise MalformedError(
                f"{protocol.request_name(number)}: marked as a reply, and nothing was asked"
            )
        if self._take_ack(message):
            return
        try:
            request = Request(number)
            handler = self._handlers[request]
        except (ValueError, KeyError):
            if not wants_ack:
                raise MalformedError(
                    f"{protocol.request_name(number)} is not supported and was not offered"
                ) from None
            self._log.warning(
                "port %s: %s is not supported", self._name, protocol.request_name(number)
            )
            if len(self.refused) < len(Request):
                self.refused[protocol.request_name(number)] = "it is not supported"
            await self._reply(number, protocol.encode_u64(1))
            return
        spec = protocol.check_shape(request, message.payload, len(message.fds))
        if spec.needs and spec.needs not in self.protocol_features:
            raise MalformedError(
                f"{request.name}: protocol feature {spec.needs.name} was not negotiated"
            )
        self._log.debug("port %s: %s", self._name, request.name)
        self.asked.add(request)
        try:
            answer = await handler(message)
        except DatapathError as exc:
            if not wants_ack or spec.reply is Reply.ALWAYS:
                raise ProtocolError(f"{request.name}: {exc}") from exc
            self._log.error("port %s: %s: %s", self._name, request.name, exc)
            self.refused[request.name] = str(exc)
            await self._reply(number, protocol.encode_u64(1))
            return
        self.refused.pop(request.name, None)
        if answer is not None:
            if not self._was_paid(answer):
                await self._reply(number, answer)
        elif self._wants_ack(message) and spec.reply is Reply.ACK:
            # As things are now: whoever negotiates REPLY_ACK by this very request waits for it.
            await self._reply(number, protocol.encode_u64(0))
        await self._pay_ahead(request)

    # Features

    async def _get_features(self, _: Message) -> bytes:
        return protocol.encode_u64(self._offered)

    async def _set_features(self, message: Message) -> None:
        value = protocol.decode_u64(message.payload)
        unknown = value & ~int(self._offered)
        # VIRTIO 1.2, 3.1.1: whoever asks for the status learns it from FEATURES_OK.
        self._features_refused = bool(unknown)
        if unknown:
            raise DatapathError(f"{value:#x} has bits {unknown:#x}, never offered")
        features = Feature(value)
        if features == self.features:
            return
        if features ^ self.features == Feature.LOG_ALL:
            # Migration begins or ends: nobody should notice.
            self.features = features
            await self._datapath.log_rings({v.index: v.logged(features) for v in self._running()})
            return
        running = await self._stop(self._running())
        renewed = self.features and Feature.RING_PACKED in features ^ self.features
        self.features = features
        if renewed:
            # Another driver, whose rings have another format: nothing that was said of them holds.
            for vring in running:
                vring.placed = False
                self._datapath.forget_ring(vring.index)
        else:
            await self._start(running)

    async def _get_protocol_features(self, _: Message) -> bytes:
        return protocol.encode_u64(self._offered_protocol)

    async def _set_protocol_features(self, message: Message) -> None:
        value = protocol.decode_u64(message.payload)
        unknown = value & ~int(self._offered_protocol)
        if unknown:
            raise MalformedError(
                f"SET_PROTOCOL_FEATURES: {value:#x} has bits {unknown:#x}, never offered"
            )
        if value & ProtocolFeature.INBAND_NOTIFICATIONS and ~value & _INBAND_NEEDS:
            # "In-band notifications" demands to end the connection then.
            raise MalformedError(
                "SET_PROTOCOL_FEATURES: INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK"
            )
        self.protocol_features = ProtocolFeature(value)

    @property
    def queue_num(self) -> int:
        """The answer to GET_QUEUE_NUM."""
        return self.virtqueues

    async def _get_queue_num(self, _: Message) -> bytes:
        return protocol.encode_u64(self.queue_num)

    # Ownership

    async def _set_owner(self, _: Message) -> None:
        """Nothing to do: whoever is connected is the owner."""

    async def _reset_owner(self, _: Message) -> None:
        """Deprecated; the document recommends to disable all rings, and so we do."""
        await self._stop(self._running())
        for vring in self.vrings.values():
            vring.wanted = False
            vring.forget_kick()
            self._datapath.forget_ring(vring.index)

    async def _reset_device(self, _: Message) -> None:
        """Back to the state after connecting, except for ownership, memory and the protocol."""
        await self._stop(self._running())
        for vring in self.vrings.values():
            vring.reset()
            self._datapath.forget_ring(vring.index)
        self.features = Feature(0)
        self._features_refused = False
        self.status = Status(0)

    # Device status

    async def _set_status(self, message: Message) -> None:
        """What the driver has written to the status field; 0 resets the device.

        Nothing else starts or stops because of it: rings have their own messages for that.
        """
        value = protocol.decode_u64(message.payload)
        if value > 0xFF:
            raise MalformedError(f"SET_STATUS: u64 {value:#x} is more than 8 bits")
        if value == 0:
            await self._reset_device(message)
            return
        if self._features_refused:
            value &= ~Status.FEATURES_OK
        self.status = Status(value)

    async def _get_status(self, _: Message) -> bytes:
        return protocol.encode_u64(self.status)

    # Requests of ours

    async def _set_backend_req_fd(self, message: Message) -> None:
        sock = take_socket("SET_BACKEND_REQ_FD", message.fds[0])
        if self._channel is not None:
            self._channel.close()
        self._channel = BackendChannel(
            self._name,
            sock,
            acknowledged=ProtocolFeature.REPLY_ACK in self.protocol_features,
        )
        # Calls may have been made before there was a way to pass them on.
        for vring in self._running():
            if vring.relayed:
                self._channel.post(BackendRequest.VRING_CALL, one_vring(vring.index))
        self._datapath.ask_again()
        if self.behind_iommu:
            # Where these themselves are could not be asked either.
            await self._start([vring for vring in self.vrings.values() if self._is_waiting(vring)])


async def _to_the_end(work: Coroutine[None, None, None]) -> None:
    """Await `work` whoever cancels this task meanwhile, who is obeyed afterwards.

    Rings must have stopped before their memory goes.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        raise cancelled
