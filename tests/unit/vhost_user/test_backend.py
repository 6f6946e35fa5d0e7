"""The backend's state machine, driven through a real socket by a frontend written by hand."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import socket
import time
from pathlib import Path

import pytest

from tests.support.wire import (
    OFFERED,
    Eventfd,
    Peer,
    RecordingDatapath,
    addr,
    state,
    with_peer,
)
from vswitch.errors import ProtocolError
from vswitch.fastpath.main.engine import Engine
from vswitch.vhost_user import connection, protocol
from vswitch.vhost_user.datapath import RingSetup
from vswitch.vhost_user.descriptors import close_fd
from vswitch.vhost_user.net import PROTOCOL_FEATURES
from vswitch.vhost_user.pace import PIECE_S
from vswitch.vhost_user.protocol import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HEADER,
    VRING_NOFD,
    Feature,
    Inflight,
    MemRegion,
    ProtocolFeature,
    Request,
)

REGION = MemRegion(0, 0x10000, 0x1000, 0)
ALL = Feature.PROTOCOL_FEATURES | OFFERED
USUAL_PROTOCOL = PROTOCOL_FEATURES & ~ProtocolFeature.INBAND_NOTIFICATIONS
"""Kicks and calls through eventfds, as nearly everybody has them."""


def u64(value: int) -> bytes:
    return protocol.encode_u64(value)


def memory_fd() -> int:
    fd = os.memfd_create("guest")
    os.truncate(fd, 0x10000)
    return fd


async def give_memory(peer: Peer) -> None:
    fd = memory_fd()
    try:
        await peer.send(Request.SET_MEM_TABLE, protocol.encode_mem_table([REGION]), [fd])
        await peer.ask(Request.GET_FEATURES)
    finally:
        os.close(fd)


async def negotiate(
    peer: Peer, features: int = ALL, protocol_features: int = USUAL_PROTOCOL
) -> None:
    await peer.send(Request.SET_PROTOCOL_FEATURES, u64(protocol_features))
    await peer.send(Request.SET_FEATURES, u64(features))


async def start(peer: Peer, vring: int = 0, *, enable: bool = True) -> None:
    """All that a ring needs, in QEMU's order."""
    await peer.send(Request.SET_VRING_NUM, state(vring, 256))
    await peer.send(Request.SET_VRING_BASE, state(vring, 7))
    await peer.send(Request.SET_VRING_ADDR, addr(vring))
    with Eventfd() as kick, Eventfd() as call:
        await peer.send(Request.SET_VRING_KICK, u64(vring), [kick])
        await peer.send(Request.SET_VRING_CALL, u64(vring), [call])
    if enable:
        await peer.send(Request.SET_VRING_ENABLE, state(vring, 1))
    await peer.ask(Request.GET_FEATURES)


async def running(peer: Peer) -> None:
    await negotiate(peer)
    await give_memory(peer)
    await start(peer)
    assert list(peer.datapath.running) == [0]


def complaint(exc: BaseException | None) -> str:
    assert isinstance(exc, ProtocolError)
    return exc.message


def test_offers() -> None:
    async def test(peer: Peer) -> None:
        assert await peer.ask(Request.GET_FEATURES) == u64(ALL | Feature.LOG_ALL)
        assert await peer.ask(Request.GET_PROTOCOL_FEATURES) == u64(PROTOCOL_FEATURES)
        await negotiate(peer)
        assert await peer.ask(Request.GET_QUEUE_NUM) == u64(2)

    with_peer(test)


def test_a_ring_starts_when_nothing_is_missing_and_not_before() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        await give_memory(peer)
        await peer.send(Request.SET_VRING_NUM, state(1, 128))
        await peer.send(Request.SET_VRING_BASE, state(1, 9))
        await peer.send(Request.SET_VRING_ADDR, addr(1))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.running == {}
        with Eventfd() as kick:
            await peer.send(Request.SET_VRING_KICK, u64(1), [kick])
        await peer.ask(Request.GET_FEATURES)
        setup = peer.datapath.running[1]
        assert (setup.size, setup.base, setup.enabled, setup.call_fd) == (128, 9, False, -1)
        assert setup.features == ALL
        await peer.send(Request.SET_VRING_ENABLE, state(1, 1))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.calls[-1] == ("enable", 1, True)

    with_peer(test)


