"""One connection of the relay's, at the switch's end of it."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from typing import NamedTuple

from vswitch.relay import wire
from vswitch.relay.wire import Ask, Kind, Say

PRESENCE_PATIENCE_S = 2.0
"""How long the relay may take to say whether a peer is there: longer, and it waits for the peer."""

_FD_LEN = array.array("i").itemsize
_ANCILLARY_LEN = socket.CMSG_SPACE(wire.MAX_FDS * _FD_LEN)


class Peer(NamedTuple):
    """Who is connected, as the kernel knows it (SO_PEERCRED, SO_PEERGROUPS)."""

    pid: int
    uid: int
    gids: frozenset[int]


class LinkError(Exception):
    """The connection cannot go on, for this reason."""


class Found:
    """A descriptor that a peer handed over, as the relay found it.

    The relay keeps its own until this object is gone: when the switch closes or unmaps its copy,
    that is not the last one, and waits for nothing. `fd` is -1 for what was not passed on.
    """

    __slots__ = ("_id", "_link", "block", "dev", "fd", "ino", "kind", "size", "text")

    def __init__(self, link: Link, raw: bytes) -> None:
        kind, self._id, self.size, self.dev, self.ino, self.block, text = wire.FOUND.unpack(raw)
        self._link = link
        self.kind = Kind(kind)
        self.text = text.rstrip(b"\0").decode("ascii", "replace")
        self.fd = -1
        link.n_found += 1

    def __del__(self) -> None:
        self._link.release(self._id, tell=self.kind is not Kind.SOCKET)


class Link:
    """Takes over `sock`, a non-blocking SOCK_SEQPACKET socket whose other end the relay has.

    `peer` is who is connected, `number` the relay's name for the connection.
    """

    def __init__(self, sock: socket.socket, peer: Peer, number: int) -> None:
        self.peer = peer
        self.number = number
        self.n_found = 0
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._data = b""
        self._unsent: list[int] = []
        self._closed = False
        self._ended = False
        self._problem: str | None = None
        self._reading: asyncio.Future[None] | None = None
        self._presence: asyncio.Future[bool] | None = None
        self._sharing: asyncio.Future[bool] | None = None

    def fileno(self) -> int:
        return self._sock.fileno()

    async def receive(self, length: int) -> tuple[bytes, list[Found]]:
        """Up to `length` bytes, b"" at the end, and descriptors that came with the first of them.

        Raises LinkError when more than wire.MAX_FDS came, and after `cut`.
        """
        found: list[Found] = []
        while not self._data:
            try:
                packet, ancillary, _, _ = self._sock.recvmsg(
                    wire.PACKET_LEN_MAX, _ANCILLARY_LEN, socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                if self._problem is not None:
                    raise LinkError(self._problem) from None
                await self._readable()
                continue
            except OSError:
                packet, ancillary = b"", []
            if not packet:
                self._no_more_answers()
                return b"", []
            fds = array.array("i")
            for _, _, raw in ancillary:
                fds.frombytes(raw[: len(raw) - len(raw) % _FD_LEN])
            found = self._take(packet, list(fds))
        data, self._data = self._data[:length], self._data[length:]
        return data, found

    def _take(self, packet: bytes, fds: list[int]) -> list[Found]:
        kind, count = wire.SAY.unpack_from(packet)
        if kind != Say.DATA:
            waiting = self._presence if kind == Say.HERE else self._sharing
            if waiting is not None and not waiting.done():
                waiting.set_result(bool(count))
            return []
        if count > wire.MAX_FDS:
            raise LinkError(f"more than {wire.MAX_FDS} file descriptors came with one message")
        at = wire.SAY.size
        found: list[Found] = []
        for _ in range(count):
            one = Found(self, packet[at : at + wire.FOUND.size])
            at += wire.FOUND.size
            if one.kind in (Kind.EVENTFD, Kind.MEMORY, Kind.SOCKET):
                if not fds:
                    # Out of descriptors, and the kernel gave us fewer.
                    for each in found:
                        if each.fd >= 0:
                            os.close(each.fd)
                    raise LinkError("no file descriptors are left (LimitNOFILE, ulimit -n)")
                one.fd = fds.pop(0)
            found.append(one)
        self._data = packet[at:]
        return found

    async def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """Send bytes, with descriptors that stay the caller's; waits while the peer does not read.

        Raises ConnectionError when there is nobody.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        packet = wire.ASK.pack(Ask.SEND, 0, 0, 0, 0) + data
        while True:
            try:
                self._sock.sendmsg([packet], rights, socket.MSG_NOSIGNAL)
                return
            except (BlockingIOError, InterruptedError):
                ready: asyncio.Future[None] = self._loop.create_future()
                self._loop.add_writer(self._sock.fileno(), resolve, ready)
                try:
                    await ready
                finally:
                    self._loop.remove_writer(self._sock.fileno())

    async def peer_is_gone(self) -> bool | None:
        """Whether the peer has hung up; None if the relay cannot say, for it waits for the peer.

        Somebody must be in `receive` now and then. One at a time.
        """
        if self._ended:
            return True
        self._presence = self._loop.create_future()
        try:
            async with asyncio.timeout(PRESENCE_PATIENCE_S):
                self._ask(Ask.HERE)
                return await self._presence
        except TimeoutError:
            return None
        except OSError:
            return True
        finally:
            self._presence = None

    async def is_private_copy(self, uva: int, dev: int, ino: int) -> bool:
        """Whether the peer has a file (st_dev, st_ino) mapped privately at its address `uva`.

        False also where that cannot be told: the process is in another PID namespace, or belongs to
        somebody else, or is not the one who mapped the memory. One at a time; somebody must be in
        `receive`. Raises OSError when it cannot be asked.
        """
        if self._ended:
            return False
        self._sharing = self._loop.create_future()
        try:
            self._ask(Ask.SHARING, uva=uva, dev=dev, ino=ino)
            return await self._sharing
        finally:
            self._sharing = None

    def cut(self, problem: str) -> None:
        """Let `receive` fail with this reason, after what has come already."""
        self._problem = problem
        if self._reading is not None:
            resolve(self._reading)

    def close(self) -> None:
        """Hang up. Of descriptors that are still in use the relay hears when they are no more."""
        if self._closed:
            return
        self._closed = True
        self._data = b""
        self._no_more_answers()
        try:
            self._ask(Ask.END)
        except OSError:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        if not self.n_found:
            self._sock.close()

    def _no_more_answers(self) -> None:
        self._ended = True
        for waiting, answer in ((self._presence, True), (self._sharing, False)):
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)

    def release(self, number: int, *, tell: bool) -> None:
        """A Found is gone, and with it all that the switch had of the descriptor."""
        self.n_found -= 1
        if tell:
            self._unsent.append(number)
        with contextlib.suppress(OSError):
            while self._unsent:
                # Those that do not go now go with the next one, or with the connection.
                self._ask(Ask.RELEASE, self._unsent[-1])
                self._unsent.pop()
        if self._closed and not self.n_found:
            self._sock.close()

    def _ask(self, kind: Ask, number: int = 0, *, uva: int = 0, dev: int = 0, ino: int = 0) -> None:
        packet = wire.ASK.pack(kind, number, uva, dev, ino)
        self._sock.send(packet, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    async def _readable(self) -> None:
        ready = self._reading = self._loop.create_future()
        self._loop.add_reader(self._sock.fileno(), resolve, ready)
        try:
            await ready
        finally:
            self._reading = None
            self._loop.remove_reader(self._sock.fileno())


def resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
