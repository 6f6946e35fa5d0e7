"""The IOTLB against a plain model of it: one dictionary entry a byte."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from vswitch.fastpath.main.iotlb import ACCESS_READ, ACCESS_WRITE, ENTRIES, Iotlb
from vswitch.fastpath.main.mapping import Memory

UVA = 0x7F0000000000
SIZE = 1 << 20
BOTH = ACCESS_READ | ACCESS_WRITE


@pytest.fixture
def memory() -> Iterator[Memory]:
    fd = os.memfd_create("guest")
    os.truncate(fd, SIZE)
    yield Memory([(0, SIZE, UVA, 0)], [fd])
    os.close(fd)


def test_against_a_model(memory: Memory) -> None:
    chance = random.Random(5)
    iotlb = Iotlb(memory)
    model: dict[int, tuple[int, int]] = {}
    for step in range(3000):
        iova, size = chance.randrange(400), chance.randrange(1, 60)
        kind = chance.randrange(10)
        if kind < 6:
            uva, access = UVA + chance.randrange(SIZE - 60), chance.randrange(4)
            iotlb.update(iova, size, uva, access)
            model |= {iova + i: (access, uva + i) for i in range(size)}
        elif kind == 6:
            iotlb.deny(iova)
            model[iova] = (0, 0)
        else:
            iotlb.invalidate(iova, size)
            for at in range(iova, iova + size):
                model.pop(at, None)
        if step % 50 == 0:
            for at in range(470):
                found = iotlb.find(at)
                assert (found[:2] if found else None) == model.get(at)
        iotlb.tables()
    iotlb.forget_denials()
    assert all(found is None or found[0] for found in map(iotlb.find, range(470)))
    iotlb.invalidate(0, 0)
    assert len(iotlb) == 0


def test_the_ends_of_the_address_space(memory: Memory) -> None:
    iotlb = Iotlb(memory)
    iotlb.update(2**64 - 4096, 4096, UVA, BOTH)
    iotlb.update(0, 4096, UVA + 4096, BOTH)
    assert iotlb.find(2**64 - 1) == (BOTH, UVA + 4095, 1)
    iotlb.invalidate(2**64 - 1, 1)
    assert iotlb.find(2**64 - 1) is None
    assert iotlb.find(2**64 - 2) == (BOTH, UVA + 4094, 1)
    iotlb.invalidate(4095, 2**64 - 1)
    assert iotlb.find(0) == (BOTH, UVA + 4096, 4095)
    assert iotlb.find(2**64 - 4096) is None
    iotlb.invalidate(77, 0)
    assert len(iotlb) == 0


def test_the_oldest_goes(memory: Memory) -> None:
    iotlb = Iotlb(memory)
    for number in range(ENTRIES + 10):
        iotlb.update(2**40 - number * 4096, 4096, UVA + number % 200 * 4096, BOTH)
        assert len(iotlb) <= ENTRIES
    assert iotlb.find(2**40 - 9 * 4096) is None
    assert iotlb.find(2**40 - 10 * 4096) is not None
    # To split one when there is no more room takes another one's place.
    iotlb.invalidate(2**40 - 100 * 4096 + 10, 10)
    assert len(iotlb) == ENTRIES
    iotlb.tables()


@pytest.mark.parametrize(
    ("update", "why"),
    [
        ((0, 0, UVA), "size is 0"),
        ((2**64 - 1, 2, UVA), "iova 0xffffffffffffffff plus size 0x2 wraps past 2\\^64"),
        ((0, 2**64 - 1, UVA), "user address 0x7f0000000000 plus size 0xffff"),
        ((0, 1, UVA + SIZE), "is in no region of the memory table"),
        ((0, SIZE, UVA + 1), "is in no region of the memory table"),
    ],
)
def test_what_cannot_be(memory: Memory, update: tuple[int, int, int], why: str) -> None:
    iotlb = Iotlb(memory)
    iotlb.update(0, 10, UVA, BOTH)
    with pytest.raises(ValueError, match=why):
        iotlb.update(*update, BOTH)
    assert iotlb.find(0) == (BOTH, UVA, 10)


def test_other_memory(memory: Memory) -> None:
    iotlb = Iotlb(memory)
    iotlb.update(0, 4096, UVA, BOTH)
    iotlb.update(4096, 4096, UVA + SIZE - 4096, BOTH)
    fd = os.memfd_create("guest")
    os.truncate(fd, SIZE)
    iotlb.use_memory(Memory([(0, SIZE // 2, UVA, 0)], [fd]))
    os.close(fd)
    assert iotlb.find(0) == (BOTH, UVA, 4096)
    assert iotlb.find(4096) is None