def test_a_ring_set_up_before_the_memory_starts_with_it() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        await start(peer)
        assert peer.datapath.running == {}
        await give_memory(peer)
        assert list(peer.datapath.running) == [0]

    with_peer(test)


class SlowDatapath(RecordingDatapath):
    """Starting a ring takes a piece of time each, without waiting for anything."""

    def __init__(self) -> None:
        super().__init__(queue_pairs=8)
        self.turns = 0
        self.turns_at_start: list[int] = []

    async def start_ring(self, index: int, setup: RingSetup) -> int:
        self.turns_at_start.append(self.turns)
        time.sleep(PIECE_S)  # noqa: ASYNC251 - what the loop is to survive
        return await super().start_ring(index, setup)


def test_others_have_their_turn_between_two_rings() -> None:
    """However many start with one message."""
    datapath = SlowDatapath()

    async def count() -> None:
        while True:
            datapath.turns += 1
            await asyncio.sleep(0)

    async def test(peer: Peer) -> None:
        others = asyncio.create_task(count())
        for vring in range(16):
            await start(peer, vring)
        assert len(datapath.turns_at_start) == 0
        await give_memory(peer)
        others.cancel()
        assert len(datapath.turns_at_start) == 16
        assert len(set(datapath.turns_at_start)) == 16

    with_peer(test, datapath)


def test_without_protocol_features_rings_start_enabled() -> None:
    async def test(peer: Peer) -> None:
        await peer.send(Request.SET_FEATURES, u64(OFFERED))
        await give_memory(peer)
        await start(peer, enable=False)
        assert peer.datapath.running[0].enabled

    with_peer(test)


def test_get_vring_base_stops_and_a_new_kick_starts_again() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        assert await peer.ask(Request.GET_VRING_BASE, state(0, 0)) == state(0, 100)
        assert peer.datapath.running == {}
        # Nothing that comes now may start it but a kick descriptor.
        await peer.send(Request.SET_VRING_NUM, state(0, 64))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.running == {}
        with Eventfd() as kick:
            await peer.send(Request.SET_VRING_KICK, u64(0), [kick])
        await peer.ask(Request.GET_FEATURES)
        assert (peer.datapath.running[0].size, peer.datapath.running[0].base) == (64, 100)

    with_peer(test)


@pytest.mark.parametrize("what", ["memory", "address", "features", "size", "kick"])
def test_what_a_running_ring_depends_on_changes_under_a_stop(what: str) -> None:
    """The Datapath asserts that memory never changes under a running ring."""

    async def test(peer: Peer) -> None:
        await running(peer)
        del peer.datapath.calls[:]
        if what == "memory":
            await give_memory(peer)
        elif what == "address":
            await peer.send(Request.SET_VRING_ADDR, addr(0, avail_uva=0x2100))
        elif what == "features":
            await peer.send(Request.SET_FEATURES, u64(ALL & ~Feature.RING_EVENT_IDX))
        elif what == "size":
            await peer.send(Request.SET_VRING_NUM, state(0, 512))
        else:
            with Eventfd() as kick:
                await peer.send(Request.SET_VRING_KICK, u64(0), [kick])
        await peer.ask(Request.GET_FEATURES)
        names = [call[0] for call in peer.datapath.calls]
        assert names == ["stop", *(["set_memory"] if what == "memory" else []), "start"]
        assert peer.datapath.running[0].base == 100

    with_peer(test)


@pytest.mark.parametrize("what", ["address", "features", "size"])
def test_what_does_not_change_stops_nothing(what: str) -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        del peer.datapath.calls[:]
        if what == "address":
            await peer.send(Request.SET_VRING_ADDR, addr(0, flags=1))
        elif what == "features":
            await peer.send(Request.SET_FEATURES, u64(ALL))
        else:
            await peer.send(Request.SET_VRING_NUM, state(0, 256))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.calls == []

    with_peer(test)


