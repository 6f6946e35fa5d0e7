"""The process that touches missing pages for a port (fault_helper.py), as the switch sees it.

Nothing that comes from it is trusted: whoever holds its userfaultfd has power over it.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import functools
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

from vswitch.ports import fault_helper
from vswitch.ports.fault_helper import PAGE, REQUEST, STATUS

ANSWER_PATIENCE_S = 10.0
"""How long it may take to start, or to map a region: either is a matter of milliseconds."""
_READ_PAGES = 512
"""What is taken from the pipe at a time."""

_HELPER = Path(fault_helper.__file__)


@functools.cache
def unavailable() -> str | None:
    """Why this process cannot have such helpers, None if it can."""
    try:
        os.close(fault_helper.userfaultfd())
    except OSError as exc:
        return f"no userfaultfd: {exc.strerror or exc} ({platform.machine()})"
    if not fault_helper.can_confine():
        return "the kernel has no seccomp filters"
    if not sys.executable or not os.access(sys.executable, os.X_OK, effective_ids=True):
        return f"this user cannot start {sys.executable or 'the Python interpreter'}"
    if not os.access(_HELPER, os.R_OK, effective_ids=True):
        return f"this user cannot read {_HELPER}"
    return None


class FaultProcess:
    """A started helper. `close` it, whatever happens.

    `found` gets addresses of pages that are there now, and raises ValueError if they cannot be.
    `ended` hears, once, why the helper is of no use any more.
    """

    def __init__(self, found: Callable[[list[int]], None], ended: Callable[[str], None]) -> None:
        self.uffd = -1
        """For the frontend. A copy stays ours, and is closed in `close`."""
        self._found = found
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._out_of_step = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pages, self._pages_fd = os.pipe2(os.O_CLOEXEC)
        self._found_fd, found_fd = os.pipe2(os.O_CLOEXEC)
        self._control = ours
        ours.setblocking(False)
        os.set_blocking(self._pages_fd, False)
        os.set_blocking(self._found_fd, False)
        fds = (theirs.fileno(), pages, found_fd)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_HELPER), str(os.getpid()), *map(str, fds)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=fds,
            )
            try:
                self._pidfd = os.pidfd_open(self._process.pid)
            except BaseException:
                self._process.kill()
                self._process.wait()
                raise
        except BaseException:
            self._close_fds()
            raise
        finally:
            theirs.close()
            os.close(pages)
            os.close(found_fd)

    @classmethod
    async def start(cls, found: Callable[[list[int]], None], ended: Callable[[str], None]) -> Self:
        """Raises OSError if it cannot be started, or cannot do what it is for."""
        helper = cls(found, ended)
        try:
            await helper._receive_uffd()
        except BaseException:
            await helper.close()
            raise
        helper._loop.add_reader(helper._found_fd, helper._on_found)
        helper._loop.add_reader(helper._pidfd, helper._end, "the process ended")
        return helper

    async def _receive_uffd(self) -> None:
        await self._readable()
        try:
            data, ancillary, _, _ = self._control.recvmsg(
                STATUS.size, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            data, ancillary = b"", []
        fds = array.array("i")
        for _, _, raw in ancillary:
            fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        if fds:
            self.uffd = fds[0]
        self._check(data)
        if self.uffd < 0:
            raise OSError(5, "the process that is to touch pages sent no userfaultfd")

    async def map(self, fd: int, length: int, offset: int) -> int:
        """Map a piece of a file whole pages long; the address it has there. Raises OSError."""
        return await self._ask(fault_helper.MAP, length, offset, fd)

    async def drop(self, address: int, length: int) -> None:
        """Give a mapping up. Pages of it that were asked for come back all the same."""
        await self._ask(fault_helper.DROP, address, length)

    def touch(self, address: int) -> None:
        """Have a page touched. As many as the process has threads for may be on their way."""
        with contextlib.suppress(BrokenPipeError):  # it ended, and `ended` hears of it
            os.write(self._pages_fd, PAGE.pack(address))

    async def close(self) -> None:
        """End the process, wherever it waits, and return when it is gone."""
        for fd in (self._found_fd, self._pidfd):
            self._loop.remove_reader(fd)
        self._process.kill()
        gone: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, _resolve, gone)
        try:
            await gone
        finally:
            self._loop.remove_reader(self._pidfd)
            self._process.wait()
            os.close(self._pidfd)
            self._close_fds()

    def _close_fds(self) -> None:
        self._control.close()
        for fd in (self._pages_fd, self._found_fd, self.uffd):
            if fd >= 0:
                os.close(fd)
        self.uffd = -1

    async def _ask(self, kind: int, first: int, second: int, fd: int = -1) -> int:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        async with self._turn:
            if self._out_of_step:
                raise OSError(32, "the process that is to touch pages was given up")
            # An answer that nobody waits for any more would be taken for the next one's.
            self._out_of_step = True
            try:
                request = [REQUEST.pack(kind, first, second)]
                self._control.sendmsg(request, rights if fd >= 0 else [])
                await self._readable()
                answer = self._control.recv(STATUS.size)
            except ConnectionError:
                answer = b""
            self._out_of_step = False
            return self._check(answer)

    def _check(self, answer: bytes) -> int:
        if len(answer) != STATUS.size:
            raise OSError(32, "the process that is to touch pages ended")
        status = int(STATUS.unpack(answer)[0])
        if status < 0:
            raise OSError(-status, os.strerror(-status))
        return status

    async def _readable(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._control.fileno(), _resolve, ready)
        try:
            async with asyncio.timeout(ANSWER_PATIENCE_S):
                await ready
        except TimeoutError:
            raise OSError(110, "the process that is to touch pages does not answer") from None
        finally:
            self._loop.remove_reader(self._control.fileno())

    def _on_found(self) -> None:
        try:
            data = os.read(self._found_fd, PAGE.size * _READ_PAGES)
        except BlockingIOError:
            return
        if not data or len(data) % PAGE.size:
            self._end("the process ended")
            return
        try:
            self._found([address for (address,) in PAGE.iter_unpack(data)])
        except ValueError as exc:
            self._end(str(exc))

    def _end(self, reason: str) -> None:
        self._loop.remove_reader(self._found_fd)
        self._loop.remove_reader(self._pidfd)
        self._ended(reason)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
