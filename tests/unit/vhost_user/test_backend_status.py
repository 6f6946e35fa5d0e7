"""Device status, and what a reset keeps."""

from __future__ import annotations

import os

import pytest

from tests.support.wire import OFFERED, Eventfd, Peer, addr, state, with_peer
from tests.unit.vhost_user.test_backend import (
    ALL,
    REGION,
    complaint,
    give_memory,
    negotiate,
    running,
    u64,
)
from vswitch.vhost_user.protocol import Feature, Request, Status

READY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


def test_what_was_set_is_what_is_told() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        assert await peer.ask(Request.GET_STATUS) == u64(0)
        for value in (1, 3, 11, 15):
            await peer.send(Request.SET_STATUS, u64(value))
            assert await peer.ask(Request.GET_STATUS) == u64(value)
        assert peer.backend.status == READY

    with_peer(test)


def test_rings_do_not_care() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        del peer.datapath.calls[:]
        for value in (1, 3, 11, 15, 7, 128):
            assert await peer.ack(Request.SET_STATUS, u64(value)) == 0
        assert peer.datapath.calls == []
        assert list(peer.datapath.running) == [0]

    with_peer(test)


def test_features_that_were_refused_are_not_ok() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        assert await peer.ack(Request.SET_FEATURES, u64(ALL | 1 << 63)) == 1
        assert peer.backend.features == ALL
        await peer.send(Request.SET_STATUS, u64(11))
        assert await peer.ask(Request.GET_STATUS) == u64(3)
        assert await peer.ack(Request.SET_FEATURES, u64(OFFERED)) == 0
        await peer.send(Request.SET_STATUS, u64(11))
        assert await peer.ask(Request.GET_STATUS) == u64(11)

    with_peer(test)


@pytest.mark.parametrize("how", [Request.SET_STATUS, Request.RESET_DEVICE])
def test_a_reset_keeps_what_is_said_once_a_connection(how: Request) -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        with Eventfd() as call, Eventfd() as err:
            await peer.send(Request.SET_VRING_CALL, u64(0), [call])
            await peer.send(Request.SET_VRING_ERR, u64(0), [err])
            await peer.send(Request.SET_STATUS, u64(15))
            assert await peer.ack(how, u64(0) if how is Request.SET_STATUS else b"") == 0
            assert peer.datapath.running == {}
            assert (peer.backend.features, peer.backend.status) == (Feature(0), Status(0))
            assert peer.backend.regions == [REGION]
            # QEMU starts a device again without a word about calls and errors.
            await negotiate(peer)
            await peer.send(Request.SET_VRING_NUM, state(0, 128))
            await peer.send(Request.SET_VRING_ADDR, addr(0))
            with Eventfd() as kick:
                await peer.send(Request.SET_VRING_KICK, u64(0), [kick])
            await peer.ask(Request.GET_FEATURES)
            setup = peer.datapath.running[0]
            assert (setup.size, setup.enabled) == (128, False)
            os.eventfd_read(call)
            os.eventfd_write(setup.call_fd, 5)
            assert os.eventfd_read(call) == 5
            peer.backend.signal_error(0)
            assert os.eventfd_read(err) == 1

    with_peer(test)


def test_where_a_ring_was_is_told_after_status_0() -> None:
    """QEMU 7.2 asks in this order when a guest stops, and sends the answer along in a migration."""

    async def test(peer: Peer) -> None:
        await running(peer)
        assert await peer.ack(Request.SET_STATUS, u64(0)) == 0
        assert peer.datapath.running == {}
        assert await peer.ask(Request.GET_VRING_BASE, state(0, 0)) == state(0, 100)

    with_peer(test)


def test_a_ring_needs_everything_again_after_a_reset() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        await peer.send(Request.RESET_DEVICE)
        await give_memory(peer)
        assert peer.datapath.running == {}
        with Eventfd() as kick:
            await peer.send(Request.SET_VRING_KICK, u64(0), [kick])
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.running == {}

    with_peer(test)


def test_more_than_eight_bits() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        await peer.send(Request.SET_STATUS, u64(0x100))
        assert complaint(await peer.hung_up()) == "SET_STATUS: u64 0x100 is more than 8 bits"

    with_peer(test)
