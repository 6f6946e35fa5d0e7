"""Memory hot-plug: GET_MAX_MEM_SLOTS, ADD_MEM_REG and REM_MEM_REG."""

from __future__ import annotations

import os

import pytest

from tests.support.wire import Peer, RecordingDatapath, addr, state, with_peer
from tests.unit.vhost_user.test_backend import (
    REGION,
    complaint,
    memory_fd,
    negotiate,
    running,
    start,
    u64,
)
from vswitch.vhost_user import protocol
from vswitch.vhost_user.datapath import DatapathError, RingSetup
from vswitch.vhost_user.protocol import MemRegion, Request

OTHER = MemRegion(0x10000, 0x10000, 0x20000, 0)
FIRST_HALF = MemRegion(0, 0x2000, 0x1000, 0)
SECOND_HALF = MemRegion(0x2000, 0xE000, 0x3000, 0x2000)


async def add(peer: Peer, region: MemRegion) -> int:
    fd = memory_fd()
    try:
        return await peer.ack(Request.ADD_MEM_REG, protocol.encode_mem_region(region), [fd])
    finally:
        os.close(fd)


async def remove(peer: Peer, region: MemRegion, fds: list[int] | None = None) -> int:
    return await peer.ack(Request.REM_MEM_REG, protocol.encode_mem_region(region), fds)


def test_slots() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        assert await peer.ask(Request.GET_MAX_MEM_SLOTS) == u64(64)

    with_peer(test)


def test_other_memory_comes_and_goes_under_a_running_ring() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        del peer.datapath.calls[:]
        assert await add(peer, OTHER) == 0
        assert peer.backend.regions == [REGION, OTHER]
        # The mmap offset does not count, and a descriptor is closed unused.
        fd = memory_fd()
        assert await remove(peer, OTHER._replace(mmap_offset=77), [fd]) == 0
        os.close(fd)
        assert peer.backend.regions == [REGION]
        assert peer.datapath.calls == [("add_memory", OTHER), ("remove_memory", OTHER)]
        assert list(peer.datapath.running) == [0]

    with_peer(test)


def test_a_table_made_of_single_regions_only() -> None:
    async def test(peer: Peer) -> None:
        await negotiate(peer)
        await start(peer)
        assert peer.datapath.running == {}
        assert await add(peer, OTHER) == 0
        assert peer.datapath.running == {}, "its own memory is still missing"
        assert await add(peer, REGION) == 0
        assert list(peer.datapath.running) == [0]

    with_peer(test)


def test_a_ring_stops_with_its_memory_and_goes_on_when_all_of_it_is_back() -> None:
    """As when QEMU replaces a region by its parts: the table is at 0x1000, used at 0x3000."""

    async def test(peer: Peer) -> None:
        await running(peer)
        del peer.datapath.calls[:]
        assert await remove(peer, REGION) == 0
        assert peer.datapath.calls == [("stop", 0), ("remove_memory", REGION)]
        assert await add(peer, FIRST_HALF) == 0
        assert peer.datapath.running == {}
        assert await add(peer, SECOND_HALF) == 0
        assert peer.datapath.running[0].base == 100, "where it was stopped"

    with_peer(test)


def test_a_ring_that_was_stopped_stays_stopped() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        await peer.ask(Request.GET_VRING_BASE, state(0, 0))
        assert await remove(peer, REGION) == 0
        assert await add(peer, REGION) == 0
        assert peer.datapath.running == {}

    with_peer(test)


@pytest.mark.parametrize("field", ["gpa", "size", "uva"])
def test_a_region_that_is_not_there(field: str) -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        wrong = REGION._replace(**{field: 0x77000})
        assert await remove(peer, wrong) == 1
        assert peer.backend.regions == [REGION]
        assert list(peer.datapath.running) == [0]
        await peer.send(Request.REM_MEM_REG, protocol.encode_mem_region(wrong))
        why = complaint(await peer.hung_up())
        assert why.startswith("REM_MEM_REG: no region with guest address ")
        assert "0x77000" in why

    with_peer(test)


