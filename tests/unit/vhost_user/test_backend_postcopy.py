"""POSTCOPY_ADVISE, LISTEN and END, and how memory is told of between the last two."""

from __future__ import annotations

import array
import asyncio
import os
import socket

import pytest

from tests.support.wire import Peer, RecordingDatapath, with_peer
from tests.unit.vhost_user.test_backend import REGION, complaint, memory_fd, negotiate, start, u64
from vswitch.vhost_user import protocol
from vswitch.vhost_user.net import PROTOCOL_FEATURES
from vswitch.vhost_user.protocol import FLAG_NEED_REPLY, HEADER, ProtocolFeature, Request

OTHER = REGION._replace(gpa=0x10000, uva=0x20000)


async def advise(peer: Peer) -> list[int]:
    """The descriptors that come with the reply."""
    await peer.send(Request.POSTCOPY_ADVISE)
    while True:
        try:
            data, ancillary, _, _ = peer.sock.recvmsg(HEADER.size, socket.CMSG_SPACE(8))
        except BlockingIOError:
            await asyncio.sleep(0)
            continue
        assert HEADER.unpack(data) == (Request.POSTCOPY_ADVISE, 0x5, 0)
        fds = array.array("i")
        for _, _, raw in ancillary:
            fds.frombytes(raw)
        return list(fds)


async def listening(peer: Peer, pairs: int = 1) -> None:
    """As QEMU does it for each queue pair."""
    await negotiate(peer)
    for _ in range(pairs):
        [fd] = await advise(peer)
        assert os.path.sameopenfile(fd, peer.datapath.uffd)
        os.close(fd)
    for _ in range(pairs):
        assert await peer.ack(Request.POSTCOPY_LISTEN) == 0
    del peer.datapath.calls[:]


async def table(peer: Peer, regions: list[protocol.MemRegion], room: int = 0) -> bytes:
    fds = [memory_fd() for _ in regions]
    try:
        payload = protocol.encode_mem_table(regions) + bytes(room)
        await peer.send(Request.SET_MEM_TABLE, payload, fds)
        request, _, answer = await peer.reply()
        assert request == Request.SET_MEM_TABLE
        return answer
    finally:
        for fd in fds:
            os.close(fd)


async def add(peer: Peer, region: protocol.MemRegion) -> protocol.MemRegion:
    fd = memory_fd()
    try:
        await peer.send(Request.ADD_MEM_REG, protocol.encode_mem_region(region), [fd])
        request, _, answer = await peer.reply()
        assert request == Request.ADD_MEM_REG
        return protocol.decode_mem_region(answer)
    finally:
        os.close(fd)


def based(peer: Peer, region: protocol.MemRegion) -> protocol.MemRegion:
    return region._replace(uva=region.uva + peer.datapath.base_offset)


@pytest.mark.parametrize("room", [0, 64])
def test_a_table_is_answered_and_acknowledged(room: int) -> None:
    async def test(peer: Peer) -> None:
        await listening(peer)
        answer = await table(peer, [REGION, OTHER], room)
        # QEMU compares the lengths.
        assert len(answer) == 8 + 64 + room
        assert protocol.decode_mem_table(answer) == [based(peer, REGION), based(peer, OTHER)]
        await start(peer)
        assert list(peer.datapath.running) == [0]
        told = [call for call in peer.datapath.calls if call[0] == "allow_faults"]
        assert told == [("allow_faults", False)]
        await peer.send(Request.SET_MEM_TABLE, u64(0))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.calls[-1] == ("allow_faults", True)
        # The same message once more is a table of nothing.
        answer = await table(peer, [])
        assert protocol.decode_mem_table(answer) == []
        assert peer.backend.regions == []

    with_peer(test)


@pytest.mark.parametrize("last", [Request.ADD_MEM_REG, Request.REM_MEM_REG, 0])
def test_single_regions_are_answered(last: int) -> None:
    async def test(peer: Peer) -> None:
        await listening(peer, pairs=2)
        assert await add(peer, REGION) == based(peer, REGION)
        assert await add(peer, OTHER) == based(peer, OTHER)
        # As QEMU before 9.0 has it, for the second queue pair.
        assert await add(peer, OTHER) == based(peer, OTHER)
        await peer.send(last, u64(0))
        await peer.ask(Request.GET_FEATURES)
        assert peer.datapath.calls[-1] == ("allow_faults", True)
        assert peer.datapath.calls.count(("allow_faults", True)) == 1
        await peer.send(Request.REM_MEM_REG, protocol.encode_mem_region(OTHER))
        await peer.send(Request.REM_MEM_REG, protocol.encode_mem_region(OTHER))
        await peer.ask(Request.GET_FEATURES)
        assert peer.backend.regions == [REGION]

    with_peer(test)


