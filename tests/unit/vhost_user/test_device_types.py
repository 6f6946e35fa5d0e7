"""What every vhost-user device has, and what a type of device adds to it."""

from __future__ import annotations

import pytest

from tests.support.wire import Peer, RecordingDatapath, state, with_peer
from tests.unit.vhost_user.test_backend import complaint, give_memory, negotiate, start, u64
from vswitch.vhost_user import backend, net
from vswitch.vhost_user.backend import Backend
from vswitch.vhost_user.connection import Connection, Message
from vswitch.vhost_user.protocol import ProtocolFeature, Request

NET_ONLY = ProtocolFeature.RARP | ProtocolFeature.MTU


class Triple(Backend):
    """A device with three virtqueues and a request of its own."""

    def __init__(self, name: str, connection: Connection, datapath: RecordingDatapath) -> None:
        super().__init__(name, connection, datapath, 3)
        self._offered_protocol |= ProtocolFeature.MTU
        self._handlers[Request.NET_SET_MTU] = self._number
        self.numbers: list[bytes] = []

    async def _number(self, message: Message) -> None:
        self.numbers.append(message.payload)


def test_a_network_device_adds_to_what_all_have() -> None:
    assert not backend.PROTOCOL_FEATURES & NET_ONLY
    assert net.PROTOCOL_FEATURES == backend.PROTOCOL_FEATURES | NET_ONLY


def test_another_type_counts_virtqueues_and_has_all_of_them() -> None:
    async def test(peer: Peer) -> None:
        offered = backend.PROTOCOL_FEATURES | ProtocolFeature.MTU
        assert await peer.ask(Request.GET_PROTOCOL_FEATURES) == u64(offered)
        await negotiate(peer, protocol_features=ProtocolFeature.MQ)
        assert await peer.ask(Request.GET_QUEUE_NUM) == u64(3)
        await give_memory(peer)
        await start(peer, 2)
        assert list(peer.datapath.running) == [2]
        await peer.send(Request.SET_VRING_NUM, state(3, 256))
        assert complaint(await peer.hung_up()) == (
            "SET_VRING_NUM: vring index 3, the port has 3 vrings"
        )

    with_peer(test, device=Triple)


def test_another_type_handles_requests_of_its_own() -> None:
    async def test(peer: Peer) -> None:
        assert isinstance(peer.backend, Triple)
        await negotiate(peer, protocol_features=ProtocolFeature.MTU | ProtocolFeature.REPLY_ACK)
        assert await peer.ack(Request.NET_SET_MTU, u64(42)) == 0
        assert peer.backend.numbers == [u64(42)]
        assert peer.datapath.calls == []

    with_peer(test, device=Triple)


@pytest.mark.parametrize("request_", [Request.SEND_RARP, Request.NET_SET_MTU])
def test_requests_of_a_network_device_are_no_others(request_: Request) -> None:
    def plain(name: str, connection: Connection, datapath: RecordingDatapath) -> Backend:
        return Backend(name, connection, datapath, 1)

    async def test(peer: Peer) -> None:
        await negotiate(peer, protocol_features=ProtocolFeature.REPLY_ACK)
        assert await peer.ack(request_, u64(1500)) == 1
        assert peer.backend.refused == {request_.name: "it is not supported"}

    with_peer(test, device=plain)
