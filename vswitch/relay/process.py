"""The relay's process (relay.c), as the switch sees it: started, told what to do, and ended."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import functools
import itertools
import os
import signal
import socket
import subprocess
import weakref
from collections import deque
from pathlib import Path
from typing import Protocol, Self

from vswitch.errors import SocketError, VswitchError
from vswitch.host.unixsocket import ListeningSocket
from vswitch.relay import wire
from vswitch.relay.link import Link, Peer, resolve
from vswitch.relay.wire import Mode, Order, Report

PROGRAM = Path(__file__).with_name("vswitch-relay")
START_PATIENCE_S = 10.0
_GOODBYE_S = 0.5
_STATUS_PATIENCE_S = 0.1
_STUCK = (
    "the relay waits for a file descriptor that the frontend sent (a file on a file system that "
    "does not answer, such as FUSE or NFS?)"
)


@functools.cache
def hold_program() -> int:
    """Open the relay's program for every later start; returns the descriptor.

    Before this process becomes another user: the package may lie where only root can look, as in
    root's home. Raises VswitchError.
    """
    try:
        return os.open(PROGRAM, os.O_PATH | os.O_CLOEXEC)
    except OSError as exc:
        raise _cannot_start(exc) from exc


def _cannot_start(exc: OSError) -> VswitchError:
    return VswitchError(
        f"cannot start {PROGRAM}: {exc.strerror}",
        hint="it belongs to the package: install it again, where programs may be run"
        if not isinstance(exc, FileNotFoundError)
        else "it is built with the package: pip install . (or -e .), with a C compiler",
    )


class Source(Protocol):
    """Whoever wants connections from a socket file."""

    def connected(self, sock: socket.socket, peer: Peer, number: int) -> None:
        """Somebody is there. `sock` is the end of ours, `number` the name of the connection."""
        ...

    def failed(self, error: int) -> None:
        """connect() failed with this errno."""
        ...

    def crowded(self, stuck: int) -> None:
        """Nobody more is let in, for so many connections cannot be closed; 0: that is over."""
        ...


class Relay:
    """A started relay. `close` it when nobody uses its connections any more."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets an exception if the process ends although nobody told it to."""
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._sources: dict[int, Source] = {}
        self._links: weakref.WeakValueDictionary[int, Link] = weakref.WeakValueDictionary()
        self._later: deque[tuple[bytes, int]] = deque()
        program = hold_program()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        ours.setblocking(False)
        try:
            self._process = subprocess.Popen(
                [PROGRAM, str(theirs.fileno()), str(program)],
                executable=f"/proc/self/fd/{program}",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # whose reader would wait for it, should it be stuck
                pass_fds=[theirs.fileno(), program],
            )
        except OSError as exc:
            ours.close()
            raise _cannot_start(exc) from exc
        finally:
            theirs.close()
        self._process_fd = os.pidfd_open(self._process.pid)

    @classmethod
    async def start(cls) -> Self:
        """Start the program; returns when it is confined. Raises VswitchError."""
        relay = cls()
        try:
            await relay._confined()
        except BaseException:
            relay._process.kill()
            relay._process.wait()
            relay._close_fds()
            raise
        relay._loop.add_reader(relay._control.fileno(), relay._on_report)
        return relay

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def backlog(self) -> int:
        """Orders that wait until it takes them."""
        return len(self._later)

    async def _confined(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._control.fileno(), resolve, ready)

        error = 0
        try:
            async with asyncio.timeout(START_PATIENCE_S):
                await ready
            report = self._control.recv(wire.REPORT_LEN_MAX)
            error = wire.REPORT.unpack(report)[1] if report else -1
        except (TimeoutError, ConnectionError):
            error = -1
        finally:
            self._loop.remove_reader(self._control.fileno())
        if error:
            why = os.strerror(error) if error > 0 else "it ended or did not answer"
            raise VswitchError(f"the relay of the sockets ({PROGRAM}) cannot be started: {why}")

    def listen(self, sock: ListeningSocket, source: Source, mode: Mode = Mode.VHOST_USER) -> int:
        """Give a listening socket to the relay, which has the only copy of it afterwards.

        Returns a name for `forget`. Raises SocketError.
        """
        number = next(self._numbers)
        self._sources[number] = source
        try:
            self._order(Order.LISTEN, number, mode=mode, fd=sock.fileno())
        except OSError as exc:
            del self._sources[number]
            raise SocketError(
                f"cannot hand {sock.path} to the relay: {exc.strerror}",
                hint="try again; the log says so if the relay has ended",
            ) from exc
        finally:
            sock.close()
        return number

    def forget(self, number: int) -> None:
        """Close the socket of `listen`; who comes late is let go, as is who was connected to."""
        del self._sources[number]
        with contextlib.suppress(OSError):
            self._order(Order.CLOSE, number)

    def register(self, source: Source) -> int:
        """A name for `connect` and `forget`."""
        number = next(self._numbers)
        self._sources[number] = source
        return number

    def connect(self, number: int, path: Path) -> None:
        """Connect to a socket; the source hears how it went."""
        try:
            self._order(Order.CONNECT, number, path=os.fsencode(path))
        except OSError as exc:
            self._loop.call_soon(self._sources[number].failed, exc.errno or errno.EIO)

    def link(self, sock: socket.socket, peer: Peer, number: int) -> Link:
        """The connection of MODE_VHOST_USER that `Source.connected` was told of."""
        link = self._links[number] = Link(sock, peer, number)
        return link

    async def close(self) -> None:
        """End the process, without waiting for any that it waits for itself."""
        if self._control.fileno() < 0:
            return
        if not self.ended.done():
            self._loop.remove_reader(self._control.fileno())
            with contextlib.suppress(OSError):
                self._order(Order.QUIT)
        self.ended.cancel()
        self._forget_later()
        self._control.close()
        gone: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._process_fd, resolve, gone)
        try:
            async with asyncio.timeout(_GOODBYE_S):
                await gone
        except TimeoutError:
            self._process.kill()  # which may have no effect before its peers let it go
        self._loop.remove_reader(self._process_fd)
        self._process.poll()
        self._close_fds()

    def _close_fds(self) -> None:
        self._control.close()
        os.close(self._process_fd)

    def _order(
        self,
        kind: Order,
        number: int = 0,
        *,
        mode: Mode = Mode.VHOST_USER,
        path: bytes = b"",
        fd: int = -1,
    ) -> None:
        packet = wire.ORDER.pack(kind, mode, number, path)
        if not self._later:
            try:
                self._send(packet, fd)
                return
            except BlockingIOError:
                self._loop.add_writer(self._control.fileno(), self._send_later)
        # Hundreds of ports at once, and a relay that the machine has not run meanwhile.
        self._later.append((packet, os.dup(fd) if fd >= 0 else -1))

    def _send(self, packet: bytes, fd: int) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        self._control.sendmsg([packet], rights if fd >= 0 else [], socket.MSG_NOSIGNAL)

    def _send_later(self) -> None:
        while self._later:
            packet, fd = self._later[0]
            try:
                self._send(packet, fd)
            except BlockingIOError:
                return
            except OSError:
                break  # it has ended, as `_on_report` learns too
            self._later.popleft()
            if fd >= 0:
                os.close(fd)
        self._forget_later()

    def _forget_later(self) -> None:
        self._loop.remove_writer(self._control.fileno())
        while self._later:
            _, fd = self._later.popleft()
            if fd >= 0:
                os.close(fd)

    def _on_report(self) -> None:
        try:
            raw, ancillary, _, _ = self._control.recvmsg(
                wire.REPORT_LEN_MAX, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            raw, ancillary = b"", []
        if not raw:
            self._end()
            return
        kind, error, source_number, number, pid, uid, gid, n_groups = wire.REPORT.unpack_from(raw)
        fds = array.array("i")
        for _, _, each in ancillary:
            fds.frombytes(each[: len(each) - len(each) % fds.itemsize])
        sock = socket.socket(fileno=fds[0]) if fds else None
        source = self._sources.get(source_number)
        if kind == Report.NEW and sock is not None and source is not None:
            sock.setblocking(False)
            groups = array.array("I")
            groups.frombytes(raw[wire.REPORT.size : wire.REPORT.size + 4 * n_groups])
            source.connected(sock, Peer(pid, uid, frozenset([gid, *groups])), number)
            return
        if sock is not None:
            sock.close()  # of a port that is gone; the relay hangs up
        if kind == Report.STUCK:
            link = self._links.get(number)
            if link is not None:
                link.cut(_STUCK)
        elif source is not None and kind == Report.FAILED:
            source.failed(error)
        elif source is not None and kind == Report.CROWDED:
            source.crowded(error)

    def _end(self) -> None:
        self._loop.remove_reader(self._control.fileno())
        # Its socket is closed a moment before there is a status; a stuck one never has any.
        self._loop.call_later(_STATUS_PATIENCE_S, self._say_how_it_ended)

    def _say_how_it_ended(self) -> None:
        status = self._process.poll()
        how = "it closed its socket"
        if status is not None:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        if not self.ended.done():
            self.ended.set_exception(
                VswitchError(f"the relay of the vhost-user sockets ended ({how})")
            )
