"""Dirty page logging as the frontend asks for it: SET_LOG_BASE, SET_LOG_FD, LOG_ALL, F_LOG."""

from __future__ import annotations

import os

import pytest

from tests.support.wire import Eventfd, Peer, addr, state, with_peer
from tests.unit.vhost_user.test_backend import (
    ALL,
    complaint,
    memory_fd,
    negotiate,
    running,
    start,
    u64,
)
from vswitch.vhost_user import protocol
from vswitch.vhost_user.datapath import RingLog
from vswitch.vhost_user.net import PROTOCOL_FEATURES
from vswitch.vhost_user.protocol import (
    FLAG_NEED_REPLY,
    Feature,
    LogArea,
    ProtocolFeature,
    Request,
)

AREA = protocol.encode_log(LogArea(0x1000, 0x2000))
LOGGING = ALL | Feature.LOG_ALL


async def set_log_base(peer: Peer, payload: bytes = AREA, *, flags: int = 0) -> bytes:
    """The reply's payload."""
    fd = memory_fd()
    try:
        await peer.send(Request.SET_LOG_BASE, payload, [fd], flags=flags)
    finally:
        os.close(fd)
    answered, flags, data = await peer.reply()
    assert (answered, flags) == (Request.SET_LOG_BASE, 0x5)
    return data


def test_there_is_always_a_reply() -> None:
    """QEMU and DPDK do without a payload where no acknowledgement was asked for."""

    async def test(peer: Peer) -> None:
        await negotiate(peer)
        assert await set_log_base(peer) == b""
        assert await set_log_base(peer, flags=FLAG_NEED_REPLY) == u64(0)
        assert peer.datapath.calls == [("set_dirty_log", 0x1000, 0x2000)] * 2
        peer.datapath.refuse["set_dirty_log"] = "the log's size is 0"
        assert await set_log_base(peer, flags=FLAG_NEED_REPLY) == u64(1)

    with_peer(test)


def test_a_log_that_cannot_be_ends_a_blind_connection() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        peer.datapath.refuse["set_dirty_log"] = "the log's size is 0"
        fd = memory_fd()
        await peer.send(Request.SET_LOG_BASE, AREA, [fd])
        os.close(fd)
        assert complaint(await peer.hung_up()) == "SET_LOG_BASE: the log's size is 0"

    with_peer(test)


def test_logging_begins_and_ends_under_running_rings() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        await set_log_base(peer)
        del peer.datapath.calls[:]
        await peer.send(Request.SET_FEATURES, u64(LOGGING))
        await peer.send(Request.SET_VRING_ADDR, addr(0, flags=1, log_gpa=0x3000))
        await peer.send(Request.SET_FEATURES, u64(ALL))
        await peer.send(Request.SET_VRING_ADDR, addr(0))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.calls == [
            ("log_rings", {0: RingLog(None)}),
            ("log_rings", {0: RingLog(0x3000)}),
            ("log_rings", {0: None}),
        ]
        assert list(peer.datapath.running) == [0]

    with_peer(test)


def test_the_address_alone_logs_nothing() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        del peer.datapath.calls[:]
        await peer.send(Request.SET_VRING_ADDR, addr(0, flags=1, log_gpa=0x3000))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.calls == []
        await peer.send(Request.SET_FEATURES, u64(LOGGING))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.calls == [("log_rings", {0: RingLog(0x3000)})]

    with_peer(test)


def test_rings_that_start_or_move_meanwhile() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        await peer.send(Request.SET_FEATURES, u64(LOGGING))
        await start(peer, 1)
        assert peer.datapath.running[1].logged == RingLog(None)
        await peer.send(Request.SET_VRING_ADDR, addr(1, flags=1, log_gpa=0x5000, avail_uva=0x2100))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.running[1].logged == RingLog(0x5000)
        # Another change as well: rings stop for it, and log when they go on.
        await peer.send(Request.SET_FEATURES, u64(LOGGING & ~Feature.MRG_RXBUF))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.running[1].logged == RingLog(0x5000)
        await peer.send(Request.SET_FEATURES, u64(ALL))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.running[1].logged is None

    with_peer(test)


def test_a_reset_ends_logging() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        await peer.send(Request.SET_FEATURES, u64(LOGGING))
        await peer.send(Request.SET_VRING_ADDR, addr(0, flags=1, log_gpa=0x3000))
        await peer.send(Request.RESET_DEVICE)
        await negotiate(peer)
        await start(peer)
        assert peer.datapath.running[0].logged is None
        await peer.send(Request.SET_FEATURES, u64(LOGGING))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.calls[-1] == ("log_rings", {0: RingLog(None)})

    with_peer(test)


def test_the_frontend_hears_that_something_was_logged() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        with Eventfd() as first, Eventfd() as second:
            for fd in (first, second):
                assert await peer.ack(Request.SET_LOG_FD, b"", [fd]) == 0
            await peer.send(Request.SET_FEATURES, u64(LOGGING))
            await peer.ask(Request.GET_VRING_BASE, state(0, 0))
            assert os.eventfd_read(second) == 1
            os.set_blocking(first, False)
            with pytest.raises(BlockingIOError):
                os.eventfd_read(first)

    with_peer(test)


@pytest.mark.parametrize("request_", [Request.SET_LOG_BASE, Request.SET_LOG_FD])
def test_what_is_refused(request_: Request) -> None:
    payload = AREA if request_ is Request.SET_LOG_BASE else b""

    async def no_descriptor(peer: Peer) -> None:
        await negotiate(peer)
        await peer.send(request_, payload)
        assert "0 file descriptors came with it, expected 1" in complaint(await peer.hung_up())

    async def not_negotiated(peer: Peer) -> None:
        left = PROTOCOL_FEATURES & ~ProtocolFeature.LOG_SHMFD
        await peer.send(Request.SET_PROTOCOL_FEATURES, u64(left))
        with Eventfd() as fd:
            await peer.send(request_, payload, [fd])
        assert "LOG_SHMFD was not negotiated" in complaint(await peer.hung_up())

    with_peer(no_descriptor)
    with_peer(not_negotiated)


def test_only_eventfds_hear_of_it() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        fd = memory_fd()
        await peer.send(Request.SET_LOG_FD, b"", [fd])
        os.close(fd)
        assert "is no eventfd" in complaint(await peer.hung_up())

    with_peer(test)