def test_a_new_call_descriptor_is_signalled_at_once() -> None:
    """A driver may be waiting for what was signalled through the old one."""

    async def test(peer: Peer) -> None:
        await running(peer)
        with Eventfd() as call:
            await peer.send(Request.SET_VRING_CALL, u64(0), [call])
            await peer.ask(Request.GET_FEATURES)
            assert os.eventfd_read(call) == 1
        assert peer.datapath.calls[-1] == ("set_call", 0)
        await peer.send(Request.SET_VRING_CALL, u64(0 | VRING_NOFD))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.calls[-1] == ("set_call", 0)

    with_peer(test)


def test_the_frontend_hears_of_a_broken_ring() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        with Eventfd() as err:
            await peer.send(Request.SET_VRING_ERR, u64(0), [err])
            await peer.ask(Request.GET_FEATURES)
            peer.backend.signal_error(0)
            assert os.eventfd_read(err) == 1
        peer.backend.signal_error(3)  # a ring nobody set up: nothing to signal

    with_peer(test)


def test_a_kick_without_descriptor_means_polling() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        await give_memory(peer)
        await peer.send(Request.SET_VRING_NUM, state(0, 256))
        await peer.send(Request.SET_VRING_ADDR, addr(0))
        await peer.send(Request.SET_VRING_KICK, u64(0 | VRING_NOFD))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.running[0].kick_fd == -1

    with_peer(test)


def test_resets() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        await peer.send(Request.RESET_OWNER)
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.running == {}
        assert peer.backend.features == ALL
        await start(peer)
        await peer.send(Request.RESET_DEVICE)
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.running == {}
        assert peer.backend.features == Feature(0)
        assert not peer.backend.vrings[0].complete
        assert peer.backend.protocol_features == USUAL_PROTOCOL

    with_peer(test)


def test_acknowledgements() -> None:
    async def test(peer: Peer) -> None:
        # Not negotiated: NEED_REPLY is not honoured, and the next reply is GET_FEATURES'.
        await peer.send(Request.SET_OWNER, flags=FLAG_NEED_REPLY)
        await peer.ask(Request.GET_FEATURES)
        await negotiate(peer)
        assert await peer.ack(Request.SET_OWNER) == 0
        assert await peer.ack(Request.NET_SET_MTU, u64(1500)) == 0
        assert peer.datapath.calls[-1] == ("set_mtu", 1500)
        assert await peer.ack(Request.NET_SET_MTU, u64(67)) == 1
        # A request with a reply of its own has that and no other.
        assert await peer.ack(Request.GET_QUEUE_NUM) == 2
        # A request of a later time is refused, and the connection lives.
        assert await peer.ack(Request.CHECK_DEVICE_STATE) == 1
        assert await peer.ack(4242) == 1
        assert await peer.ack(Request.SET_OWNER) == 0

    with_peer(test)


@pytest.mark.parametrize("acked", [True, False])
def test_protocol_features_are_acknowledged_by_what_they_negotiate(acked: bool) -> None:
    """Linux's virtio_uml and rust-vmm's frontends wait for it; who gives REPLY_ACK up does not."""

    async def test(peer: Peer) -> None:
        await negotiate(peer, protocol_features=0 if acked else USUAL_PROTOCOL)
        told = ProtocolFeature.REPLY_ACK | ProtocolFeature.MTU if acked else ProtocolFeature.MTU
        if acked:
            assert await peer.ack(Request.SET_PROTOCOL_FEATURES, u64(told)) == 0
        else:
            await peer.send(Request.SET_PROTOCOL_FEATURES, u64(told), flags=FLAG_NEED_REPLY)
        # The next reply is this one's.
        await peer.ask(Request.GET_FEATURES)
        assert peer.backend.protocol_features == told

    with_peer(test)


