"""A private copy of guest memory is told from shared memory by the frontend's own mappings."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from vswitch.relay.link import Link
from vswitch.relay.process import Relay
from vswitch.vhost_user.endpoint import Listener

LEN = 1 << 20

# Connects, maps descriptor 3 as told, writes to it, says where it is, and waits for the end of its
# stdin. With as many more mappings before and behind it as told: of two kinds, for equal ones
# become one.
MAPPER = """
import ctypes, mmap, socket, sys
libc = ctypes.CDLL(None)
def more():
    for i in range({more}):
        libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, 3, ctypes.c_long(4096 * (i % 2)))
sock = socket.socket(socket.AF_UNIX)
sock.connect({path!r})
more()
memory = mmap.mmap(3, {length}, flags=mmap.{flags})
more()
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


def with_mapper(
    path: Path,
    memfd: int,
    test: Callable[[Link, int, subprocess.Popen[bytes]], Awaitable[None]],
    *,
    flags: str = "MAP_PRIVATE",
    more: int = 0,
) -> None:
    """Run `test` with the link of a process that has the file mapped, and the address there."""
    source = f"import os; os.dup2({memfd}, 3)\n" + MAPPER.format(
        path=str(path), length=LEN, flags=flags, more=more
    )

    async def run() -> None:
        relay = await Relay.start()
        listener = Listener(relay, path, mode=0o600, owner=None, group=None)
        listener.open()
        command = [sys.executable, "-c", source]
        with subprocess.Popen(  # noqa: ASYNC220 - nobody else is served here
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[memfd]
        ) as mapper:
            assert mapper.stdin is not None
            assert mapper.stdout is not None
            try:
                async with asyncio.timeout(60):
                    link = await listener.next()
                    reading = asyncio.create_task(link.receive(1))
                    line = await asyncio.to_thread(mapper.stdout.readline)
                    await test(link, int(line), mapper)
                    reading.cancel()
                    link.close()
            finally:
                mapper.stdin.close()
                listener.close()
                await relay.close()

    asyncio.run(run())


@pytest.mark.parametrize("more", [0, 15000])
@pytest.mark.parametrize(("flags", "private"), [("MAP_PRIVATE", True), ("MAP_SHARED", False)])
def test_private_mapping_is_recognised(
    tmp_path: Path, memfd: int, flags: str, private: bool, more: int
) -> None:
    async def test(link: Link, uva: int, _: subprocess.Popen[bytes]) -> None:
        assert await link.is_private_copy(uva, *file_of(memfd)) is private
        assert await link.is_private_copy(uva + LEN - 1, *file_of(memfd)) is private
        other = os.memfd_create("other")
        assert not await link.is_private_copy(uva, *file_of(other))
        os.close(other)
        assert not await link.is_private_copy(0, *file_of(memfd))
        assert not await link.is_private_copy((1 << 64) - 1, *file_of(memfd))

    with_mapper(tmp_path / "s", memfd, test, flags=flags, more=more)


def test_what_cannot_be_told_is_no_reason_to_warn(tmp_path: Path, memfd: int) -> None:
    async def test(link: Link, uva: int, mapper: subprocess.Popen[bytes]) -> None:
        assert await link.is_private_copy(uva, *file_of(memfd))
        mapper.kill()
        await asyncio.to_thread(mapper.wait)
        assert not await link.is_private_copy(uva, *file_of(memfd)), "the process is gone"

    with_mapper(tmp_path / "s", memfd, test)
