"""The control socket of a running switch: connections, their limits and their events.

A client is not trusted to keep the protocol: whatever it sends, or does not read, costs nobody but
itself. What it may ask for depends on who it is: see `Access`.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vswitch.control.api import Event, SwitchApi, TurnsInfo
from vswitch.control.methods import Methods, Session
from vswitch.control.protocol import (
    ControlError,
    Decoder,
    InvalidRequestError,
    Request,
    pack_notification,
    pack_response,
)
from vswitch.errors import ProtocolError, VswitchError
from vswitch.unixsocket import ListeningSocket, unlink_if_ours

_log = logging.getLogger(__name__)

CLIENTS_MAX = 64
"""Connections at a time; one more is told `busy` and closed."""
CLIENTS_RESERVED = 8
"""More of them, which only those get who may change something."""
EVENTS_QUEUED_MAX = 1024
"""Events held for a subscriber that does not read; further ones are dropped and counted."""
REQUEST_PATIENCE_S = 10.0
"""How long a client may take for the rest of a request it began."""
READ_PATIENCE_S = 30.0
"""How long a client for whom something waits may read nothing."""
_CHUNK_LEN = 1 << 14
_GOODBYE_S = 1.0
_SO_PEERGROUPS = 59
_GROUPS_MAX = 256  # more than that do not fit into what getsockopt() of Python returns


class Peer(NamedTuple):
    """Who connected: SO_PEERCRED and, for permissions of the socket's group, SO_PEERGROUPS."""

    pid: int
    uid: int
    gids: frozenset[int]

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """The credentials a peer had when it called connect()."""
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = struct.unpack("=iII", raw)
        gids = {gid}
        with contextlib.suppress(OSError):  # before Linux 4.13
            groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _GROUPS_MAX)
            gids.update(struct.unpack(f"={len(groups) // 4}I", groups))
        return cls(pid, uid, frozenset(gids))


class Access(enum.IntEnum):
    """What a client may do with the switch."""

    NONE = 0
    READ = 1
    """Look at it: the methods in `methods.READ_ONLY`."""
    ALL = 2


def access_of(peer: Peer, status: os.stat_result | None) -> Access:
    """All for our user, root and the socket's owner and group, looking for anybody else it lets in.

    The owner, the group and others need the permission to write to the socket for that. `status` is
    that of the socket's file; None if it is gone, when only the first two are left.
    """
    if peer.uid in (0, os.geteuid()):
        return Access.ALL
    if status is None:
        return Access.NONE
    if peer.uid == status.st_uid:
        return Access.ALL if status.st_mode & 0o200 else Access.NONE
    if status.st_gid in peer.gids:
        return Access.ALL if status.st_mode & 0o020 else Access.NONE
    return Access.READ if status.st_mode & 0o002 else Access.NONE


class ControlServer:
    """Serves the control socket of one switch."""

    def __init__(
        self,
        switch: SwitchApi,
        listener: ListeningSocket,
        *,
        config_path: Path | None = None,
        request_stop: Callable[[], None],
        turns: Callable[[], TurnsInfo | None] = lambda: None,
    ) -> None:
        """Takes over `listener`; `config_path` is where `save` writes unless told otherwise.

        `turns` are those of the event loop.
        """
        self._switch = switch
        self._listener = listener
        self._methods = Methods(
            switch, config_path=config_path, request_stop=request_stop, turns=turns
        )
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients = 0
        self._numbers = itertools.count(1)

    async def start(self) -> None:
        """Accept clients from now on."""
        self._server = await asyncio.start_unix_server(
            self._accepted, sock=self._listener, limit=_CHUNK_LEN
        )

    async def close(self) -> None:
        """Remove the socket and close all connections, after what was sent on them has left."""
        unlink_if_ours(self._listener.path, self._listener)
        if self._server is not None:
            self._server.close()
        self._listener.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            peer = Peer.of(writer.get_extra_info("socket"))
            access = self._access(peer)
            refusal = self._refusal(peer, access)
            if refusal is not None:
                _log.warning(
                    "control client (pid %d, uid %d) refused: %s",
                    peer.pid,
                    peer.uid,
                    refusal.message,
                )
                writer.write(pack_response(None, refusal))
                return
            client = _Connection(
                next(self._numbers), peer, access, reader, writer, self._methods, self._switch
            )
            self._clients += 1
            try:
                await client.run()
            finally:
                self._clients -= 1
        except OSError as exc:
            _log.debug("control client went away: %s", exc)
        finally:
            await _close(writer)

    def _access(self, peer: Peer) -> Access:
        try:
            status = self._listener.path.stat()
        except OSError:
            status = None
        return access_of(peer, status)

    def _refusal(self, peer: Peer, access: Access) -> ControlError | None:
        if access is Access.NONE:
            return ControlError(
                f"uid {peer.uid} may not control this switch",
                hint="run as the user who started the switch, or as root; control_group and "
                "control_permissions in the [switch] table let others in",
                code="permission-denied",
            )
        if self._clients >= CLIENTS_MAX + CLIENTS_RESERVED * (access is Access.ALL):
            return ControlError(
                f"the switch has {self._clients} control clients already",
                hint="close some of them; one connection can carry many requests",
                code="busy",
            )
        return None