def test_a_refusal_is_told_or_ends_the_connection() -> None:
    async def acknowledged(peer: Peer) -> None:
        await negotiate(peer)
        peer.datapath.refuse["set_memory"] = "region 0: no"
        fd = memory_fd()
        try:
            table = protocol.encode_mem_table([REGION])
            assert await peer.ack(Request.SET_MEM_TABLE, table, [fd]) == 1
        finally:
            os.close(fd)
        assert peer.backend.regions == []
        peer.datapath.refuse.clear()
        assert await peer.ack(Request.SET_OWNER) == 0

    async def blind(peer: Peer) -> None:
        await negotiate(peer)
        peer.datapath.refuse["set_mtu"] = "MTU 9000 is more than the port's"
        await peer.send(Request.NET_SET_MTU, u64(9000))
        assert complaint(await peer.hung_up()) == "NET_SET_MTU: MTU 9000 is more than the port's"

    with_peer(acknowledged)
    with_peer(blind)


def test_rarp() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        await peer.send(Request.SEND_RARP, bytes.fromhex("525400123456") + b"\0\0")
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.calls == [("announce", "52:54:00:12:34:56")]

    with_peer(test)


@pytest.mark.parametrize(
    ("request_", "payload", "what"),
    [
        (Request.SET_FEATURES, u64(1 << 63), "bits 0x8000000000000000, never offered"),
        (Request.SET_PROTOCOL_FEATURES, u64(1 << 40), "bits 0x10000000000, never offered"),
        (Request.SET_VRING_NUM, state(4, 256), "vring index 4, the port has 4 vrings"),
        (Request.SET_VRING_NUM, state(0, 0), "num 0 of vring 0 is not a power of two"),
        (Request.SET_VRING_NUM, state(0, 100), "num 100 of vring 0"),
        (Request.SET_VRING_NUM, state(0, 65536), "num 65536 of vring 0"),
        (Request.SET_VRING_ADDR, addr(0, desc_uva=0x1008), "desc_uva 0x1008 of vring 0 is not al"),
        (Request.SET_VRING_ADDR, addr(0, used_uva=0x3002), "used_uva 0x3002"),
        (Request.SET_VRING_ADDR, addr(0, avail_uva=0x2001), "avail_uva 0x2001"),
        (Request.SET_VRING_ADDR, addr(0, flags=2), "flags 0x2 are unknown"),
        (Request.SET_VRING_ADDR, addr(9), "vring index 9"),
        (Request.SET_VRING_BASE, state(0, 65536), "num 65536 of vring 0 is more than 16 bits"),
        (Request.GET_VRING_BASE, state(2**31, 0), "vring index 2147483648"),
        (Request.SET_VRING_ENABLE, state(0, 2), "num 2 of vring 0 is not 0 or 1"),
        (Request.SET_VRING_KICK, u64(0x200), "u64 0x200 has unknown bits"),
        (Request.SET_VRING_KICK, u64(0), "came with 0 file descriptors, expected 1"),
        (Request.SET_VRING_CALL, u64(255 | VRING_NOFD), "vring index 255"),
        (Request.SEND_RARP, b"\x01" + b"\0" * 7, "is not a unicast address"),
        (Request.SET_OWNER, b"x", "SET_OWNER: size is 1, expected 0"),
        (Request.SET_MEM_TABLE, protocol.encode_mem_table([REGION]), "1 regions came with 0 file"),
        (Request.GET_CONFIG, b"\0" * 12, "GET_CONFIG is not supported and was not offered"),
        (99, b"", "request 99 is not supported"),
    ],
)
def test_wrong_fields_end_the_connection_by_name(request_: int, payload: bytes, what: str) -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        await peer.send(request_, payload)
        message = complaint(await peer.hung_up())
        assert what in message
        assert message.startswith(protocol.request_name(request_))

    with_peer(test)


def test_requests_need_the_feature_they_belong_to() -> None:
    async def rarp(peer: Peer) -> None:
        await peer.send(Request.SEND_RARP, u64(0x123456))
        assert "protocol feature RARP was not negotiated" in complaint(await peer.hung_up())

    with_peer(rarp)


def test_enabling_before_the_features_as_qemu_does() -> None:
    async def test(peer: Peer) -> None:
        await peer.send(Request.SET_VRING_ENABLE, state(0, 1))
        await peer.send(Request.SET_VRING_ENABLE, state(1, 0))
        await running(peer)
        await start(peer, 1, enable=False)
        assert peer.datapath.running[0].enabled
        assert not peer.datapath.running[1].enabled
        assert ("enable", 0, True) not in peer.datapath.calls

    with_peer(test)


