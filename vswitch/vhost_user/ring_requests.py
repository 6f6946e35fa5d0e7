"""Requests about virtqueues: where they are, when they run, through what they notify."""

from __future__ import annotations

import os

from vswitch.bounds import RING_SIZE_MAX
from vswitch.vhost_user import protocol
from vswitch.vhost_user.connection import Message
from vswitch.vhost_user.descriptors import close_fd
from vswitch.vhost_user.device import Device
from vswitch.vhost_user.protocol import (
    VRING_F_LOG,
    VRING_IDX_MASK,
    VRING_NOFD,
    Feature,
    MalformedError,
    VringState,
)
from vswitch.vhost_user.vring import Vring, check_eventfd

# The addresses a frontend may leave unaligned are none: VIRTIO 1.2 section 2.7.
_ALIGNMENT = (("desc_uva", 16), ("used_uva", 4), ("avail_uva", 2))


class RingRequests(Device):
    """SET_VRING_* and GET_VRING_BASE, VRING_KICK."""

    async def _set_vring_num(self, message: Message) -> None:
        index, size = protocol.decode_vring_state(message.payload)
        vring = self._vring("SET_VRING_NUM", index)
        packed = Feature.RING_PACKED in self.features
        if not 0 < size <= RING_SIZE_MAX or (size & (size - 1) and not packed):
            raise MalformedError(
                f"SET_VRING_NUM: num {size} of vring {index} "
                f"is not {'a number' if packed else 'a power of two'} from 1 to {RING_SIZE_MAX}"
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
                await self._datapath.log_rings({vring.index: vring.logged(self.features)})
        new = {name: getattr(addr, name) for name, _ in _ALIGNMENT}
        vring.homeless = False
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
        running = await self._stop([vring])
        vring.base = base
        if running:
            # A driver came anew, and its frontend knows no GET_VRING_BASE (Linux's virtio_uml,
            # DPDK's virtio-user up to 17.11): what is noted of the ring is about another one.
            self._datapath.forget_ring(index)
            await self._start_again(running)

    async def _get_vring_base(self, message: Message) -> bytes:
        index, _ = protocol.decode_vring_state(message.payload)
        vring = self._vring("GET_VRING_BASE", index)
        await self._stop([vring])
        vring.forget_kick()
        self._datapath.forget_ring(index)
        return protocol.encode_vring_state(VringState(index, vring.base))

    async def _set_vring_kick(self, message: Message) -> None:
        vring = self._check_vring_fd("SET_VRING_KICK", message)
        running = await self._stop([vring])
        close_fd(vring.kick_fd)
        # Not before: whoever is cancelled in the wait leaves it to the message, which closes it.
        vring.kick_fd = _take_fd(message)
        vring.kickable = True
        if running or vring.homeless:
            await self._start_again([vring])
        elif vring.complete and self.regions:
            await self._start([vring])

    async def _set_vring_call(self, message: Message) -> None:
        vring = self._check_vring_fd("SET_VRING_CALL", message)
        vring.stop_relaying()
        vring.callable = True
        old, vring.call_fd = vring.call_fd, _take_fd(message)
        if vring.started:
            self._datapath.set_call(vring.index, vring.call_fd, old)
        else:
            close_fd(old)
        # What was signalled through the old descriptor may not have been seen.
        self._signal(vring.call_fd)

    async def _set_vring_err(self, message: Message) -> None:
        vring = self._check_vring_fd("SET_VRING_ERR", message)
        close_fd(vring.err_fd)
        vring.err_fd = _take_fd(message)

    async def _set_vring_enable(self, message: Message) -> None:
        index, flag = protocol.decode_vring_state(message.payload)
        vring = self._vring("SET_VRING_ENABLE", index)
        if flag > 1:
            raise MalformedError(f"SET_VRING_ENABLE: num {flag} of vring {index} is not 0 or 1")
        before = vring.enabled(self.features)
        vring.retired = not flag and (vring.wanted or vring.retired)
        vring.wanted = bool(flag)
        now = vring.enabled(self.features)
        if vring.started and now != before:
            await self._datapath.enable_ring(index, now)
            self._changed()

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
        self._signal(vring.kick_fd)

    def _check_vring_fd(self, name: str, message: Message) -> Vring:
        """The virtqueue of a SET_VRING_KICK, CALL or ERR; its descriptor is one of ours to use."""
        value = protocol.decode_u64(message.payload)
        if value & ~(VRING_IDX_MASK | VRING_NOFD):
            raise MalformedError(f"{name}: u64 {value:#x} has unknown bits")
        expected = 0 if value & VRING_NOFD else 1
        if len(message.fds) != expected:
            raise MalformedError(
                f"{name}: u64 {value:#x} came with {len(message.fds)} file descriptors, "
                f"expected {expected}"
            )
        vring = self._vring(name, value & VRING_IDX_MASK)
        if expected:
            check_eventfd(name, message.fds[0])
        return vring


def _take_fd(message: Message) -> int:
    """The descriptor of a message, -1 if it has none."""
    return message.take_fd() if message.fds else -1
