"""What a port behind an IOMMU asks its frontend for, when, and how much of it at once."""

from __future__ import annotations

import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from tests.support.handover import AtOnce
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.iotlb import ACCESS_READ, ACCESS_WRITE
from vswitch.fastpath.main.mapping import Memory
from vswitch.ports import iotlb as port_iotlb
from vswitch.ports.iotlb import PortIotlb
from vswitch.ports.ring import GuestRing, RingState
from vswitch.vhost_user.datapath import RingSetup, TranslationPending
from vswitch.vhost_user.frontend import Frontend
from vswitch.vhost_user.protocol import Feature

PAGE = 4096
UVA = 0x7F00_0000_0000
BOTH = ACCESS_READ | ACCESS_WRITE
SIZE = 256
"""Entries of a ring, each with a buffer in a page of its own."""
OWN = 3 * PAGE
"""Bytes of a ring: descriptors, avail and used ring."""
BATCH = 32
"""Misses for buffers that may be without an answer, and nobody waits for."""
RECEIVE, TRANSMIT = 0, 1


class Bench:
    """Two rings full of buffers, and a frontend that answers when the test says so.

    I/O virtual addresses are offsets into the memory file: first the rings, then the buffers of
    each. Only the rings are mapped to begin with.
    """

    def __init__(self) -> None:
        self.engine = Engine(workers=1)
        self.port = self.engine.add_port("vm")
        length = 2 * OWN + 2 * SIZE * PAGE
        self.fd = os.memfd_create("guest")
        os.truncate(self.fd, length)
        self.map = mmap.mmap(self.fd, length)
        self.memory = Memory([(0, length, UVA, 0)], [self.fd])
        self.questions: list[tuple[int, int, Callable[[int], None]]] = []
        """Address, access and answer of the misses that are open, oldest first."""
        self.asked: Counter[tuple[int, int]] = Counter()
        self.rings: dict[int, GuestRing] = {}
        self.failures: dict[int, str] = {}
        self.settled: list[list[bool]] = []
        """Whether each ring had the newest tables when workers were waited for."""
        self.iotlb = PortIotlb(
            self.rings, AtOnce(self.engine, self.settling), self.memory,
            lambda: cast("Frontend", self),
            lambda ring, _: pytest.fail(f"{ring.name} is somewhere else"),
            lambda ring, text: self.failures.update({ring.index: text}),
        )  # fmt: skip
        self.iotlb.update(0, 2 * OWN, UVA, BOTH)
        for index in (RECEIVE, TRANSMIT):
            self._offer(index)

    def ask_translation(self, iova: int, access: int, answered: Callable[[int], None]) -> bool:
        self.questions.append((iova, access, answered))
        self.asked[iova, access] += 1
        return True

    def settling(self) -> None:
        self.settled.append([ring.iotlb is self.iotlb.tables for ring in self.port.rings.values()])

    def _offer(self, index: int) -> None:
        at, write = index * OWN, 2 if index == RECEIVE else 0
        for i, page in enumerate(self.buffers(index)):
            struct.pack_into("<QIHH", self.map, at + 16 * i, page, 60, write, 0)
            struct.pack_into("<H", self.map, at + PAGE + 4 + 2 * i, i)
        struct.pack_into("<HH", self.map, at + PAGE, 0, SIZE)

    @staticmethod
    def buffers(index: int) -> list[int]:
        first = 2 * OWN + index * SIZE * PAGE
        return list(range(first, first + SIZE * PAGE, PAGE))

    def start(self, *indices: int) -> None:
        for index in indices:
            at = index * OWN
            setup = RingSetup(
                SIZE, at, at + 2 * PAGE, at + PAGE, 0, Feature.VERSION_1, True, -1, -1
            )
            ring = self.ring(index)
            place = self.iotlb.find(ring, setup)
            ring.setup, ring.place, ring.translation = setup, place, self.iotlb
            ring.fast.enabled = True
            ring.fast.start(
                self.memory, SIZE, place.desc_uva, place.used_uva, place.avail_uva, hdr_len=12,
                event_idx=False, indirect=False, mergeable=False, base=0, poll_only=True,
                iotlb=self.iotlb.tables,
            )  # fmt: skip
            ring.become(RingState.RUNNING)
            self.engine.attach(ring.fast, -1)
            assert self.engine.wait(self.engine.publish(), 60_000_000_000)
            self.iotlb.started(ring)

    def ring(self, index: int) -> GuestRing:
        if index not in self.rings:
            self.rings[index] = GuestRing(self.port, index)
        return self.rings[index]

    def answer(self, status: int = 0) -> int:
        """Answer the oldest question, with an update if it is in order; what it was about."""
        iova, access, answered = self.questions.pop(0)
        if not status:
            self.iotlb.update(iova - iova % PAGE, PAGE, UVA + iova - iova % PAGE, access)
        answered(status)
        return iova

    def turn(self) -> list[tuple[str, int]]:
        """Let the worker go on; its events as (kind, ring), which the port hears of elsewhere."""
        self.engine.workers[0].turn()
        return [(kind, other) for kind, _, other, _ in self.engine.take_events()]

    @property
    def open(self) -> list[int]:
        return [iova for iova, _, _ in self.questions]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    for ring in bench.port.rings.values():
        ring.unpublish()
        bench.engine.detach(ring)
    assert bench.engine.wait(bench.engine.publish(), 60_000_000_000)
    os.close(bench.fd)