def test_enabling_means_nothing_without_protocol_features() -> None:
    async def test(peer: Peer) -> None:
        await peer.send(Request.SET_FEATURES, u64(OFFERED))
        await give_memory(peer)
        await start(peer, enable=False)
        await peer.send(Request.SET_VRING_ENABLE, state(0, 0))
        await peer.ask(Request.GET_FEATURES)
        assert "enable" not in [call[0] for call in peer.datapath.calls]
        assert peer.datapath.running[0].enabled

    with_peer(test)


def test_a_base_under_a_running_ring_stops_it_and_is_where_it_goes_on() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        del peer.datapath.calls[:]
        await peer.send(Request.SET_VRING_BASE, state(0, 3))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.calls == [("stop", 0), ("forget", 0), ("start", 0)]
        assert peer.datapath.running[0].base == 3

    with_peer(test)


def test_a_ring_that_lies_nowhere_waits_for_what_comes_next() -> None:
    """Between two messages of a driver that is set up anew a ring may be in no memory."""

    async def test(peer: Peer) -> None:
        await running(peer)
        fd = memory_fd()
        elsewhere = REGION._replace(uva=0x100000)
        table = protocol.encode_mem_table([elsewhere])
        assert await peer.ack(Request.SET_MEM_TABLE, table, [fd]) == 0
        assert peer.datapath.running == {}
        assert await peer.ack(Request.SET_VRING_NUM, state(0, 128)) == 0
        assert await peer.ack(Request.SET_VRING_BASE, state(0, 0)) == 0
        with Eventfd() as kick:
            assert await peer.ack(Request.SET_VRING_KICK, u64(0), [kick]) == 0
        assert peer.datapath.running == {}
        moved = addr(0, desc_uva=0x101000, used_uva=0x103000, avail_uva=0x102000)
        assert await peer.ack(Request.SET_VRING_ADDR, moved) == 0
        setup = peer.datapath.running[0]
        assert (setup.size, setup.base, setup.desc_uva) == (128, 0, 0x101000)
        # And back to memory that the ring is not in: it goes on when that is given again.
        assert await peer.ack(Request.SET_MEM_TABLE, protocol.encode_mem_table([REGION]), [fd]) == 0
        assert peer.datapath.running == {}
        assert await peer.ack(Request.SET_MEM_TABLE, table, [fd]) == 0
        os.close(fd)
        assert list(peer.datapath.running) == [0]

    with_peer(test)


def test_another_format_waits_for_rings_of_that_format() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        await peer.send(Request.SET_FEATURES, u64(ALL | Feature.RING_PACKED))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.running == {}
        await peer.send(Request.SET_VRING_NUM, state(0, 100))
        await peer.send(Request.SET_VRING_BASE, state(0, 0x8000))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.running == {}
        await peer.send(Request.SET_VRING_ADDR, addr(0))
        await peer.ask(Request.GET_FEATURES)
        assert (peer.datapath.running[0].size, peer.datapath.running[0].base) == (100, 0x8000)

    datapath = RecordingDatapath()
    datapath.features = OFFERED | Feature.RING_PACKED
    with_peer(test, datapath)


def test_a_ring_is_quiet_from_when_its_driver_disables_it() -> None:
    """Not one that was never enabled: its frontend says later what it wants."""

    async def test(peer: Peer) -> None:
        await negotiate(peer)
        await give_memory(peer)
        await start(peer, enable=False)
        assert not peer.datapath.running[0].quiet
        for flag in (1, 0):
            await peer.send(Request.SET_VRING_ENABLE, state(0, flag))
        await give_memory(peer)
        assert peer.datapath.running[0].quiet
        await peer.send(Request.SET_VRING_ENABLE, state(0, 1))
        await give_memory(peer)
        assert not peer.datapath.running[0].quiet
        await peer.send(Request.SET_VRING_ENABLE, state(0, 0))
        await peer.ask(Request.GET_VRING_BASE, state(0, 0))
        await start(peer, enable=False)
        assert not peer.datapath.running[0].quiet

    with_peer(test)


