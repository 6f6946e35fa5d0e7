"""The backend's state machine: what each request does to the device.

One `Backend` serves one connection from its first message to its last. QEMU's
docs/interop/vhost-user.rst is the specification; section names in quotes are its.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable

from vswitch.errors import ProtocolError
from vswitch.vhost_user import protocol
from vswitch.vhost_user.backend_channel import BackendChannel, take_socket
from vswitch.vhost_user.connection import Connection, ConnectionClosedError, Message
from vswitch.vhost_user.datapath import Datapath, DatapathError
from vswitch.vhost_user.protocol import (
    FLAG_REPLY,
    VRING_F_LOG,
    VRING_IDX_MASK,
    VRING_NOFD,
    BackendRequest,
    Feature,
    MalformedError,
    MemRegion,
    ProtocolFeature,
    Reply,
    Request,
    Status,
    VringState,
)
from vswitch.vhost_user.vring import SIZE_MAX, Vring, check_eventfd, close_fd, signal_fd

_INBAND_NEEDS = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.MTU
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.INBAND_NOTIFICATIONS
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
"""What the backend offers in GET_PROTOCOL_FEATURES."""

MTU_MIN = 68
MTU_MAX = 65535

# The addresses a frontend may leave unaligned are none: VIRTIO 1.2 section 2.7.
_ALIGNMENT = (("desc_uva", 16), ("used_uva", 4), ("avail_uva", 2))


class Backend:
    """The vhost-user device of one port, for as long as one frontend is connected.

    `changed` is called, without arguments, whenever rings start or stop.
    """

    def __init__(
        self,
        name: str,
        connection: Connection,
        datapath: Datapath,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.connection = connection
        self.features = Feature(0)
        self.protocol_features = ProtocolFeature(0)
        self.regions: list[MemRegion] = []
        self.vrings: dict[int, Vring] = {}
        self.status = Status(0)
        self._features_refused = False
        self._channel: BackendChannel | None = None
        self._repeated: Counter[tuple[int, int, int]] = Counter()
        self._datapath = datapath
        self._changed = changed
        self._log = logging.getLogger("vswitch.vhost_user")
        self._name = name
        self._offered = datapath.features | Feature.PROTOCOL_FEATURES | Feature.LOG_ALL
        self._log_fd = -1
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
            Request.SEND_RARP: self._send_rarp,
            Request.NET_SET_MTU: self._net_set_mtu,
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
        }

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
        except MalformedError as exc:
            raise ProtocolError(str(exc), hint="the frontend sent this: it is broken") from exc
        finally:
            await self._release()

    def signal_error(self, index: int) -> None:
        """Tell the frontend that a virtqueue is broken (SET_VRING_ERR, BACKEND_VRING_ERR)."""
        vring = self.vrings.get(index)
        if vring is None:
            return
        if vring.err_fd < 0 and self._inband and self._channel is not None:
            self._channel.post(BackendRequest.VRING_ERR, _one_vring(index))
        signal_fd(vring.err_fd)

    # One message

    async def _serve(self, message: Message) -> None:
        """Handle one request and answer it as "Communication" and REPLY_ACK demand."""
        number = message.header.request
        wants_ack = self._wants_ack(message)
        if message.header.is_reply:
            raise MalformedError(
                f"{protocol.request_name(number)}: marked as a reply, and nothing was asked"
            )
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
            await self._reply(number, protocol.encode_u64(1))
            return
        spec = protocol.check_shape(request, message.payload, len(message.fds))
        if spec.needs and spec.needs not in self.protocol_features:
            raise MalformedError(
                f"{request.name}: protocol feature {spec.needs.name} was not negotiated"
            )
        self._log.debug("port %s: %s", self._name, request.name)
        try:
            answer = await handler(message)
        except DatapathError as exc:
            if not wants_ack or spec.reply is Reply.ALWAYS:
                raise ProtocolError(f"{request.name}: {exc}") from exc
            self._log.error("port %s: %s: %s", self._name, request.name, exc)
            await self._reply(number, protocol.encode_u64(1))
            return
        if answer is not None:
            await self._reply(number, answer)
        elif wants_ack and spec.reply is Reply.ACK:
            await self._reply(number, protocol.encode_u64(0))

    def _wants_ack(self, message: Message) -> bool:
        return message.header.need_reply and ProtocolFeature.REPLY_ACK in self.protocol_features

    async def _reply(self, request: int, payload: bytes, fds: list[int] | None = None) -> None:
        try:
            await self.connection.send(protocol.encode(request, payload, flags=FLAG_REPLY), fds)
        except ConnectionError as exc:
            raise ProtocolError("the frontend went away without its reply") from exc

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
            await self._datapath.log_rings({v.index: v.log(features) for v in self._running()})
            return
        running = await self._stop(self._running())
        self.features = features
        await self._start(running)

    async def _get_protocol_features(self, _: Message) -> bytes:
        return protocol.encode_u64(PROTOCOL_FEATURES)

    async def _set_protocol_features(self, message: Message) -> None:
        value = protocol.decode_u64(message.payload)
        unknown = value & ~int(PROTOCOL_FEATURES)
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

    async def _get_queue_num(self, _: Message) -> bytes:
        return protocol.encode_u64(self._datapath.queue_pairs)

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

    # In-band notifications and requests of ours

    @property
    def _inband(self) -> bool:
        return ProtocolFeature.INBAND_NOTIFICATIONS in self.protocol_features

    async def _set_backend_req_fd(self, message: Message) -> None:
        sock = take_socket("SET_BACKEND_REQ_FD", message.fds[0])
        message.take_fd()
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
                self._channel.post(BackendRequest.VRING_CALL, _one_vring(vring.index))

    async def _vring_kick(self, message: Message) -> None:
        index, num = protocol.decode_vring_state(message.payload)
        vring = self._vring("VRING_KICK", index)
        if num:
            raise MalformedError(f"VRING_KICK: num {num} of vring {index} is not 0")
        if not vring.kickable:
            # What wakes the worker is an eventfd all the same; this one is ours.
            vring.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            vring.kickable = True
            if vring.complete and self.regions:
                await self._start([vring])
        signal_fd(vring.kick_fd)

    def _relay_calls(self, vring: Vring) -> None:
        """Give a ring without SET_VRING_CALL an eventfd that becomes BACKEND_VRING_CALL."""
        vring.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        vring.relayed = True
        asyncio.get_running_loop().add_reader(vring.call_fd, self._pass_call_on, vring)

    def _pass_call_on(self, vring: Vring) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(vring.call_fd)
        if self._channel is not None:
            self._channel.post(BackendRequest.VRING_CALL, _one_vring(vring.index))

    # Memory

    async def _set_mem_table(self, message: Message) -> None:
        regions = protocol.decode_mem_table(message.payload)
        if len(regions) != len(message.fds):
            raise MalformedError(
                f"SET_MEM_TABLE: {len(regions)} regions came with {len(message.fds)} "
                "file descriptors"
            )
        running = await self._stop(self._running())
        self.regions = []
        self._repeated.clear()
        await self._datapath.set_memory(regions, message.fds)
        self.regions = regions
        await self._start(running)
        # Some frontends set up rings first.
        await self._start([v for v in self.vrings.values() if v.complete and not v.started])

    async def _get_max_mem_slots(self, _: Message) -> bytes:
        return protocol.encode_u64(self._datapath.memory_slots)

    async def _add_mem_reg(self, message: Message) -> None:
        region = protocol.decode_mem_region(message.payload)
        if region in self.regions:
            # QEMU before 9.0 says everything once for each queue pair, and so it will take back.
            known = _identity(region)
            if known not in self._repeated and len(self._repeated) >= self._datapath.memory_slots:
                raise DatapathError("more regions were said twice than there are memory slots")
            self._repeated[known] += 1
            return
        await self._datapath.add_memory(region, message.fds[0])
        self.regions.append(region)
        # Those that wait for this: not set up before there was memory, or stopped with a region.
        await self._start([vring for vring in self.vrings.values() if self._is_waiting(vring)])

    async def _rem_mem_reg(self, message: Message) -> None:
        wanted = _identity(protocol.decode_mem_region(message.payload))
        for region in self.regions:
            if _identity(region) == wanted:
                break
        else:
            if self._repeated[wanted] == 0:
                gpa, size, uva = wanted
                raise DatapathError(
                    f"no region with guest address {gpa:#x}, size {size:#x} "
                    f"and user address {uva:#x}"
                )
            self._repeated[wanted] -= 1
            if not self._repeated[wanted]:
                del self._repeated[wanted]
            return
        # QEMU takes a region away and adds a part of it when the guest's memory layout changes: the
        # rings in it stop, and go on as soon as all of their memory is there again.
        await self._stop(
            [
                vring
                for vring in self._running()
                if any(
                    uva < region.uva + region.size and region.uva < uva + length
                    for uva, length in vring.areas(self.features)
                )
            ]
        )
        await self._datapath.remove_memory(region)
        self.regions.remove(region)

    async def _get_inflight_fd(self, message: Message) -> None:
        """The reply carries a descriptor, so it is sent from here."""
        asked = protocol.decode_inflight(message.payload)
        fd, size = self._datapath.make_inflight()
        try:
            answer = asked._replace(mmap_size=size, mmap_offset=0)
            await self._reply(Request.GET_INFLIGHT_FD, protocol.encode_inflight(answer), [fd])
        finally:
            close_fd(fd)

    async def _set_inflight_fd(self, message: Message) -> None:
        told = protocol.decode_inflight(message.payload)
        running = await self._stop(self._running())
        self._datapath.use_inflight(message.fds[0], told.mmap_size, told.mmap_offset)
        await self._start(running)

    # Dirty page logging

    async def _set_log_base(self, message: Message) -> bytes | None:
        area = protocol.decode_log(message.payload)
        await self._datapath.set_log(message.fds[0], area)
        # With LOG_SHMFD there is always a reply. QEMU sends no NEED_REPLY here and waits for one
        # all the same, whose payload nobody has defined: others send none.
        return None if self._wants_ack(message) else b""

    async def _set_log_fd(self, message: Message) -> None:
        check_eventfd("SET_LOG_FD", message.fds[0])
        close_fd(self._log_fd)
        self._log_fd = message.take_fd()

    # Rings

    async def _set_vring_num(self, message: Message) -> None:
        index, size = protocol.decode_vring_state(message.payload)
        vring = self._vring("SET_VRING_NUM", index)
        packed = Feature.RING_PACKED in self.features
        if not 0 < size <= SIZE_MAX or (size & (size - 1) and not packed):
            raise MalformedError(
                f"SET_VRING_NUM: num {size} of vring {index} "
                f"is not {'a number' if packed else 'a power of two'} from 1 to {SIZE_MAX}"
            )
        if size != vring.size:
            await self._change(vring, size=size)

    async def _set_vring_addr(self, message: Message) -> None:
        addr = protocol.decode_vring_addr(message.payload)
        vring = self._vring("SET_VRING_ADDR", addr.vring)
        if addr.flags & ~VRING_F_LOG:
            raise MalformedError(f"SET_VRING_ADDR: flags {addr.flags:#x} are unknown")
        for field, align in _ALIGNMENT:
            value = getattr(addr, field)
            if value % align:
                raise MalformedError(
                    f"SET_VRING_ADDR: {field} {value:#x} of vring {addr.vring} "
                    f"is not aligned to {align} bytes"
                )
        log_gpa = addr.log_gpa if addr.flags & VRING_F_LOG else None
        if log_gpa != vring.log_gpa:
            vring.log_gpa = log_gpa
            if vring.started and Feature.LOG_ALL in self.features:
                await self._datapath.log_rings({vring.index: vring.log(self.features)})
        new = {name: getattr(addr, name) for name, _ in _ALIGNMENT}
        if not vring.placed or any(getattr(vring, name) != value for name, value in new.items()):
            await self._change(vring, placed=True, **new)

    async def _set_vring_base(self, message: Message) -> None:
        index, base = protocol.decode_vring_state(message.payload)
        vring = self._vring("SET_VRING_BASE", index)
        # A packed ring's upper half is the used position, which is the avail position with us: what
        # a burst takes it gives back. Some frontends leave it zero.
        if base > 0xFFFF and Feature.RING_PACKED not in self.features:
            raise MalformedError(
                f"SET_VRING_BASE: num {base} of vring {index} is more than 16 bits"
            )
        if vring.started:
            raise MalformedError(f"SET_VRING_BASE: vring {index} is running")
        vring.base = base

    async def _get_vring_base(self, message: Message) -> bytes:
        index, _ = protocol.decode_vring_state(message.payload)
        vring = self._vring("GET_VRING_BASE", index)
        await self._stop([vring])
        vring.forget_kick()
        self._datapath.forget_ring(index)
        return protocol.encode_vring_state(VringState(index, vring.base))

    async def _set_vring_kick(self, message: Message) -> None:
        index, fd = self._take_vring_fd("SET_VRING_KICK", message)
        vring = self.vrings[index]
        running = await self._stop([vring])
        close_fd(vring.kick_fd)
        vring.kick_fd = fd
        vring.kickable = True
        if running or (vring.complete and self.regions):
            await self._start([vring])

    async def _set_vring_call(self, message: Message) -> None:
        index, fd = self._take_vring_fd("SET_VRING_CALL", message)
        vring = self.vrings[index]
        vring.stop_relaying()
        vring.callable = True
        old, vring.call_fd = vring.call_fd, fd
        if vring.started:
            await self._datapath.set_call(index, fd)
        close_fd(old)
        # What was signalled through the old descriptor may not have been seen.
        signal_fd(fd)

    async def _set_vring_err(self, message: Message) -> None:
        index, fd = self._take_vring_fd("SET_VRING_ERR", message)
        vring = self.vrings[index]
        close_fd(vring.err_fd)
        vring.err_fd = fd

    async def _set_vring_enable(self, message: Message) -> None:
        index, flag = protocol.decode_vring_state(message.payload)
        vring = self._vring("SET_VRING_ENABLE", index)
        if flag > 1:
            raise MalformedError(f"SET_VRING_ENABLE: num {flag} of vring {index} is not 0 or 1")
        before = vring.enabled(self.features)
        vring.wanted = bool(flag)
        now = vring.enabled(self.features)
        if vring.started and now != before:
            await self._datapath.enable_ring(index, now)
            self._changed()

    # Network

    async def _send_rarp(self, message: Message) -> None:
        mac = message.payload[:6]
        if mac[0] & 1 or not any(mac):
            raise MalformedError(f"SEND_RARP: {mac.hex(':')} is not a unicast address")
        self._datapath.announce(mac)

    async def _net_set_mtu(self, message: Message) -> None:
        mtu = protocol.decode_u64(message.payload)
        if not MTU_MIN <= mtu <= MTU_MAX:
            raise DatapathError(f"MTU {mtu} is not between {MTU_MIN} and {MTU_MAX}")
        self._datapath.set_mtu(mtu)

    # Helpers

    def _vring(self, name: str, index: int) -> Vring:
        count = 2 * self._datapath.queue_pairs
        if index >= count:
            raise MalformedError(f"{name}: vring index {index}, the port has {count} vrings")
        if index not in self.vrings:
            self.vrings[index] = Vring(index)
        return self.vrings[index]

    def _take_vring_fd(self, name: str, message: Message) -> tuple[int, int]:
        """Vring index and descriptor (-1 for none) of a SET_VRING_KICK, CALL or ERR."""
        value = protocol.decode_u64(message.payload)
        if value & ~(VRING_IDX_MASK | VRING_NOFD):
            raise MalformedError(f"{name}: u64 {value:#x} has unknown bits")
        expected = 0 if value & VRING_NOFD else 1
        if len(message.fds) != expected:
            raise MalformedError(
                f"{name}: u64 {value:#x} came with {len(message.fds)} file descriptors, "
                f"expected {expected}"
            )
        index = value & VRING_IDX_MASK
        self._vring(name, index)
        if not expected:
            return index, -1
        check_eventfd(name, message.fds[0])
        return index, message.take_fd()

    def _running(self) -> list[Vring]:
        return [vring for vring in self.vrings.values() if vring.started]

    async def _change(self, vring: Vring, **new: int) -> None:
        """Change what a ring runs with; a running ring is stopped for that and goes on."""
        running = await self._stop([vring])
        for name, value in new.items():
            setattr(vring, name, value)
        if running or (vring.complete and self.regions):
            await self._start([vring])

    def _is_waiting(self, vring: Vring) -> bool:
        """Whether a stopped ring has all it needs to run, its memory included."""
        return (
            vring.complete
            and not vring.started
            and all(
                any(r.uva <= uva and uva + length <= r.uva + r.size for r in self.regions)
                for uva, length in vring.areas(self.features)
            )
        )

    async def _start(self, vrings: list[Vring]) -> None:
        for vring in vrings:
            if self._inband and not vring.callable and not vring.relayed:
                self._relay_calls(vring)
            # Before, not after: whoever is cancelled in the call has to stop it again.
            vring.started = True
            try:
                base = await self._datapath.start_ring(vring.index, vring.setup(self.features))
            except DatapathError:
                vring.started = False
                raise
            if base & 0xFFFF != vring.base & 0xFFFF:
                self._log.info(
                    "port %s: vring %d goes on from %d, where the used ring is, not from %d",
                    self._name, vring.index, base, vring.base,
                )  # fmt: skip
            vring.base = base
            # The driver may wait for what happened before: to be woken once too often is harmless.
            signal_fd(vring.call_fd)
        if vrings:
            self._changed()

    async def _stop(self, vrings: list[Vring]) -> list[Vring]:
        """Stop those that run and note where; returns them."""
        running = [vring for vring in vrings if vring.started]
        if not running:
            return []
        bases = await self._datapath.stop_rings([vring.index for vring in running])
        for vring, base in zip(running, bases, strict=True):
            vring.started = False
            vring.base = base
        if Feature.LOG_ALL in self.features:
            signal_fd(self._log_fd)
        self._changed()
        return running

    async def _release(self) -> None:
        await self._stop(self._running())
        for vring in self.vrings.values():
            vring.close()
        self.vrings.clear()
        self.regions = []
        self._log_fd = close_fd(self._log_fd)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        await self._datapath.set_memory([], [])


def _identity(region: MemRegion) -> tuple[int, int, int]:
    """What REM_MEM_REG names a region by; the mmap offset is ignored."""
    return region.gpa, region.size, region.uva


def _one_vring(index: int) -> bytes:
    """The payload of a notification about a vring; its number is reserved."""
    return protocol.encode_vring_state(VringState(index, 0))