def test_a_refusal_changes_nothing() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        peer.datapath.refuse["add_memory"] = "all 64 memory slots are in use"
        assert await add(peer, OTHER) == 1
        assert peer.backend.regions == [REGION]
        assert list(peer.datapath.running) == [0]

    with_peer(test)


def test_a_region_whose_rings_do_not_start_is_refused_as_a_whole() -> None:
    """One of two rings that waited for it cannot start: both wait on, and it is not ours."""

    class Picky(RecordingDatapath):
        async def start_ring(self, index: int, setup: RingSetup) -> int:
            if index == picky_about:
                raise DatapathError("vring 1: used.idx is beyond the ring")
            return await super().start_ring(index, setup)

    picky_about: int | None = None

    async def test(peer: Peer) -> None:
        nonlocal picky_about
        await running(peer)
        await start(peer, 1)
        assert await remove(peer, REGION) == 0
        picky_about = 1
        del peer.datapath.calls[:]
        assert await add(peer, REGION) == 1
        assert peer.backend.regions == []
        assert peer.datapath.calls == [
            ("add_memory", REGION), ("start", 0), ("stop", 0), ("remove_memory", REGION),
        ]  # fmt: skip
        picky_about = None
        assert await add(peer, REGION) == 0
        assert sorted(peer.datapath.running) == [0, 1]

    with_peer(test, Picky())


def test_a_frontend_that_says_everything_once_a_queue_pair() -> None:
    """QEMU before 9.0: each pair adds the region, and each takes it away."""

    async def test(peer: Peer) -> None:
        await running(peer)
        for _ in range(3):
            assert await add(peer, OTHER) == 0
        assert [call[0] for call in peer.datapath.calls].count("add_memory") == 1
        for _ in range(3):
            assert await remove(peer, OTHER) == 0
        assert peer.backend.regions == [REGION]
        assert [call[0] for call in peer.datapath.calls].count("remove_memory") == 1
        assert await remove(peer, OTHER) == 1, "once more than it was added"

    with_peer(test)


def test_repetitions_are_not_counted_without_end() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        for n in range(65):
            region = MemRegion(0x100000 * n + 0x100000, 0x10000, 0x100000 * n + 0x100000, 0)
            assert await add(peer, region) == 0
            assert await add(peer, region) == (1 if n == 64 else 0)
            assert await remove(peer, region) == 0

    with_peer(test)


def test_a_new_table_takes_the_place_of_all_regions() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        assert await add(peer, OTHER) == 0
        fd = memory_fd()
        table = protocol.encode_mem_table([REGION])
        assert await peer.ack(Request.SET_MEM_TABLE, table, [fd]) == 0
        os.close(fd)
        assert peer.backend.regions == [REGION]
        assert await remove(peer, OTHER) == 1

    with_peer(test)


def test_descriptors() -> None:
    async def none(peer: Peer) -> None:
        await running(peer)
        await peer.send(Request.ADD_MEM_REG, protocol.encode_mem_region(OTHER))
        assert "0 file descriptors came with it, expected 1" in complaint(await peer.hung_up())

    async def two(peer: Peer) -> None:
        await running(peer)
        fd = memory_fd()
        await peer.send(Request.ADD_MEM_REG, protocol.encode_mem_region(OTHER), [fd, fd])
        os.close(fd)
        assert "2 file descriptors came with it" in complaint(await peer.hung_up())

    with_peer(none)
    with_peer(two)


def test_it_has_to_be_negotiated() -> None:
    async def test(peer: Peer) -> None:
        await peer.send(Request.GET_MAX_MEM_SLOTS)
        why = complaint(await peer.hung_up())
        assert why == "GET_MAX_MEM_SLOTS: protocol feature CONFIGURE_MEM_SLOTS was not negotiated"

    with_peer(test)


def test_a_ring_outside_of_all_memory_is_still_an_error() -> None:
    async def test(peer: Peer) -> None:
        await running(peer)
        peer.datapath.refuse["start"] = "descriptor table address is outside the guest memory"
        address = addr(0, desc_uva=0x900000)
        assert await peer.ack(Request.SET_VRING_ADDR, address) == 1
        assert peer.datapath.running == {}

    with_peer(test)