def test_a_reply_nobody_asked_for() -> None:
    async def test(peer: Peer) -> None:
        await peer.send(Request.GET_FEATURES, u64(0), flags=FLAG_REPLY)
        assert "marked as a reply" in complaint(await peer.hung_up())

    with_peer(test)


@pytest.mark.parametrize("kind", ["file", "pipe", "directory", "socket"])
def test_only_eventfds_are_taken_for_kick_and_call(kind: str, tmp_path: Path) -> None:
    async def test(peer: Peer) -> None:
        fds = {
            "file": lambda: [os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)],
            "pipe": lambda: list(os.pipe()),
            "directory": lambda: [os.open(tmp_path, os.O_RDONLY)],
            "socket": lambda: [os.dup(peer.sock.fileno())],
        }[kind]()
        try:
            await peer.send(Request.SET_VRING_KICK, u64(0), fds[:1])
            assert "SET_VRING_KICK: the file descriptor is no eventfd but" in complaint(
                await peer.hung_up()
            )
        finally:
            for fd in fds:
                os.close(fd)

    with_peer(test)


def test_descriptors_with_a_message_that_takes_none_are_closed() -> None:
    async def test(peer: Peer) -> None:
        with Eventfd() as fd:
            await peer.send(Request.SET_OWNER, b"", [fd])
        assert "1 file descriptors came with it, expected 0 to 0" in complaint(await peer.hung_up())

    with_peer(test)


@pytest.mark.parametrize("count", [9, 16, 40])
def test_too_many_descriptors(count: int) -> None:
    async def test(peer: Peer) -> None:
        with Eventfd() as fd:
            await peer.send(Request.SET_MEM_TABLE, b"\0" * 8, [fd] * count)
        assert complaint(await peer.hung_up()) == (
            "more than 8 file descriptors came with one message"
        )

    with_peer(test)


def test_an_end_between_messages_is_no_error() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        peer.sock.shutdown(2)
        assert await peer.hung_up() is None
        assert peer.datapath.calls[-2:] == [("stop", 0), ("set_memory", [])]

    with_peer(test)


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 19])
def test_an_end_in_the_middle_of_a_message(cut: int) -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        with Eventfd() as fd:
            message = protocol.encode(Request.SET_VRING_CALL, u64(0))
            await peer.send_raw(message[:cut], [fd])
        peer.sock.shutdown(1)
        assert "in the middle of a message" in complaint(await peer.hung_up())

    with_peer(test)


def test_a_message_that_never_ends_costs_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MESSAGE_PATIENCE_S", 0.05)

    async def test(peer: Peer) -> None:
        await running(peer)
        await peer.send_raw(HEADER.pack(Request.SET_FEATURES, 1, 8) + b"\0" * 3, [])
        assert "did not finish it in 0.05 s" in complaint(await peer.hung_up())

    with_peer(test)


def test_a_frontend_that_never_reads_costs_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MESSAGE_PATIENCE_S", 0.05)

    async def test(peer: Peer) -> None:
        ask = protocol.encode(Request.GET_FEATURES)
        while not peer.task.done():
            try:
                peer.sock.send(ask)
            except BlockingIOError:
                await asyncio.sleep(0.001)  # between two looks
            except (BrokenPipeError, ConnectionResetError):
                break
            else:
                await asyncio.sleep(0)
        assert "did not read its replies" in complaint(await peer.hung_up())

    with_peer(test)


def test_messages_in_single_bytes_are_put_together() -> None:
    async def test(peer: Peer) -> None:
        for byte in protocol.encode(Request.SET_FEATURES, u64(ALL)):
            await peer.send_raw(bytes([byte]), [])
            await asyncio.sleep(0)
        await peer.ask(Request.GET_FEATURES)
        assert peer.backend.features == ALL

    with_peer(test)


def test_many_messages_at_once() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        await peer.send_raw(protocol.encode(Request.GET_FEATURES) * 50, [])
        for _ in range(50):
            assert (await peer.reply())[2] == u64(ALL | Feature.LOG_ALL)

    with_peer(test)


