"""What a port in postcopy asks for, in which order, and what it takes to be there."""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
from collections.abc import Awaitable, Callable

import pytest

from tests.support.handover import AtOnce
from tests.support.wire import open_fds
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.mapping import Memory
from vswitch.ports import postcopy as port_postcopy
from vswitch.ports.fault_helper import TOUCHERS
from vswitch.ports.postcopy import ASKED_MAX, PortPostcopy, _Area
from vswitch.ports.ring import GuestRing, RingState
from vswitch.vhost_user.datapath import DatapathError, RingSetup
from vswitch.vhost_user.protocol import Feature, MemRegion

PAGE = 4096
UVA = 0x7F00_0000_0000
BASE = 1 << 40
"""Where the process has the region."""
SIZE = 1024
"""Entries of a ring, each with a buffer in a page of its own."""
OWN = 8 * PAGE
"""Bytes of a ring: descriptors, avail and used ring."""
PAGES = 2 * OWN // PAGE + 2 * SIZE
RECEIVE, TRANSMIT = 0, 1


class Process:
    """Writes down what it is asked, and finds nothing by itself."""

    def __init__(self) -> None:
        self.uffd = -1
        self.touched: list[int] = []
        self.refuse: str | None = None

    async def map(self, fd: int, length: int, offset: int) -> int:
        if self.refuse:
            raise OSError(22, self.refuse)
        assert os.fstat(fd).st_size >= offset + length
        assert (length % PAGE, offset % PAGE) == (0, 0)
        return BASE

    async def drop(self, address: int, length: int) -> None:
        assert (address, length) == (BASE, PAGES * PAGE)

    def touch(self, address: int) -> None:
        self.touched.append((address - BASE) // PAGE)

    async def close(self) -> None:
        pass


class Bench:
    """Two rings full of buffers in a file of which only the pages of `there` are there.

    Guest addresses are offsets into the file: first the rings, then the buffers of each.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tells_pages: bool = True) -> None:
        self.engine = Engine(workers=1)
        self.port = self.engine.add_port("vm")
        self.fd = os.memfd_create("guest")
        os.truncate(self.fd, PAGES * PAGE)
        self.map = mmap.mmap(self.fd, PAGES * PAGE)
        self.process = Process()
        self.failures: list[str] = []
        self.rings: dict[int, GuestRing] = {}
        self.postcopy = PortPostcopy(
            self.rings, AtOnce(self.engine), self.start, self.failures.append
        )
        self.postcopy._process = self.process  # type: ignore[assignment]
        self.postcopy.listening = True
        self.region = MemRegion(0, PAGES * PAGE, UVA, 0)
        self.memory = Memory([self.region], [self.fd])
        monkeypatch.setattr(port_postcopy, "tells_pages", lambda _: tells_pages)

    async def open(self) -> None:
        await self.postcopy.use_memory(self.memory)
        assert await self.postcopy.map(self.region, self.fd) == BASE
        self.postcopy.allow_faults(True)

    async def close(self) -> None:
        self.port.rings.clear()
        await self.postcopy.close()
        self.map.close()
        os.close(self.fd)

    def setup(self, index: int) -> RingSetup:
        own = UVA + index * OWN
        return RingSetup(
            size=SIZE, desc_uva=own, avail_uva=own + 4 * PAGE, used_uva=own + 5 * PAGE,
            base=7, features=Feature(0), enabled=True, kick_fd=-1, call_fd=-1,
        )  # fmt: skip

    def buffer(self, index: int, number: int) -> int:
        """The page of a buffer."""
        return 2 * OWN // PAGE + index * SIZE + number

    def offer(self, index: int, count: int = SIZE) -> None:
        """Write a ring's descriptors and its avail ring; then its pages are there."""
        own = index * OWN
        for number in range(count):
            flags = 0 if index & 1 else 2
            entry = struct.pack("<QIHH", self.buffer(index, number) * PAGE, PAGE, flags, 0)
            self.map[own + 16 * number : own + 16 * number + 16] = entry
            at = own + 4 * PAGE + 4 + 2 * number
            self.map[at : at + 2] = struct.pack("<H", number)
        self.map[own + 4 * PAGE : own + 4 * PAGE + 4] = struct.pack("<HH", 0, count)
        for at in range(own, own + OWN, PAGE):
            self.map[at] |= 0

    def ring(self, index: int) -> GuestRing:
        if index not in self.rings:
            self.rings[index] = GuestRing(self.port, index)
        return self.rings[index]

    def start(self, ring: GuestRing) -> bool:
        """As GuestRings does."""
        setup = ring.known_setup
        ring.fast.start(
            self.memory, setup.size, setup.desc_uva, setup.used_uva, setup.avail_uva, hdr_len=12,
            event_idx=False, indirect=False, mergeable=True, base=0, poll_only=True,
            iotlb=self.postcopy.tables,
        )  # fmt: skip
        ring.become(RingState.RUNNING)
        self.engine.attach(ring.fast, -1)
        return True

    def stop(self, index: int) -> int:
        """Stop a ring; where it is to go on."""
        ring = self.rings[index]
        ring.become(RingState.STOPPING)
        self.engine.detach(ring.fast)
        assert self.engine.wait(self.engine.publish(), 60_000_000_000)
        return ring.stop()

    def run(self, index: int) -> bool:
        """Start a ring; whether it runs."""
        ring = self.ring(index)
        ring.setup, ring.translation = self.setup(index), self.postcopy
        ring.place = self.postcopy.find(ring, ring.setup)
        if ring.place is not None:
            self.start(ring)
        else:
            ring.become(RingState.LATE)
        self.postcopy.started(ring)
        return ring.place is not None

    def find(self, *pages: int) -> None:
        """The process says that it has touched these."""
        self.postcopy._found([BASE + page * PAGE for page in pages])

    def known(self, page: int) -> bool:
        return self.postcopy._iotlb.find(page * PAGE) is not None


def run(
    monkeypatch: pytest.MonkeyPatch,
    test: Callable[[Bench], Awaitable[None]],
    tells_pages: bool = True,
) -> None:
    async def body() -> None:
        bench = Bench(monkeypatch, tells_pages)
        await bench.open()
        try:
            await test(bench)
        finally:
            await bench.close()

    before = open_fds(collect=True)
    asyncio.run(body())
    # Others' may go meanwhile.
    assert memory_files(open_fds()) <= memory_files(before)


def memory_files(fds: dict[str, str]) -> set[str]:
    return {fd for fd, what in fds.items() if "memfd" in what}


def test_a_ring_starts_when_its_pages_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        assert not bench.run(TRANSMIT)
        own = [OWN // PAGE + page for page in range(8)]
        assert sorted(bench.process.touched) == own
        assert not bench.port.rings[TRANSMIT].started
        bench.offer(TRANSMIT)
        bench.find(*own[:-1])
        assert not bench.port.rings[TRANSMIT].started
        bench.find(own[-1])
        assert bench.port.rings[TRANSMIT].started
        assert bench.stop(TRANSMIT) == 0

    run(monkeypatch, test)


def test_a_ring_that_never_started_goes_on_from_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(bench: Bench) -> None:
        assert not bench.run(TRANSMIT)
        assert bench.stop(TRANSMIT) == 7
        bench.offer(TRANSMIT)
        bench.find(*bench.process.touched)
        assert not bench.port.rings[TRANSMIT].started

    run(monkeypatch, test)


def test_what_is_there_is_found_without_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        bench.offer(TRANSMIT, 64)
        there = [bench.buffer(TRANSMIT, number) for number in (*range(20), *range(40, 64))]
        for page in there:
            bench.map[page * PAGE] = 1
        assert bench.run(TRANSMIT)
        wanted = [bench.buffer(TRANSMIT, number) for number in range(20, 40)]
        assert bench.process.touched == wanted[:TOUCHERS]
        assert all(map(bench.known, there))
        assert not any(map(bench.known, wanted))
        # One comes after the other, and none twice.
        for page in wanted:
            assert bench.process.touched.count(page) == 1
            bench.map[page * PAGE] = 1
            bench.find(page)
        assert bench.process.touched == wanted
        assert all(map(bench.known, wanted))

    run(monkeypatch, test)


def test_a_file_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        bench.offer(TRANSMIT, 8)
        bench.map[bench.buffer(TRANSMIT, 0) * PAGE] = 1
        assert not bench.run(TRANSMIT)
        bench.find(*bench.process.touched)
        assert bench.port.rings[TRANSMIT].started
        assert bench.process.touched[-8:] == [bench.buffer(TRANSMIT, n) for n in range(8)]

    run(monkeypatch, test, tells_pages=False)


def test_whom_a_worker_waits_for_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiveq's buffers are asked for ahead, and fill no more than half of what may be asked."""

    async def test(bench: Bench) -> None:
        bench.offer(RECEIVE)
        bench.offer(TRANSMIT)
        assert bench.run(RECEIVE)
        assert len(bench.postcopy._asked) == ASKED_MAX // 2
        assert bench.run(TRANSMIT)
        assert len(bench.postcopy._asked) == ASKED_MAX // 2
        bench.engine.publish()
        [worker] = bench.engine.workers
        worker.turn()
        [event] = bench.engine.take_events()
        assert event[0] == "iotlb-miss"
        bench.postcopy.scan(bench.rings[TRANSMIT])
        assert bench.process.touched == [bench.buffer(RECEIVE, n) for n in range(TOUCHERS)]
        bench.find(bench.process.touched[0])
        assert bench.process.touched[TOUCHERS:] == [bench.buffer(TRANSMIT, 0)]

    run(monkeypatch, test)


def test_nothing_is_asked_for_before_the_frontend_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        bench.postcopy.allow_faults(False)
        assert not bench.run(TRANSMIT)
        assert bench.process.touched == []
        bench.postcopy.allow_faults(True)
        assert len(bench.process.touched) == OWN // PAGE

    run(monkeypatch, test)


def test_memory_that_goes_and_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        assert not bench.run(TRANSMIT)
        bench.stop(TRANSMIT)
        flying = list(bench.process.touched)
        await bench.postcopy.use_memory(Memory([], []))
        # Those that were on their way come back, and mean nothing.
        bench.find(*flying)
        assert not bench.postcopy._asked
        await bench.postcopy.use_memory(bench.memory)
        ring = bench.rings[TRANSMIT]
        assert bench.postcopy.find(ring, ring.known_setup) is None, "nobody knows the region"
        await bench.postcopy.map(bench.region, bench.fd)
        assert not bench.run(TRANSMIT)
        assert bench.process.touched[len(flying) :] == flying

    run(monkeypatch, test)


def test_pages_that_were_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(ValueError, match="it names address 0x10000003000, which it was not"):
            bench.find(3)
        bench.postcopy._ended("it lies")
        assert bench.failures == [
            "no page of the guest's memory can be asked for any more: it lies"
        ]
        assert not bench.run(TRANSMIT)
        assert bench.process.touched == []

    run(monkeypatch, test)


def test_a_ring_outside_of_the_memory_is_for_others_to_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(bench: Bench) -> None:
        setup = bench.setup(TRANSMIT)
        bench.offer(TRANSMIT)
        gone = RingSetup(**{
            name: getattr(setup, name) for name in setup.__slots__ if name != "used_uva"
        }, used_uva=UVA + PAGES * PAGE)  # fmt: skip
        assert bench.postcopy.find(bench.ring(TRANSMIT), gone) is gone

    run(monkeypatch, test)


def test_a_region_that_cannot_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        await bench.postcopy.use_memory(Memory([], []))
        bench.process.refuse = "Invalid argument"
        with pytest.raises(DatapathError, match=r"guest address 0x0 cannot be watched.*Invalid"):
            await bench.postcopy.map(bench.region, bench.fd)

    run(monkeypatch, test)


@pytest.mark.parametrize(
    ("offset", "page", "gpa", "first", "size"),
    [
        (0, 4096, 0x10000, 0x10000, 4096),
        (0, 4096, 0x10FFF, 0x10000, 4096),
        (0x3000, 4096, 0x12345, 0x12000, 4096),
        # Huge pages, the region begins and ends within one.
        (0x1000, 0x200000, 0x10000, 0x10000, 0x1FF000),
        (0x1000, 0x200000, 0x20F000, 0x20F000, 0x101000),
        (0x1000, 0x200000, 0x20EFFF, 0x10000, 0x1FF000),
        # A file offset that is no whole page.
        (0x10, 4096, 0x10000, 0x10000, 0xFF0),
        (0x10, 4096, 0x10FF0, 0x10FF0, 4096),
    ],
)
def test_pages_of_a_region(offset: int, page: int, gpa: int, first: int, size: int) -> None:
    region = MemRegion(0x10000, 0x300000, UVA, offset)
    area = _Area(region, page, BASE, 0x400000, tells=False)
    assert area.page_of(gpa) == (first, size)
    assert area.address(region.gpa) == BASE + offset % page
