"""A private copy of guest memory is told from shared memory by the frontend's own mappings."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vswitch.vhost_user.sharing import is_private_copy

LEN = 1 << 20

# Maps descriptor 3 as told, writes to it, says where it is, and waits for the end of its stdin.
MAPPER = """
import ctypes, mmap, sys
memory = mmap.mmap(3, {length}, flags=mmap.{flags})
memory[0] = 1
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


def file_of(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, LEN)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(("flags", "private"), [("MAP_PRIVATE", True), ("MAP_SHARED", False)])
def test_private_mapping_is_recognised(memfd: int, flags: str, private: bool) -> None:
    source = f"import os; os.dup2({memfd}, 3)\n" + MAPPER.format(length=LEN, flags=flags)
    with subprocess.Popen(
        [sys.executable, "-c", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[memfd],
    ) as mapper:
        assert mapper.stdout is not None
        uva = int(mapper.stdout.readline())
        assert is_private_copy(mapper.pid, uva, file_of(memfd)) is private
        assert is_private_copy(mapper.pid, uva + LEN - 1, file_of(memfd)) is private
        other = os.memfd_create("other")
        assert not is_private_copy(mapper.pid, uva, file_of(other))
        os.close(other)
        assert mapper.stdin is not None
        mapper.stdin.close()
    assert not is_private_copy(mapper.pid, uva, file_of(memfd)), "the process is gone"


def test_what_cannot_be_told_is_no_reason_to_warn(memfd: int) -> None:
    assert not is_private_copy(None, 0x1000, file_of(memfd))
    assert not is_private_copy(os.getpid(), 0, file_of(memfd))
    with mmap.mmap(memfd, LEN) as memory:
        memory[0] = 1
        assert not is_private_copy(os.getpid(), 0x1000, file_of(memfd))
