"""The process that touches missing pages: what it tells, what is left to it, and how it ends."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import platform
import select
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.traps import Traps
from tests.support.wire import open_fds
from vswitch.ports import fault_helper, fault_process
from vswitch.ports.fault_process import FaultProcess

PAGE = 4096
PAGES = 16


class Helper:
    """A started helper with a file of memory, of which the first page is there."""

    def __init__(self) -> None:
        self.found: asyncio.Queue[int] = asyncio.Queue()
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    async def start(self) -> None:
        self.process = await FaultProcess.start(self._found, self.ended.put_nowait)
        self.fd = os.memfd_create("memory")
        os.truncate(self.fd, PAGE * PAGES)
        os.pwrite(self.fd, b"there", 0)
        self.base = await self.process.map(self.fd, PAGE * PAGES, 0)

    def _found(self, addresses: list[int]) -> None:
        for address in addresses:
            self.found.put_nowait((address - self.base) // PAGE)

    def missed(self) -> int:
        """The next page that it waits for."""
        poll = select.poll()
        poll.register(self.process.uffd, select.POLLIN)
        assert poll.poll(10_000)
        [address] = struct.unpack("=16xQ8x", os.read(self.process.uffd, 32))
        return int(address - self.base) // PAGE

    def is_there(self, page: int) -> bool:
        try:
            return os.lseek(self.fd, page * PAGE, os.SEEK_DATA) == page * PAGE
        except OSError:
            return False


def children() -> set[str]:
    """Process ids of this process's children, those included that nobody has waited for."""
    return {
        child
        for task in Path("/proc/self/task").iterdir()
        for child in (task / "children").read_text().split()
    }


def run(test: Callable[[Helper], Awaitable[None]]) -> None:
    async def body() -> None:
        before = open_fds(collect=True)
        helper = Helper()
        async with asyncio.timeout(60):
            await helper.start()
            try:
                await test(helper)
            finally:
                await helper.process.close()
                os.close(helper.fd)
        assert open_fds() == before

    # Of processes that others have started, or left, it is nobody's.
    others = children()
    asyncio.run(body())
    assert children() <= others


def test_pages_that_are_there_and_not() -> None:
    async def test(helper: Helper) -> None:
        for page in range(4):
            helper.process.touch(helper.base + page * PAGE)
        assert await helper.found.get() == 0
        assert {helper.missed() for _ in range(3)} == {1, 2, 3}
        # It has come: into the file, by whatever way, and then the process is woken.
        os.pwrite(helper.fd, b"late", 2 * PAGE)
        where = struct.pack("=QQ", helper.base + 2 * PAGE, PAGE)
        fcntl.ioctl(helper.process.uffd, fault_helper._UFFDIO_WAKE, where)
        assert await helper.found.get() == 2
        assert not helper.is_there(1)

    run(test)


def test_what_waits_for_a_dropped_region_comes_back() -> None:
    async def test(helper: Helper) -> None:
        for page in range(1, 4):
            helper.process.touch(helper.base + page * PAGE)
        assert {helper.missed() for _ in range(3)} == {1, 2, 3}
        await helper.process.drop(helper.base, PAGE * PAGES)
        assert {await helper.found.get() for _ in range(3)} == {1, 2, 3}
        # No page came to be by that, and later touches are harmless.
        helper.process.touch(helper.base + 5 * PAGE)
        assert await helper.found.get() == 5
        assert not any(helper.is_there(page) for page in range(1, PAGES))

    run(test)


def test_it_ends_while_it_waits() -> None:
    async def test(helper: Helper) -> None:
        helper.process.touch(helper.base + PAGE)
        assert helper.missed() == 1

    run(test)


def test_it_is_killed() -> None:
    async def test(helper: Helper) -> None:
        helper.process._process.kill()
        assert await helper.ended.get() == "the process ended"
        helper.process.touch(helper.base)
        with pytest.raises(OSError, match="that is to touch pages ended"):
            await helper.process.map(helper.fd, PAGE, 0)

    run(test)


def test_its_memory_is_truncated() -> None:
    async def test(helper: Helper) -> None:
        os.truncate(helper.fd, 0)
        helper.process.touch(helper.base)
        assert await helper.ended.get() == "the process ended"

    run(test)


def test_pages_that_nobody_asked_for() -> None:
    async def test(helper: Helper) -> None:
        def refuse(_: list[int]) -> None:
            raise ValueError("it says what it cannot know")

        helper.process._found = refuse
        helper.process.touch(helper.base)
        assert await helper.ended.get() == "it says what it cannot know"

    run(test)


def test_files_that_cannot_be_watched() -> None:
    async def test(helper: Helper) -> None:
        fd = os.open(fault_process.__file__, os.O_RDONLY)
        with pytest.raises(OSError, match=r"Invalid argument|not permitted"):
            await helper.process.map(fd, PAGE, 0)
        os.close(fd)
        assert await helper.process.map(helper.fd, PAGE, 0) != helper.base

    run(test)


def test_what_is_left_to_it() -> None:
    """After `confine` a thread can read, write and map, and not a thing more."""
    script = """if True:
        import ctypes, os, socket
        import fault_helper
        ours, theirs = socket.socketpair()
        fault_helper.confine()
        libc = ctypes.CDLL(None, use_errno=True)
        for name, call in (
            ("open", lambda: os.open("/etc/passwd", os.O_RDONLY)),
            ("socket", lambda: socket.socket()),
            ("kill", lambda: os.kill(os.getppid(), 0)),
            ("fork", lambda: os.fork()),
            ("exec", lambda: os.execv("/bin/true", ["true"])),
            ("ioctl", lambda: __import__("fcntl").ioctl(ours, 0x8912, bytes(16))),
        ):
            try:
                call()
            except PermissionError:
                os.write(1, name.encode() + b" ")
            except OSError as exc:
                os.write(1, f"{name}: {exc} ".encode())
        theirs.sendmsg([b"x"])
        os.write(1, ours.recvmsg(1)[0])
        os._exit(0)
    """
    alone = os.environ | {"PYTHONPATH": str(Path(fault_helper.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=alone, capture_output=True, text=True, check=True
    )
    assert done.stdout == "open socket kill fork exec ioctl x"


def test_system_calls_of_this_machine() -> None:
    """The numbers are those of the C library."""
    libc = ctypes.CDLL(None, use_errno=True)
    arch, userfaultfd, ioctl, allowed = fault_helper._MACHINES[platform.machine()]
    assert arch & 0xC0000000 == 0xC0000000
    # close() and read() of no descriptor, and an ioctl of one: nothing else fails like this.
    for number in (ioctl, allowed[0], allowed[2]):
        assert libc.syscall(number, -1, 0, 0) == -1
        assert ctypes.get_errno() == 9
    fd = libc.syscall(userfaultfd, os.O_CLOEXEC | 1)
    assert os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"
    os.close(fd)


def test_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault_process.unavailable() is None
    check = fault_process.unavailable.__wrapped__
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert check() == "this user cannot start /nowhere/python"
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert str(check()).startswith("no userfaultfd: ")
    assert str(check()).endswith("(riscv64)")


def test_modules_of_the_current_directory_are_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traps = Traps(tmp_path / "elsewhere")
    monkeypatch.chdir(traps.directory)

    async def test(helper: Helper) -> None:
        helper.process.touch(helper.base)
        assert await helper.found.get() == 0

    run(test)
    assert traps.sprung() == []