def test_cancelling_releases_everything() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        peer.task.cancel()
        await asyncio.wait([peer.task])
        assert peer.task.cancelled()
        assert peer.datapath.running == {}
        assert select.select([peer.sock], [], [], 1.0)[0]
        assert peer.sock.recv(1) == b""

    with_peer(test)


def test_cancelling_in_the_middle_of_a_new_descriptor() -> None:
    """As when the port is deleted while workers are waited for; `with_peer` counts descriptors."""

    class Stalling(RecordingDatapath):
        async def stop_rings(self, indices: list[int]) -> list[int]:
            if not stalled.is_set() and armed:
                stalled.set()
                await asyncio.get_running_loop().create_future()
            return await super().stop_rings(indices)

    armed = False
    stalled = asyncio.Event()

    async def test(peer: Peer) -> None:
        nonlocal armed
        await running(peer)
        armed = True
        with Eventfd() as fd:
            await peer.send(Request.SET_VRING_KICK, u64(0), [fd])
        await stalled.wait()
        peer.task.cancel()
        await asyncio.wait([peer.task])
        assert peer.task.cancelled()

    with_peer(test, Stalling())


def test_the_old_call_descriptor_is_the_datapaths_while_the_ring_runs() -> None:
    """A worker may signal through it: who waits for workers closes it, and nobody else."""

    kept: list[tuple[int, int]] | None = None

    class Keeping(RecordingDatapath):
        def set_call(self, index: int, fd: int, old: int) -> None:
            if kept is None:
                super().set_call(index, fd, old)
            else:
                kept.append((fd, old))

    async def test(peer: Peer) -> None:
        nonlocal kept
        await running(peer)
        kept = []
        for _ in range(2):
            with Eventfd() as fd:
                await peer.send(Request.SET_VRING_CALL, u64(0), [fd])
        await peer.ask(Request.GET_FEATURES)
        (second, first), (third, between) = kept
        assert between == second
        for fd in (first, second, third):
            os.fstat(fd)
        for fd in (first, second):
            close_fd(fd)

    with_peer(test, Keeping())


def test_eventfds_keep_their_flags() -> None:
    """They are the frontend's files too, which may want to wait in read(2)."""

    async def test(peer: Peer) -> None:
        with Eventfd() as call:
            assert os.get_blocking(call)
            await peer.send(Request.SET_VRING_CALL, u64(0), [call])
            await peer.ask(Request.GET_FEATURES)
            assert os.get_blocking(call)
            assert os.eventfd_read(call) == 1

    with_peer(test)


def test_memory_for_what_is_in_flight() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        asked = protocol.encode_inflight(Inflight(0, 0, 4, 256))
        await peer.send(Request.GET_INFLIGHT_FD, asked, flags=FLAG_NEED_REPLY)
        loop = asyncio.get_running_loop()
        while not select.select([peer.sock], [], [], 0)[0]:
            await asyncio.sleep(0.001)  # between two looks
        data, fds, _, _ = socket.recv_fds(peer.sock, 64, 4)
        assert protocol.decode_inflight(data[HEADER.size :]) == Inflight(4096, 0, 4, 256)
        assert len(fds) == 1
        del peer.datapath.calls[:]
        told = protocol.encode_inflight(Inflight(4096, 0, 4, 256))
        await peer.send(Request.SET_INFLIGHT_FD, told, fds)
        os.close(fds[0])
        # One reply came, and not an acknowledgement beside it.
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.calls == [("stop", 0), ("use_inflight", 4096, 0), ("start", 0)]
        # Without the padding too.
        await peer.send(Request.GET_INFLIGHT_FD, asked[:20])
        data = await loop.sock_recv(peer.sock, 64)
        assert data[:4] == bytes([Request.GET_INFLIGHT_FD, 0, 0, 0])

    with_peer(test)


def test_what_earlier_tests_left_to_the_garbage_collector_is_no_leak() -> None:
    garbage: list[object] = [Engine()]
    garbage.append(garbage)
    del garbage

    async def test(_: Peer) -> None:
        gc.collect()

    with_peer(test)