async def _close(writer: asyncio.StreamWriter) -> None:
    """Close gently, for a second: a peer that does not read must not hold us up."""
    try:
        async with asyncio.timeout(_GOODBYE_S):
            writer.close()
            await writer.wait_closed()
    except (OSError, TimeoutError, asyncio.CancelledError):
        writer.transport.abort()


class _Connection:
    """One client: its requests are answered one after the other, in order."""

    def __init__(
        self,
        number: int,
        peer: Peer,
        access: Access,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        methods: Methods,
        switch: SwitchApi,
    ) -> None:
        self._label = f"control client {number} (pid {peer.pid}, uid {peer.uid})"
        self._reader = reader
        self._writer = writer
        self._methods = methods
        self._switch = switch
        self._session = Session(self._subscribe, self._unsubscribe, may_change=access is Access.ALL)
        self._end_subscription: Callable[[], None] | None = None
        self._names: frozenset[str] | None = None
        self._events: deque[bytes] = deque()
        self._lost = 0
        self._has_events = asyncio.Event()

    async def run(self) -> None:
        """Serve until the client goes away or breaks the protocol."""
        _log.debug("%s: connected", self._label)
        pump = asyncio.get_running_loop().create_task(self._pump())
        decoder = Decoder(trusted=False)
        try:
            await self._serve(decoder)
        except ProtocolError as exc:
            _log.warning("%s: closed: %s", self._label, exc.message)
            await self._send(pack_response(None, exc))
        finally:
            self._unsubscribe()
            pump.cancel()
            _log.debug("%s: disconnected", self._label)

    async def _serve(self, decoder: Decoder) -> None:
        message, due = -1, None
        while True:
            if not decoder.pending:
                due = None
            elif decoder.begun != message or due is None:
                message = decoder.begun
                due = asyncio.get_running_loop().time() + REQUEST_PATIENCE_S
            try:
                async with asyncio.timeout_at(due):
                    data = await self._reader.read(_CHUNK_LEN)
            except TimeoutError:
                raise ProtocolError(
                    f"a request was begun and not finished in {REQUEST_PATIENCE_S:g} s"
                ) from None
            if not data:
                return
            await self._handle(decoder, data)

    async def _handle(self, decoder: Decoder, data: bytes) -> None:
        while True:
            try:
                for message in decoder.feed(data):
                    if isinstance(message, Request):
                        await self._answer(message)
                    else:
                        raise InvalidRequestError(
                            "a client sends requests, [0, msgid, method, params]"
                        )
                return
            except InvalidRequestError as exc:
                if exc.msgid is None:
                    raise  # no client at all: the first letter of HTTP would be a message
                _log.warning("%s: invalid request: %s", self._label, exc.message)
                await self._send(pack_response(exc.msgid, exc))
                data = b""

    async def _answer(self, request: Request) -> None:
        error: VswitchError | None = None
        result: object = None
        try:
            result = await self._methods.call(request.method, request.params, self._session)
            response = pack_response(request.msgid, None, result)
        except VswitchError as exc:
            error = exc
        except Exception:
            # One request must not end the switch; the traceback is for the developers.
            _log.exception("%s: %s failed", self._label, request.method)
            error = ControlError(
                f"{request.method} failed inside the switch",
                hint="this is a bug; the log of the switch has the details",
            )
        if error is not None:
            _log.debug("%s: %.64r: %r", self._label, request.method, error.message)
            response = pack_response(request.msgid, error)
        await self._send(response)
        # Somebody else's turn: a client that never stops asking is never waited for.
        await asyncio.sleep(0)

    async def _send(self, data: bytes) -> None:
        """Return when the client has read most of it: memory stays bounded.

        Raises OSError when it went away or has read nothing for READ_PATIENCE_S.
        """
        if self._writer.is_closing():
            raise ConnectionResetError  # uvloop's own error for that is a RuntimeError
        self._writer.write(data)
        transport = self._writer.transport
        while True:
            waiting = transport.get_write_buffer_size()
            try:
                async with asyncio.timeout(READ_PATIENCE_S):
                    await self._writer.drain()
                return
            except TimeoutError:
                if transport.get_write_buffer_size() < waiting:
                    continue
            _log.warning("%s: closed: it has read nothing for %g s", self._label, READ_PATIENCE_S)
            transport.abort()
            raise ConnectionAbortedError

    def _subscribe(self, names: frozenset[str] | None) -> None:
        self._names = names
        if self._end_subscription is None:
            self._end_subscription = self._switch.subscribe(self._on_event)

    def _unsubscribe(self) -> None:
        if self._end_subscription is not None:
            self._end_subscription()
            self._end_subscription = None
        self._events.clear()
        self._lost = 0

    def _on_event(self, event: Event) -> None:
        if self._names is not None and event["event"] not in self._names:
            return
        if len(self._events) >= EVENTS_QUEUED_MAX:
            if not self._lost:
                _log.warning("%s: reads too slowly and loses events", self._label)
            self._lost += 1
            return
        self._events.append(pack_notification("event", event))
        self._has_events.set()

    async def _pump(self) -> None:
        """Send events as fast as the client reads them, and how many were lost when it did not."""
        with contextlib.suppress(OSError):
            while True:
                await self._has_events.wait()
                self._has_events.clear()
                while self._events:
                    await self._send(self._events.popleft())
                    if self._lost and not self._events:
                        lost, self._lost = self._lost, 0
                        await self._send(pack_notification("lost", {"count": lost}))
