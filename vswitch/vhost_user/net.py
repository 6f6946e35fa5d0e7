"""The network device: what it has besides what every vhost-user device has.

Its virtqueues come in pairs, a receiveq and a transmitq (VIRTIO 1.2, 5.1.2); it has an MTU, and an
address that moves with its guest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vswitch.bounds import MTU_MAX, MTU_MIN
from vswitch.vhost_user import backend, protocol
from vswitch.vhost_user.backend import Backend
from vswitch.vhost_user.connection import Connection, Message
from vswitch.vhost_user.datapath import Datapath, DatapathError
from vswitch.vhost_user.postcopy_requests import Postcopy
from vswitch.vhost_user.protocol import MalformedError, ProtocolFeature, Request

_NET_ONLY = ProtocolFeature.RARP | ProtocolFeature.MTU

PROTOCOL_FEATURES = backend.PROTOCOL_FEATURES | _NET_ONLY
"""What a network device offers in GET_PROTOCOL_FEATURES."""


class NetDatapath(Datapath, Protocol):
    """What a network device needs from the switch."""

    @property
    def queue_pairs(self) -> int:
        """The most queue pairs the port has."""
        ...

    def set_mtu(self, mtu: int) -> None:
        """The guest's MTU, in bytes. Raises DatapathError if it is more than the port's."""
        ...

    def announce(self, mac: bytes) -> None:
        """Send a broadcast RARP for a guest that came here by live migration."""
        ...


class NetBackend(Backend):
    """The vhost-user network device of one port, for as long as one frontend is connected."""

    _datapath: NetDatapath
    _pair_starts = False
    """One more queue pair starts, and its frontend goes on to wait for what it may not send."""
    _pairs_paid = 0
    _paid: tuple[bytes, ...] = ()
    """Answers that were sent ahead of what they answer."""

    def __init__(
        self,
        name: str,
        connection: Connection,
        datapath: NetDatapath,
        changed: Callable[[], None] = lambda: None,
        *,
        withheld: int = 0,
        counts_virtqueues: bool = False,
        translates: bool = True,
    ) -> None:
        """`counts_virtqueues`: the frontend takes the answer to GET_QUEUE_NUM for a number of
        virtqueues. The others are Backend's.
        """
        super().__init__(
            name,
            connection,
            datapath,
            2 * datapath.queue_pairs,
            changed,
            withheld=withheld,
            translates=translates,
        )
        self._counts_virtqueues = counts_virtqueues
        self._offered_protocol |= _NET_ONLY
        self._handlers |= {
            Request.SEND_RARP: self._send_rarp,
            Request.NET_SET_MTU: self._net_set_mtu,
        }

    @property
    def queue_num(self) -> int:
        """Queue pairs, but for who takes them for virtqueues."""
        return super().queue_num if self._counts_virtqueues else self._datapath.queue_pairs

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

    # Several queue pairs in postcopy

    async def _pay_ahead(self, request: Request) -> None:
        """Answer ADD_MEM_REGs that a frontend with several queue pairs waits for and has not sent.

        QEMU registers the memory for each pair, SET_FEATURES first, then GET_STATUS. Since 9.0 it
        sends memory requests with the first pair only, and waits for an answer with every pair all
        the same. Before that it sends them each time: then they have been answered when they come.
        """
        if self._postcopy is not Postcopy.LISTENING:
            return
        if request is Request.ADD_MEM_REG:
            self._pair_starts = False
        elif request is Request.SET_FEATURES:
            self._pair_starts = bool(self.regions) and self._pairs_paid < self._advices - 1
        if (
            not self._pair_starts
            or request is not self._last_before_memory
            or not self._answered.keys() >= {*self.regions}
        ):
            return
        self._pair_starts = False
        self._pairs_paid += 1
        self._paid = tuple(self._answered[region] for region in self.regions)
        for answer in self._paid:
            await self._reply(Request.ADD_MEM_REG, answer)

    @property
    def _last_before_memory(self) -> Request:
        """What a queue pair asks last before its memory."""
        if ProtocolFeature.STATUS in self.protocol_features:
            return Request.GET_STATUS
        return Request.SET_FEATURES

    def _was_paid(self, answer: bytes) -> bool:
        if answer not in self._paid:
            return False
        at = self._paid.index(answer)
        self._paid = self._paid[:at] + self._paid[at + 1 :]
        return True

    async def _leave_postcopy(self) -> None:
        await super()._leave_postcopy()
        self._pair_starts, self._pairs_paid, self._paid = False, 0, ()