@pytest.mark.parametrize("status", [True, False], ids=["status", "no status"])
@pytest.mark.parametrize("says_it", [False, True], ids=["QEMU 9", "QEMU 8"])
def test_every_queue_pair_gets_the_answers_that_it_waits_for(says_it: bool, status: bool) -> None:
    """Whether it sends ADD_MEM_REG for each, or for the first one only."""

    async def pair_starts(peer: Peer) -> None:
        await peer.send(Request.SET_FEATURES, u64(int(peer.backend.features)))
        if status:
            await peer.ask(Request.GET_STATUS)

    async def test(peer: Peer) -> None:
        await listening(peer, pairs=3)
        chosen = PROTOCOL_FEATURES if status else PROTOCOL_FEATURES & ~ProtocolFeature.STATUS
        await peer.send(Request.SET_PROTOCOL_FEATURES, u64(int(chosen)))
        await pair_starts(peer)
        for region in (REGION, OTHER):
            assert await add(peer, region) == based(peer, region)
        for _ in range(2):
            await pair_starts(peer)
            fds = [memory_fd(), memory_fd()]
            for region, fd in zip((REGION, OTHER), fds, strict=True):
                if says_it:
                    answered = protocol.encode_mem_region(region)
                    await peer.send(Request.ADD_MEM_REG, answered, [fd])
                request, _, answer = await peer.reply()
                assert request == Request.ADD_MEM_REG
                assert protocol.decode_mem_region(answer) == based(peer, region)
                os.close(fd)
            # And no more than that: this is answered next.
            assert await peer.ask(Request.GET_QUEUE_NUM)
        # All pairs have started: features alone say nothing of memory now.
        await pair_starts(peer)
        assert await peer.ask(Request.GET_QUEUE_NUM)

    with_peer(test)


def test_queue_pairs_are_counted_anew_in_the_next_migration() -> None:
    """On one connection: what was answered ahead in the first is answered ahead in the second."""

    async def pair_starts(peer: Peer) -> None:
        await peer.send(Request.SET_FEATURES, u64(int(peer.backend.features)))
        await peer.ask(Request.GET_STATUS)

    async def test(peer: Peer) -> None:
        for _ in range(2):
            await listening(peer, pairs=2)
            await peer.send(Request.SET_PROTOCOL_FEATURES, u64(int(PROTOCOL_FEATURES)))
            await pair_starts(peer)
            assert await add(peer, REGION) == based(peer, REGION)
            await pair_starts(peer)
            request, _, answer = await peer.reply()
            assert request == Request.ADD_MEM_REG
            assert protocol.decode_mem_region(answer) == based(peer, REGION)
            for _ in range(2):
                assert await peer.ask(Request.POSTCOPY_END) == u64(0)
            assert await peer.ack(Request.REM_MEM_REG, protocol.encode_mem_region(REGION)) == 0

    with_peer(test)


def test_the_end_starts_rings_anew() -> None:
    async def test(peer: Peer) -> None:
        await listening(peer, pairs=3)
        await add(peer, REGION)
        await start(peer)
        del peer.datapath.calls[:]
        assert await peer.ask(Request.POSTCOPY_END) == u64(0)
        assert peer.datapath.calls == [("stop", 0), ("end_postcopy",), ("start", 0)]
        # The other queue pairs', and then there is no more.
        assert await peer.ask(Request.POSTCOPY_END) == u64(0)
        assert await peer.ask(Request.POSTCOPY_END) == u64(0)
        assert await peer.ask(Request.POSTCOPY_END) == u64(1)
        # Memory is as usual.
        fd = memory_fd()
        assert await peer.ack(Request.ADD_MEM_REG, protocol.encode_mem_region(OTHER), [fd]) == 0
        os.close(fd)
        # And there may be another one.
        [uffd] = await advise(peer)
        os.close(uffd)

    with_peer(test)


def test_memory_without_listen_ends_it() -> None:
    """A migration that might have gone on by postcopy, and did not."""

    async def test(peer: Peer) -> None:
        await negotiate(peer)
        [uffd] = await advise(peer)
        os.close(uffd)
        fd = memory_fd()
        assert await peer.ack(Request.ADD_MEM_REG, protocol.encode_mem_region(REGION), [fd]) == 0
        os.close(fd)
        assert peer.datapath.calls == [
            ("advise_postcopy",), ("end_postcopy",), ("add_memory", REGION),
        ]  # fmt: skip
        assert await peer.ack(Request.POSTCOPY_LISTEN) == 1

    with_peer(test)


