"""What lies around memory that is shared with a frontend: nothing that anybody could touch."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import pytest

from tests.native.scribble import scribble
from vswitch.fastpath.main.mapping import DirtyLog, Memory

PAGE = os.sysconf("SC_PAGE_SIZE")
HUGE = 2 << 20


def mappings(inode: int) -> list[tuple[int, int, int]]:
    """(start, end, file offset) of a file's mappings; PROT_NONE is on both sides of each."""
    rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    found = []
    for before, row, after in zip(rows, rows[1:], rows[2:], strict=False):
        if row[4] != str(inode):
            continue
        start, end = (int(edge, 16) for edge in row[0].split("-"))
        assert before[1] == after[1] == "---p"
        assert before[0].endswith(f"-{start:x}")
        assert after[0].startswith(f"{end:x}-")
        found.append((start, end, int(row[2], 16)))
    return found


@pytest.mark.parametrize(("size", "offset"), [(PAGE, 0), (100, PAGE), (3 * HUGE, 5 * PAGE)])
def test_around_a_region(size: int, offset: int) -> None:
    fd = os.memfd_create("guest")
    os.truncate(fd, 4 * HUGE)
    inode = os.fstat(fd).st_ino
    memory = Memory([(0, size, 0, offset), (1 << 40, size, 1 << 40, offset)], [fd, fd])
    log = DirtyLog(fd, 8, 0)
    found = mappings(inode)
    assert len(found) == 3
    for start, end, at in found:
        assert (end - start) % PAGE == 0
        if end - start >= HUGE:
            assert (start - at) % HUGE == 0, "huge pages need that"
    del memory, log
    assert mappings(inode) == []
    os.close(fd)


def test_nothing_is_left_where_a_mapping_failed() -> None:
    memfd = os.memfd_create("guest")
    os.ftruncate(memfd, PAGE)
    fd = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    os.close(memfd)
    before = Path("/proc/self/maps").read_text().count("---p")
    for _ in range(3):
        with pytest.raises(OSError, match="Permission denied"):
            Memory([(0, PAGE, 0, 0)], [fd])
    assert Path("/proc/self/maps").read_text().count("---p") <= before + 1
    os.close(fd)


def test_scribbling_stays_in_its_places() -> None:
    memory = bytearray(64)
    scribble(memory, array("I", [8, 40]), array("H", [0xFFFF]), seed=3, count=1000)
    assert memory == bytes(8) + b"\xff\xff" + bytes(30) + b"\xff\xff" + bytes(22)
    for places, values, error in (([63], [1], IndexError), ([62], [], ValueError)):
        with pytest.raises(error):
            scribble(memory, array("I", places), array("H", values), seed=3, count=1)
    with pytest.raises(IndexError, match="offset 64 in 64 bytes"):
        scribble(memory, array("I", [64]), array("H", [1]), seed=3, count=1)
