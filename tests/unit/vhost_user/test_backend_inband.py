"""Requests of the backend to its frontend, and notifications as messages."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.wire import Eventfd, Peer, addr, state, with_peer
from tests.unit.vhost_user.test_backend import complaint, give_memory, negotiate, start, u64
from vswitch.vhost_user import protocol
from vswitch.vhost_user.net import PROTOCOL_FEATURES
from vswitch.vhost_user.protocol import (
    FLAG_REPLY,
    HEADER,
    VRING_NOFD,
    BackendRequest,
    ProtocolFeature,
    Request,
)


class Channel:
    """The frontend's end of the channel for backend requests."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)

    async def next(self) -> tuple[int, int, bytes]:
        """Request, flags and payload."""
        loop = asyncio.get_running_loop()
        request, flags, size = HEADER.unpack(await loop.sock_recv(self.sock, HEADER.size))
        return request, flags, await loop.sock_recv(self.sock, size) if size else b""

    def answer(self, request: int, value: int = 0) -> None:
        self.sock.send(protocol.encode(request, u64(value), flags=FLAG_REPLY))

    async def closed(self) -> bool:
        return await asyncio.get_running_loop().sock_recv(self.sock, 1) == b""

    def silent(self) -> bool:
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False


@contextmanager
def channel() -> Iterator[tuple[Channel, int]]:
    """The frontend's end, and the descriptor to give away."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs.fileno()


async def open_channel(peer: Peer, fd: int) -> None:
    assert await peer.ack(Request.SET_BACKEND_REQ_FD, b"", [fd]) == 0


async def inband(peer: Peer, fd: int) -> None:
    """All that a ring needs when nothing is an eventfd, but the first kick."""
    await negotiate(peer, protocol_features=PROTOCOL_FEATURES)
    await open_channel(peer, fd)
    await give_memory(peer)
    await peer.send(Request.SET_VRING_NUM, state(0, 256))
    await peer.send(Request.SET_VRING_BASE, state(0, 7))
    await peer.send(Request.SET_VRING_ADDR, addr(0))
    await peer.send(Request.SET_VRING_ENABLE, state(0, 1))
    await peer.ask(Request.GET_FEATURES)


CALL = (BackendRequest.VRING_CALL, 0x9, struct.pack("=II", 0, 0))
ERR = (BackendRequest.VRING_ERR, 0x9, struct.pack("=II", 0, 0))


def test_the_first_kick_starts_a_ring_that_is_not_polled() -> None:
    async def test(peer: Peer) -> None:
        with channel() as (_, fd):
            await inband(peer, fd)
            assert peer.datapath.running == {}
            assert await peer.ack(Request.VRING_KICK, state(0, 0)) == 0
            setup = peer.datapath.running[0]
            assert setup.kick_fd >= 0
            assert os.eventfd_read(setup.kick_fd) == 1
            assert await peer.ack(Request.VRING_KICK, state(0, 0)) == 0
            assert os.eventfd_read(setup.kick_fd) == 1
            assert [call[0] for call in peer.datapath.calls].count("start") == 1

    with_peer(test)


def test_calls_become_messages_one_at_a_time() -> None:
    async def test(peer: Peer) -> None:
        with channel() as (frontend, fd):
            await inband(peer, fd)
            await peer.ack(Request.VRING_KICK, state(0, 0))
            # At the start, the driver may have missed something.
            assert await frontend.next() == CALL
            call_fd = peer.datapath.running[0].call_fd
            for _ in range(3):
                os.eventfd_write(call_fd, 1)
                await peer.ask(Request.GET_FEATURES)
            assert frontend.silent(), "the last one was not answered yet"
            frontend.answer(BackendRequest.VRING_CALL)
            assert await frontend.next() == CALL
            frontend.answer(BackendRequest.VRING_CALL)
            await peer.ask(Request.GET_FEATURES)
            assert frontend.silent(), "three calls that waited are one"

    with_peer(test)


def test_errors_become_messages() -> None:
    async def test(peer: Peer) -> None:
        with channel() as (frontend, fd):
            await inband(peer, fd)
            await peer.send(Request.SET_VRING_CALL, u64(0 | VRING_NOFD))
            await peer.ack(Request.VRING_KICK, state(0, 0))
            assert peer.datapath.running[0].call_fd == -1, "the driver polls"
            peer.backend.signal_error(0)
            assert await frontend.next() == ERR

    with_peer(test)


def test_descriptors_are_preferred() -> None:
    async def test(peer: Peer) -> None:
        with channel() as (frontend, fd), Eventfd() as call, Eventfd() as err, Eventfd() as kick:
            await inband(peer, fd)
            await peer.ack(Request.VRING_KICK, state(0, 0))
            assert await frontend.next() == CALL
            frontend.answer(BackendRequest.VRING_CALL)
            await peer.send(Request.SET_VRING_CALL, u64(0), [call])
            await peer.send(Request.SET_VRING_ERR, u64(0), [err])
            await peer.send(Request.SET_VRING_KICK, u64(0), [kick])
            await peer.ask(Request.GET_FEATURES)
            os.eventfd_read(call)
            os.eventfd_write(peer.datapath.running[0].call_fd, 3)
            assert os.eventfd_read(call) == 3
            peer.backend.signal_error(0)
            assert os.eventfd_read(err) == 1
            # A message is a kick all the same.
            await peer.ack(Request.VRING_KICK, state(0, 0))
            assert os.eventfd_read(kick) == 1
            assert frontend.silent()

    with_peer(test)


def test_calls_made_before_there_was_a_channel() -> None:
    async def test(peer: Peer) -> None:
        with channel() as (_, fd), channel() as (late, late_fd):
            await inband(peer, fd)
            await peer.ack(Request.VRING_KICK, state(0, 0))
            await open_channel(peer, late_fd)
            assert await late.next() == CALL

    with_peer(test)


def test_a_new_channel_takes_the_place_of_the_old() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        first_end, first = socket.socketpair()
        first_end.setblocking(False)
        with first_end, channel() as (_, second):
            with first:
                await open_channel(peer, first.fileno())
            await open_channel(peer, second)
            assert await Channel(first_end).closed()

    with_peer(test)


def test_a_frontend_that_never_reads_costs_nothing() -> None:
    """Without REPLY_ACK nothing is awaited; the socket fills up, and the same is said once."""

    async def test(peer: Peer) -> None:
        with channel() as (frontend, fd):
            await peer.send(Request.SET_PROTOCOL_FEATURES, u64(PROTOCOL_FEATURES & ~_NEEDS_ACK))
            await peer.send(Request.SET_BACKEND_REQ_FD, b"", [fd])
            await peer.ask(Request.GET_FEATURES)
            channel_ = peer.backend._channel
            assert channel_ is not None
            for _ in range(100_000):
                channel_.post(BackendRequest.CONFIG_CHANGE_MSG)
            assert len(channel_._waiting) <= 1
            await peer.ask(Request.GET_FEATURES)
            got = 0
            while not frontend.silent():
                got += len(frontend.sock.recv(1 << 20))
                await peer.ask(Request.GET_FEATURES)
            assert got % HEADER.size == 0
            assert channel_._waiting == {}

    with_peer(test)


_NEEDS_ACK = ProtocolFeature.REPLY_ACK | ProtocolFeature.INBAND_NOTIFICATIONS


@pytest.mark.parametrize(
    "reply",
    [
        protocol.encode(BackendRequest.VRING_ERR, u64(0), flags=FLAG_REPLY),
        protocol.encode(BackendRequest.VRING_CALL, u64(0)),
        b"\0" * 20,
        protocol.encode(BackendRequest.VRING_CALL, u64(0), flags=FLAG_REPLY) * 2,
    ],
)
def test_replies_that_cannot_be_end_the_channel_and_nothing_else(reply: bytes) -> None:
    async def test(peer: Peer) -> None:
        frontend, theirs = socket.socketpair()
        with frontend:
            with theirs:
                await inband(peer, theirs.fileno())
            await peer.ack(Request.VRING_KICK, state(0, 0))
            end = Channel(frontend)
            assert await end.next() == CALL
            frontend.send(reply)
            assert await end.closed()
        os.eventfd_write(peer.datapath.running[0].call_fd, 1)
        await peer.ask(Request.GET_FEATURES)
        assert list(peer.datapath.running) == [0]

    with_peer(test)


def test_a_refusal_is_not_the_end() -> None:
    async def test(peer: Peer) -> None:
        with channel() as (frontend, fd):
            await inband(peer, fd)
            await peer.ack(Request.VRING_KICK, state(0, 0))
            for _ in range(3):
                assert await frontend.next() == CALL
                frontend.answer(BackendRequest.VRING_CALL, 1)
                os.eventfd_write(peer.datapath.running[0].call_fd, 1)

    with_peer(test)


def test_a_frontend_that_closes_the_channel() -> None:
    async def test(peer: Peer) -> None:
        frontend, theirs = socket.socketpair()
        with theirs:
            await inband(peer, theirs.fileno())
        frontend.close()
        await peer.ack(Request.VRING_KICK, state(0, 0))
        os.eventfd_write(peer.datapath.running[0].call_fd, 1)
        await peer.ask(Request.GET_FEATURES)
        assert list(peer.datapath.running) == [0]

    with_peer(test)


@pytest.mark.parametrize("missing", [ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK])
def test_inband_needs_two_others(missing: ProtocolFeature) -> None:
    async def test(peer: Peer) -> None:
        await peer.send(Request.SET_PROTOCOL_FEATURES, u64(PROTOCOL_FEATURES & ~missing))
        why = complaint(await peer.hung_up())
        assert "INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK" in why

    with_peer(test)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (state(9, 0), "VRING_KICK: vring index 9"),
        (state(0, 1), "VRING_KICK: num 1 of vring 0 is not 0"),
    ],
)
def test_wrong_kicks(payload: bytes, why: str) -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer, protocol_features=PROTOCOL_FEATURES)
        await peer.send(Request.VRING_KICK, payload)
        assert why in complaint(await peer.hung_up())

    with_peer(test)


@pytest.mark.parametrize("kind", ["eventfd", "datagram", "internet"])
def test_only_unix_streams_are_channels(kind: str) -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        if kind == "eventfd":
            with Eventfd() as fd:
                await peer.send(Request.SET_BACKEND_REQ_FD, b"", [fd])
        else:
            family = socket.AF_UNIX if kind == "datagram" else socket.AF_INET
            sort = socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM
            with socket.socket(family, sort) as sock:
                await peer.send(Request.SET_BACKEND_REQ_FD, b"", [sock.fileno()])
        assert "is no Unix stream socket" in complaint(await peer.hung_up())

    with_peer(test)


def test_a_stopped_ring_starts_at_the_next_kick() -> None:
    async def test(peer: Peer) -> None:
        with channel() as (_, fd):
            await inband(peer, fd)
            await peer.ack(Request.VRING_KICK, state(0, 0))
            assert await peer.ask(Request.GET_VRING_BASE, state(0, 0)) == state(0, 100)
            assert peer.datapath.running == {}
            await peer.ack(Request.VRING_KICK, state(0, 0))
            assert peer.datapath.running[0].base == 100

    with_peer(test)


def test_with_eventfds_nothing_is_sent() -> None:
    """As QEMU does, which accepts every feature it knows of."""

    async def test(peer: Peer) -> None:
        with channel() as (frontend, fd):
            await negotiate(peer, protocol_features=PROTOCOL_FEATURES)
            await open_channel(peer, fd)
            with Eventfd() as call:
                await peer.send(Request.SET_VRING_CALL, u64(0), [call])
            await give_memory(peer)
            await start(peer)
            assert list(peer.datapath.running) == [0]
            assert frontend.silent()

    with_peer(test)
