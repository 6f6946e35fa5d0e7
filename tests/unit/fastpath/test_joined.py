"""Pages of a guest's memory that are mapped once more, side by side."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vswitch.fastpath.main import joined
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.joined import Joined, pieces_in_use, why_apart
from vswitch.fastpath.main.mapping import Memory
from vswitch.fastpath.main.parts import RingError
from vswitch.fastpath.main.ring import Ring

PAGE = os.sysconf("SC_PAGE_SIZE")
HUGE = 2 << 20
UVA = 0x7F00_0000_0000
PAGES = 64


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("scattered")
    os.truncate(fd, PAGES * PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def memory(fd: int) -> Memory:
    return Memory([(0, PAGES * PAGE, UVA, 0)], [fd])


def mappings(fd: int) -> list[tuple[int, int, int]]:
    """(start, end, file offset) of the mappings of a file, by address."""
    file = os.fstat(fd)
    name = [f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}", str(file.st_ino)]
    rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return [
        (*(int(edge, 16) for edge in row[0].split("-")), int(row[2], 16))  # type: ignore[misc]
        for row in rows
        if row[3:5] == name
    ]


def pieces(*pages: int) -> list[tuple[int, int]]:
    return [(UVA + page * PAGE, PAGE) for page in pages]


def test_side_by_side_and_guarded(fd: int, memory: Memory) -> None:
    [region] = mappings(fd)
    before = pieces_in_use()
    one = Joined(memory, [(UVA + 9 * PAGE - 100, 100), *pieces(3, 7, 1), (UVA + 20 * PAGE, 8)])
    assert pieces_in_use() == before + one.pieces == before + 5
    parts = sorted(set(mappings(fd)) - {region})
    assert [offset // PAGE for _, _, offset in parts] == [8, 3, 7, 1, 20]
    rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    edges = {row[0].split("-")[1]: row[1] for row in rows}
    edges |= {row[0].split("-")[0] + "+": row[1] for row in rows}
    assert edges[f"{parts[0][0]:x}"] == edges[f"{parts[-1][1]:x}+"] == "---p"
    assert all(end == start for (_, end, _), (start, _, _) in itertools.pairwise(parts))
    del one
    assert mappings(fd) == [region]
    assert pieces_in_use() == before


def test_it_outlives_the_memory_table(fd: int, memory: Memory) -> None:
    """Whoever has a part of a region has all of it: its loss is still told of."""
    one = Joined(memory, pieces(5, 2))
    memory.close()
    assert len(mappings(fd)) == 3
    del one
    assert mappings(fd) == []


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ([(UVA, PAGE), (UVA + 3 * PAGE + 16, PAGE)], "does not begin a page"),
        ([(UVA, 1000), (UVA + 3 * PAGE, PAGE)], "does not begin a page"),
        ([(UVA, PAGE), (UVA + PAGES * PAGE, PAGE)], "is in no region"),
        ([(UVA, PAGE), (UVA + (PAGES - 1) * PAGE, PAGE + 1)], "is in no region"),
    ],
)
def test_what_cannot_be_joined(memory: Memory, wrong: list[tuple[int, int]], why: str) -> None:
    assert why in str(why_apart(memory, wrong))
    with pytest.raises(ValueError, match=why):
        Joined(memory, wrong)


def test_huge_pages() -> None:
    """They cannot be mapped twice. None is touched here, so none is needed."""
    fd = os.memfd_create("guest", os.MFD_HUGETLB)
    try:
        os.truncate(fd, 8 * HUGE)
        memory = Memory([(0, 8 * HUGE, UVA, 0)], [fd])
        why = why_apart(memory, [(UVA, PAGE), (UVA + 3 * PAGE, PAGE)])
        assert why is not None
        assert "huge pages of 2048 KiB" in why
        assert "iommu=pt" in why
    finally:
        os.close(fd)


def test_there_is_an_end_to_it(memory: Memory) -> None:
    """Mappings are everybody's: no guest may have them all."""
    before = pieces_in_use()
    scattered = pieces(*range(0, PAGES, 2))
    count = (joined.PIECES_MAX - before) // len(scattered)
    kept = [Joined(memory, scattered) for _ in range(count)]
    with pytest.raises(OSError, match="pieces already, of 16384 at most"):
        Joined(memory, scattered)
    kept.clear()
    assert pieces_in_use() == before
    Joined(memory, pieces(4, 2))


def test_a_ring_in_pieces_is_one(fd: int, memory: Memory) -> None:
    """What its driver offers in scattered pages is found, and what is given back goes there."""
    engine = Engine()
    ring = Ring(engine.add_port("p"), 1)
    desc, used = pieces(9, 3, 7, 5), [*pieces(13, 11), (UVA + 15 * PAGE, 6)]
    with mmap.mmap(fd, PAGES * PAGE) as seen:
        at = 13 * PAGE
        seen[at + 2 : at + 4] = (77).to_bytes(2, "little")
        settings = {
            "size": 1024, "desc_uva": desc[0][0], "used_uva": used[0][0],
            "avail_uva": UVA + 20 * PAGE, "hdr_len": 12, "event_idx": True, "indirect": True,
            "mergeable": True, "base": 0, "poll_only": False,
        }  # fmt: skip
        parts = (tuple(desc), ((UVA + 20 * PAGE, 2054),), tuple(used))
        with pytest.raises(RingError, match="not as long as its parts"):
            ring.start(memory, **settings, pieces=(parts[0][:3], *parts[1:]))  # type: ignore[arg-type]
        assert ring.start(memory, **settings, pieces=parts) == 77  # type: ignore[arg-type]
        assert ring.areas == parts
        smaller = Memory([(0, 15 * PAGE, UVA, 0)], [fd])
        with pytest.raises(RingError, match=f"{UVA + 9 * PAGE:#x} would go"):
            ring.use_memory(smaller)
    assert len(mappings(fd)) == 2 + 7
    ring.unpublish()
    ring.mark_stopped()
    del smaller
    assert len(mappings(fd)) == 1
