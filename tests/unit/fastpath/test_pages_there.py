"""Which pages of guest memory are there: found out without touching one or waiting for anybody."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

import pytest

from vswitch.fastpath.main.mapping import Memory, tells_pages

PAGE = mmap.PAGESIZE
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
GPA, UVA = 1 << 32, 0x7E00_0000_0000

_libc = ctypes.CDLL(None, use_errno=True)


def allocate(fd: int, mode: int, start: int, length: int) -> None:
    """fallocate(2), which Python has without modes only; others run meanwhile."""
    failed = _libc.fallocate(fd, mode, ctypes.c_long(start), ctypes.c_long(length))
    assert not failed, os.strerror(ctypes.get_errno())


def memory_of(fd: int, size: int, offset: int = 0) -> Memory:
    return Memory([(GPA, size, UVA, offset)], [fd])


def test_pages_one_by_one() -> None:
    fd = os.memfd_create("guest")
    try:
        os.truncate(fd, 8 * PAGE)
        assert tells_pages(fd)
        memory = memory_of(fd, 6 * PAGE, PAGE)
        assert not any(memory.has_page(GPA + page * PAGE) for page in range(6))
        os.pwrite(fd, b"x", 3 * PAGE)  # that of guest page 2
        assert [memory.has_page(GPA + page * PAGE + 5) for page in range(6)] == [
            False, False, True, False, False, False,
        ]  # fmt: skip
        # Looking brought nothing into being.
        assert os.fstat(fd).st_blocks * 512 == PAGE
        for outside in (0, GPA - 1, GPA + 6 * PAGE):
            assert not memory.has_page(outside)
        memory.close()
    finally:
        os.close(fd)


def test_a_page_is_seen_while_others_are_punched_out() -> None:
    """Who punches holds the file's lock from the first page to the last; pages go one by one."""
    size, contents = 256 << 20, bytes(1 << 20)
    fd = os.memfd_create("guest")
    try:
        os.truncate(fd, size)
        memory = memory_of(fd, size)
        hole = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        for _ in range(50):
            for start in range(0, size, len(contents)):
                os.pwrite(fd, contents, start)
            first, last = GPA, GPA + size - PAGE
            assert memory.has_page(first)
            puncher = threading.Thread(target=allocate, args=(fd, hole, 0, size))
            puncher.start()
            seen = False
            while memory.has_page(last):
                # The last one goes last: should it be there now, the hole is still being punched.
                seen = seen or (not memory.has_page(first) and memory.has_page(last))
            puncher.join()
            if seen:
                break
        else:
            pytest.fail("in 50 holes, no look came back before all of the hole was there")
        memory.close()
    finally:
        os.close(fd)


def test_what_cannot_be_told() -> None:
    with Path("/proc/self/maps").open("rb") as file:
        assert not tells_pages(file.fileno())


@pytest.mark.parametrize(("mode", "told"), [(0o600, False), (0o666, True)])
def test_a_file_that_may_not_be_written_by_its_mode(mode: int, told: bool) -> None:
    """To such a user mincore(2) says that all of it is there."""
    fd = os.memfd_create("guest")
    own = os.geteuid()
    try:
        os.fchmod(fd, mode)
        assert tells_pages(fd)
        if own == 0:
            os.seteuid(65534)
            assert tells_pages(fd) == told
    finally:
        os.seteuid(own)
        os.close(fd)