def test_a_port_has_so_many_pieces_of_rings(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a mapping of the process's. A ring in pages that follow each other is none."""
    wide = 4 * SIZE  # descriptors in four pages, the used ring in three
    setup = RingSetup(wide, 0, 0x5000, 0x4000, 0, Feature.VERSION_1, True, -1, -1)
    receive, transmit = bench.ring(RECEIVE), bench.ring(TRANSMIT)
    bench.iotlb.update(0, 0x8000, UVA, BOTH)
    assert bench.iotlb.find(receive, setup).pieces == ()
    for page, other in enumerate([9, 3, 4, 7]):
        bench.iotlb.update(page * PAGE, PAGE, UVA + other * PAGE, BOTH)
    place = bench.iotlb.find(receive, setup)
    assert place.pieces == (
        ((UVA + 9 * PAGE, PAGE), (UVA + 3 * PAGE, 2 * PAGE), (UVA + 7 * PAGE, PAGE)),
        ((UVA + 4 * PAGE, 6 + 2 * wide),),
        ((UVA + 5 * PAGE, 6 + 8 * wide),),
    )
    monkeypatch.setattr(port_iotlb, "PIECES_MAX", 5)
    bench.iotlb.find(receive, setup)
    assert bench.failures == {}
    bench.start(RECEIVE)
    receive.setup, receive.place = setup, place
    with pytest.raises(TranslationPending):
        bench.iotlb.find(transmit, setup)
    assert "it lies in 3 pieces" in bench.failures[TRANSMIT]
    assert "more than 5" in bench.failures[TRANSMIT]
    receive.become(RingState.STOPPING)
    receive.become(RingState.STOPPED)
    bench.iotlb.stopped()
    bench.iotlb.update(0, 0x8000, UVA, BOTH)
    bench.failures.clear()
    bench.iotlb.find(transmit, setup)
    assert bench.failures == {}


@pytest.mark.parametrize("status", [0, 1], ids=["translated", "refused"])
def test_buffers_are_asked_for_in_batches_and_all_of_them(bench: Bench, status: int) -> None:
    bench.start(RECEIVE, TRANSMIT)
    most = 0
    while bench.questions:
        most = max(most, len(bench.questions))
        bench.answer(status)
    assert most == BATCH
    wanted = {(iova, ACCESS_WRITE) for iova in bench.buffers(RECEIVE)}
    wanted |= {(iova, ACCESS_READ) for iova in bench.buffers(TRANSMIT)}
    assert bench.asked == Counter(wanted), "each of them, and once"
    assert bench.failures == {}


def test_answers_in_any_order(bench: Bench) -> None:
    """Some translated, some refused, the newest first: nothing is left out."""
    bench.start(RECEIVE, TRANSMIT)
    number = 0
    while bench.questions:
        number += 1
        assert len(bench.questions) <= BATCH
        bench.questions.insert(0, bench.questions.pop())
        bench.answer(number % 3 == 0)
    assert set(bench.asked.values()) == {1}
    assert len(bench.asked) == 2 * SIZE


def test_no_ring_takes_the_whole_batch(bench: Bench) -> None:
    """When all is to be asked for at once, each ring gets its share."""
    bench.start(RECEIVE, TRANSMIT)
    bench.questions.clear()
    bench.iotlb.ask_again()
    receive = set(bench.buffers(RECEIVE))
    assert Counter(iova in receive for iova in bench.open) == {True: BATCH // 2, False: BATCH // 2}


def test_what_a_worker_waits_for_goes_out_besides(bench: Bench) -> None:
    bench.start(RECEIVE)
    assert len(bench.questions) == BATCH
    bench.start(TRANSMIT)
    assert len(bench.questions) == BATCH, "nobody waits yet"
    first, second = bench.buffers(TRANSMIT)[:2]
    assert bench.turn() == [("iotlb-miss", TRANSMIT)]
    bench.iotlb.scan(bench.rings[TRANSMIT])
    assert bench.open[-1] == first
    assert len(bench.questions) == BATCH + 1
    # One page, and again only the next one that it waits for.
    bench.questions.insert(0, bench.questions.pop())
    assert bench.answer() == first
    assert bench.turn() == [("iotlb-miss", TRANSMIT)]
    bench.iotlb.scan(bench.rings[TRANSMIT])
    assert bench.open[-1] == second
    assert len(bench.questions) == BATCH + 1


def test_a_look_at_one_ring_forgets_nothing_of_another(bench: Bench) -> None:
    struct.pack_into("<H", bench.map, OWN + PAGE + 2, 0)  # nothing to transmit
    bench.start(RECEIVE, TRANSMIT)
    while len(bench.questions) > BATCH // 2 + 1:
        bench.answer()
    bench.iotlb.scan(bench.rings[TRANSMIT])
    bench.answer()
    assert len(bench.questions) > BATCH // 2, "more, before the last one is answered"


def test_a_miss_whose_event_was_lost(bench: Bench) -> None:
    """It is asked for within a second, whatever else is never answered."""
    bench.start(RECEIVE, TRANSMIT)
    assert bench.turn() == [("iotlb-miss", TRANSMIT)]
    missed = bench.buffers(TRANSMIT)[0]
    assert missed not in bench.open
    bench.iotlb.check()
    assert bench.open[BATCH:] == [missed]


def test_an_answer_that_comes_just_before_a_sleep(bench: Bench) -> None:
    """A ring that is looked at now and then need not have been polled since: it is not slept on."""
    bench.start(TRANSMIT)
    [worker] = bench.engine.workers
    assert bench.turn() == [("iotlb-miss", TRANSMIT)]
    assert worker.arm(), "its buffers are of no use yet"
    while bench.questions:
        bench.answer()
    assert not worker.arm(), "now they are"
    bench.turn()
    assert bench.port.rings[TRANSMIT].frames > 0


@pytest.mark.parametrize("what", ["buffer", "ring", "memory"])
def test_workers_are_waited_for_when_they_have_the_new_tables(bench: Bench, what: str) -> None:
    """Before an invalidation is acknowledged, or memory unmapped; an update waits for nobody."""
    bench.start(RECEIVE, TRANSMIT)
    while bench.questions:
        bench.answer()
    assert bench.settled == []
    if what == "memory":
        more = bench.memory.with_region((1 << 40, PAGE, 1 << 40, 0), bench.fd)
        change = bench.iotlb.use_memory(more)
    else:
        change = bench.iotlb.invalidate(bench.buffers(RECEIVE)[3] if what == "buffer" else 0, PAGE)
    with pytest.raises(StopIteration):
        change.send(None)
    assert bench.settled == [[True, True]]