def test_the_connection_ends_in_postcopy() -> None:
    async def test(peer: Peer) -> None:
        await listening(peer)
        await add(peer, REGION)
        await start(peer)
        peer.sock.close()
        assert await peer.hung_up() is None
        names = [call[0] for call in peer.datapath.calls]
        assert names[-3:] == ["stop", "end_postcopy", "set_memory"]

    with_peer(test)


def test_wrong_order() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        assert await peer.ack(Request.POSTCOPY_LISTEN) == 1
        assert await peer.ask(Request.POSTCOPY_END) == u64(1)
        [uffd] = await advise(peer)
        os.close(uffd)
        assert await peer.ask(Request.POSTCOPY_END) == u64(1)
        assert await peer.ack(Request.POSTCOPY_LISTEN) == 0
        assert await advise(peer) == []
        # No table was answered, so this is one, and no acknowledgement.
        await peer.send(Request.SET_MEM_TABLE, b"\1" + bytes(7))
        assert "SET_MEM_TABLE: 1 regions do not fit in size 8" in complaint(await peer.hung_up())

    with_peer(test)


def test_listen_without_acknowledgement() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        await peer.send(Request.POSTCOPY_LISTEN)
        assert "POSTCOPY_LISTEN: there was no POSTCOPY_ADVISE" in complaint(await peer.hung_up())

    with_peer(test)


def test_acknowledgement_of_a_failure() -> None:
    async def test(peer: Peer) -> None:
        await listening(peer)
        await table(peer, [REGION])
        await peer.send(Request.SET_MEM_TABLE, u64(5))
        assert "acknowledgement of addresses in postcopy is u64 0x5" in complaint(
            await peer.hung_up()
        )

    with_peer(test)


def test_no_acknowledgement_is_due_without_postcopy() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        await peer.send(Request.ADD_MEM_REG, u64(0))
        assert "ADD_MEM_REG: size is 8, expected 40" in complaint(await peer.hung_up())

    with_peer(test)


@pytest.mark.parametrize("table_at_once", [True, False])
def test_a_region_that_cannot_be_watched(table_at_once: bool) -> None:
    async def test(peer: Peer) -> None:
        await listening(peer)
        peer.datapath.refuse["fault_base"] = "it cannot"
        fd = memory_fd()
        if table_at_once:
            payload, request = protocol.encode_mem_table([REGION]), Request.SET_MEM_TABLE
        else:
            payload, request = protocol.encode_mem_region(REGION), Request.ADD_MEM_REG
        assert await peer.ack(request, payload, [fd]) == 1
        os.close(fd)
        undone = ("set_memory", []) if table_at_once else ("remove_memory", REGION)
        assert peer.datapath.calls[-1] == undone
        assert peer.backend.regions == []

    with_peer(test)


def test_where_it_cannot_be_had() -> None:
    async def test(peer: Peer) -> None:
        offered = PROTOCOL_FEATURES & ~ProtocolFeature.PAGEFAULT
        assert await peer.ask(Request.GET_PROTOCOL_FEATURES) == u64(offered)
        await peer.send(Request.SET_PROTOCOL_FEATURES, u64(PROTOCOL_FEATURES))
        assert "has bits 0x100, never offered" in complaint(await peer.hung_up())

    datapath = RecordingDatapath()
    datapath.has_postcopy = False
    with_peer(test, datapath)


def test_not_without_the_feature() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer, protocol_features=PROTOCOL_FEATURES & ~ProtocolFeature.PAGEFAULT)
        await peer.send(Request.POSTCOPY_ADVISE, flags=FLAG_NEED_REPLY)
        assert "protocol feature PAGEFAULT was not negotiated" in complaint(await peer.hung_up())

    with_peer(test)


def test_advice_that_fails() -> None:
    """The reply has no descriptor, so the frontend's migration fails; everything else goes on."""

    async def test(peer: Peer) -> None:
        await negotiate(peer)
        peer.datapath.refuse["advise_postcopy"] = "no process"
        assert await advise(peer) == []
        assert await peer.ack(Request.POSTCOPY_LISTEN) == 1
        await peer.ask(Request.GET_FEATURES)

    with_peer(test)
