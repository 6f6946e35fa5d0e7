"""IOTLB messages in both directions, and rings whose own addresses are I/O virtual."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.wire import OFFERED, Peer, RecordingDatapath, addr, with_peer
from tests.unit.vhost_user.test_backend import complaint, give_memory, negotiate, start, u64
from tests.unit.vhost_user.test_backend_inband import channel
from vswitch.vhost_user import protocol
from vswitch.vhost_user.net import PROTOCOL_FEATURES
from vswitch.vhost_user.protocol import (
    FLAG_NEED_REPLY,
    BackendRequest,
    Feature,
    IotlbEntry,
    IotlbType,
    ProtocolFeature,
    Request,
)

BEHIND = OFFERED | Feature.ACCESS_PLATFORM | Feature.PROTOCOL_FEATURES


def datapath() -> RecordingDatapath:
    found = RecordingDatapath()
    found.features |= Feature.ACCESS_PLATFORM
    return found


def iotlb(kind: int, iova: int = 0x1000, size: int = 4096, uva: int = 0x1000) -> bytes:
    return protocol.encode_iotlb(IotlbEntry(iova, size, uva, 3, kind))  # type: ignore[arg-type]


async def behind_iommu(peer: Peer) -> None:
    await negotiate(peer)
    assert await peer.ack(Request.SET_FEATURES, u64(BEHIND)) == 0
    del peer.datapath.calls[:]


def test_updates_and_invalidations() -> None:
    async def test(peer: Peer) -> None:
        await behind_iommu(peer)
        assert await peer.ack(Request.IOTLB_MSG, iotlb(IotlbType.UPDATE, 5, 6, 7)) == 0
        # As QEMU sends it: uninitialized where an invalidation has nothing to say.
        garbage = IotlbEntry(8, 0, 0xDEAD_BEEF_DEAD_BEEF, 0x40, IotlbType.INVALIDATE)
        assert await peer.ack(Request.IOTLB_MSG, protocol.encode_iotlb(garbage)) == 0
        assert peer.datapath.calls == [
            ("use_iotlb", True), ("iotlb_update", 5, 6, 7, 3), ("iotlb_invalidate", 8, 0),
        ]  # fmt: skip
        peer.datapath.refuse["iotlb_update"] = "it is nowhere"
        assert await peer.ack(Request.IOTLB_MSG, iotlb(IotlbType.UPDATE)) == 1

    with_peer(test, datapath())


def test_a_ring_starts_when_it_is_translated() -> None:
    async def test(peer: Peer) -> None:
        await behind_iommu(peer)
        where = protocol.decode_vring_addr(addr(0)).desc_uva
        peer.datapath.pending = {where}
        await give_memory(peer)
        await start(peer)
        assert peer.datapath.running == {}
        assert await peer.ack(Request.IOTLB_MSG, iotlb(IotlbType.UPDATE, 1)) == 0
        assert peer.datapath.running == {}
        assert await peer.ack(Request.IOTLB_MSG, iotlb(IotlbType.UPDATE, where)) == 0
        assert list(peer.datapath.running) == [0]

    with_peer(test, datapath())


def test_a_ring_that_was_there_before_the_channel() -> None:
    async def test(peer: Peer) -> None:
        await behind_iommu(peer)
        peer.datapath.pending = {protocol.decode_vring_addr(addr(0)).desc_uva}
        await give_memory(peer)
        await start(peer)
        del peer.datapath.calls[:]
        with channel() as (_, fd):
            assert await peer.ack(Request.SET_BACKEND_REQ_FD, b"", [fd]) == 0
        # Which lets it ask for where the ring is.
        assert ("start", 0) in peer.datapath.calls

    with_peer(test, datapath())


@pytest.mark.parametrize("missing", ["feature", "channel"])
def test_not_without_both(missing: str) -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        if missing == "channel":
            await peer.ack(Request.SET_FEATURES, u64(BEHIND))
            without = PROTOCOL_FEATURES & ~(
                ProtocolFeature.BACKEND_REQ | ProtocolFeature.INBAND_NOTIFICATIONS
            )
            await peer.send(Request.SET_PROTOCOL_FEATURES, u64(without))
        assert await peer.ack(Request.IOTLB_MSG, iotlb(IotlbType.UPDATE)) == 1
        await peer.send(Request.IOTLB_MSG, iotlb(IotlbType.UPDATE))
        assert "ACCESS_PLATFORM and BACKEND_REQ were not both negotiated" in complaint(
            await peer.hung_up()
        )

    with_peer(test, datapath())


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (iotlb(0), "IOTLB_MSG: type 0 is unknown"),
        (iotlb(5), "IOTLB_MSG: type 5 is unknown"),
        (iotlb(IotlbType.MISS), "type 1 is the backend's to send"),
        (iotlb(IotlbType.ACCESS_FAIL), "type 4 is the backend's to send"),
        (iotlb(2)[:24] + b"\x04" + iotlb(2)[25:], "permissions 0x4 have unknown bits"),
        (iotlb(2)[:-1], "IOTLB_MSG: size is 31, expected 32"),
    ],
)
def test_messages_that_cannot_be(payload: bytes, why: str) -> None:
    async def test(peer: Peer) -> None:
        await behind_iommu(peer)
        await peer.send(Request.IOTLB_MSG, payload)
        assert why in complaint(await peer.hung_up())

    with_peer(test, datapath())


def test_misses() -> None:
    async def test(peer: Peer) -> None:
        await behind_iommu(peer)
        answers: list[int] = []
        assert not peer.backend.ask_translation(1, 2, answers.append), "there is no way to"
        with channel() as (there, fd):
            assert await peer.ack(Request.SET_BACKEND_REQ_FD, b"", [fd]) == 0
            assert peer.datapath.calls == [("ask_again",)]
            assert peer.backend.ask_translation(0x1234, 2, answers.append)
            request, flags, payload = await there.next()
            assert request == BackendRequest.IOTLB_MSG
            assert flags & FLAG_NEED_REPLY
            assert protocol.decode_iotlb(payload) == (0x1234, 0, 0, 2, IotlbType.MISS)
            assert answers == []
            there.answer(request, 0)
            assert peer.backend.ask_translation(0x5000, 1, answers.append)
            await there.next()
            there.answer(request, 1)
            while len(answers) < 2:
                await asyncio.sleep(0)
            assert answers == [0, 1]

    with_peer(test, datapath())
