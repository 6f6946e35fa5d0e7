"""IOTLB_MSG, and the misses that it answers ("IOMMU support" of the protocol document)."""

from __future__ import annotations

from collections.abc import Callable

from vswitch.vhost_user import protocol
from vswitch.vhost_user.connection import Message
from vswitch.vhost_user.datapath import DatapathError
from vswitch.vhost_user.device import Device
from vswitch.vhost_user.protocol import (
    BackendRequest,
    IotlbEntry,
    IotlbType,
    MalformedError,
)


class IotlbRequests(Device):
    """What a frontend says about I/O virtual addresses, and how it is asked."""

    async def _iotlb_msg(self, message: Message) -> None:
        entry = protocol.decode_iotlb(message.payload)
        if not self.behind_iommu:
            raise DatapathError("ACCESS_PLATFORM and BACKEND_REQ were not both negotiated")
        self._datapath.use_iotlb(True)
        if entry.type is IotlbType.INVALIDATE:
            await self._datapath.iotlb_invalidate(entry.iova, entry.size)
        elif entry.type is IotlbType.UPDATE:
            self._datapath.iotlb_update(entry.iova, entry.size, entry.uva, entry.access)
            # Those that wait for where they themselves are.
            await self._start([vring for vring in self.vrings.values() if self._is_waiting(vring)])
        else:
            raise MalformedError(f"IOTLB_MSG: type {entry.type} is the backend's to send")

    def ask_translation(self, iova: int, access: int, answered: Callable[[int], None]) -> bool:
        """Send an IOTLB miss; False if there is no way to.

        `answered` gets the frontend's status, 0 for success, which comes after its update, if it
        sends one. With a frontend without REPLY_ACK it is never called.
        """
        if self._channel is None or not self._channel.is_open:
            return False
        miss = IotlbEntry(iova, 0, 0, access, IotlbType.MISS)
        self._channel.post(BackendRequest.IOTLB_MSG, protocol.encode_iotlb(miss), answered)
        return True
