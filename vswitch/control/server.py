"""The control socket of a running switch: connections, their limits and their events.

A client is not trusted to keep the protocol: whatever it sends, or does not read, costs nobody but
itself. What it may ask for depends on who it is: see `Access`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from vswitch.api import SwitchApi, TurnsInfo
from vswitch.config.settings import Settings
from vswitch.control.access import Access, Peer, access_of
from vswitch.control.methods import Methods, Session
from vswitch.control.protocol import (
    ControlError,
    Decoder,
    InvalidRequestError,
    Packed,
    Request,
    pack_packed_response,
    pack_response,
)
from vswitch.control.subscriptions import EventQueue, Subscriptions
from vswitch.control.turns import Queue, Turn, Turns
from vswitch.errors import ProtocolError, VswitchError
from vswitch.host.unixsocket import ListeningSocket, unlink_if_ours
from vswitch.relay import link
from vswitch.relay.process import Relay
from vswitch.relay.wire import Mode

_log = logging.getLogger(__name__)

CLIENTS_MAX = 64
"""Connections at a time; one more is told `busy` and closed."""
CLIENTS_RESERVED = 8
"""More of them, which only those get who may change something."""
REQUEST_PATIENCE_S = 10.0
"""How long a client may take for the rest of a request it began."""
READ_PATIENCE_S = 30.0
"""How long a client for whom something waits may read nothing."""
_CHUNK_LEN = 1 << 14
_GOODBYE_S = 1.0
_BACKLOG = 128
_ACCEPT_AGAIN_S = 0.5  # where there are no more descriptors


class ControlServer:
    """Serves the control socket of one switch."""

    def __init__(
        self,
        switch: SwitchApi,
        listener: ListeningSocket,
        relay: Relay,
        *,
        config_path: Path | None = None,
        config_read: Settings | None = None,
        request_stop: Callable[[], None],
        turns: Callable[[], TurnsInfo | None] = lambda: None,
    ) -> None:
        """Takes over `listener`; `config_path` is where `save` writes unless told otherwise,
        `config_read` what was read there.

        `turns` are those of the event loop. Where the kernel cannot keep clients from sending
        descriptors, these are `relay`'s to get.
        """
        self._switch = switch
        self._listener = listener
        self._relay = relay
        self._relayed: int | None = None
        self._methods = Methods(
            switch,
            config_path=config_path,
            config_read=config_read,
            request_stop=request_stop,
            turns=turns,
        )
        self._turns = Turns()
        self._door = Turn(self._turns, Queue.DOOR)
        self._subscriptions = Subscriptions(switch)
        self._doorkeeper: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients = 0
        self._numbers = itertools.count(1)

    async def start(self) -> None:
        """Accept clients from now on."""
        self._listener.setblocking(False)
        self._listener.listen(_BACKLOG)
        if not self._listener.refuses_rights:
            self._relayed = self._relay.listen(self._listener, self, Mode.PLAIN)
            return
        self._doorkeeper = asyncio.get_running_loop().create_task(self._let_in())

    async def close(self) -> None:
        """Remove the socket and close all connections, after what was sent on them has left."""
        unlink_if_ours(self._listener.path, self._listener)
        if self._relayed is not None:
            self._relay.forget(self._relayed)
        tasks = list(self._tasks)
        if self._doorkeeper is not None:
            tasks.append(self._doorkeeper)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    async def _let_in(self) -> None:
        """Accept one connection after the other, each in a turn of its own."""
        loop = asyncio.get_running_loop()
        while True:
            came = asyncio.Event()
            loop.add_reader(self._listener, came.set)
            try:
                await came.wait()
            finally:
                loop.remove_reader(self._listener)
            async with self._door:
                again = self._accept()
            if not again:
                await asyncio.sleep(_ACCEPT_AGAIN_S)

    def _accept(self) -> bool:
        """Begin to serve a connection that waits; False if there can be none at present."""
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return True
        except OSError as exc:
            _log.error("no control client can be accepted: %s", exc.strerror)
            return False
        sock.setblocking(False)
        self._begin(sock, Peer.of(sock))
        return True

    def _begin(self, sock: socket.socket, peer: Peer) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(sock, peer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What the relay says

    def connected(self, sock: socket.socket, peer: link.Peer, _: int) -> None:
        self._begin(sock, Peer(*peer))

    def failed(self, error: int) -> None:
        """Nobody is connected to."""

    def crowded(self, stuck: int) -> None:
        if stuck:
            _log.warning(
                "control socket: nobody more is let in, %d clients are there or sent what cannot "
                "be closed", stuck,
            )  # fmt: skip

    async def _serve(self, sock: socket.socket, peer: Peer) -> None:
        writer: asyncio.StreamWriter | None = None
        try:
            access = self._access(peer)
            reader, writer = await _streams(sock)
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
                next(self._numbers),
                peer,
                access,
                reader,
                writer,
                self._methods,
                self._subscriptions,
                self._turns,
            )
            self._clients += 1
            try:
                await client.run()
            finally:
                self._clients -= 1
        except OSError as exc:
            _log.debug("control client went away: %s", exc)
        finally:
            if writer is None:
                sock.close()
            else:
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


async def _streams(sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """What asyncio.start_unix_server would have made of an accepted socket."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_CHUNK_LEN, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


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
        subscriptions: Subscriptions,
        turns: Turns,
    ) -> None:
        self._label = f"control client {number} (pid {peer.pid}, uid {peer.uid})"
        self._reader = reader
        self._writer = writer
        self._methods = methods
        self._subscriptions = subscriptions
        may_change = access is Access.ALL
        # Requests and events have turns of their own; it is the queue that has the share.
        queue = Queue.CHANGING if may_change else Queue.LOOKING
        self._turn = Turn(turns, queue)
        self._event_turn = Turn(turns, queue)
        self._session = Session(
            self._subscribe, self._unsubscribe, self._turn.again, may_change=may_change
        )
        self._events = EventQueue(self._say_it_loses)

    async def run(self) -> None:
        """Serve until the client goes away or breaks the protocol."""
        _log.debug("%s: connected", self._label)
        pump = asyncio.get_running_loop().create_task(self._pump())
        decoder = Decoder(trusted=False)
        try:
            await self._serve(decoder)
        except ProtocolError as exc:
            _log.warning("%s: closed: %s", self._label, exc.message)
            await self._send([pack_response(None, exc)])
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
        messages = decoder.feed(data)
        while True:
            # Reading a request, doing what it says and packing the answer: a turn for each.
            async with self._turn:
                try:
                    message = next(messages, None)
                    if message is None:
                        return
                    if not isinstance(message, Request):
                        raise InvalidRequestError(
                            "a client sends requests, [0, msgid, method, params]"
                        )
                    response = await self._answer(message)
                except InvalidRequestError as exc:
                    if exc.msgid is None:
                        raise  # no client at all: the first letter of HTTP would be a message
                    _log.warning("%s: invalid request: %s", self._label, exc.message)
                    response = [pack_response(exc.msgid, exc)]
                    messages = decoder.feed(b"")
            await self._send(response)
            if not decoder.pending:
                return

    async def _answer(self, request: Request) -> list[bytes]:
        """The response as bytes, in pieces."""
        error: VswitchError | None = None
        try:
            result = await self._methods.call(request.method, request.params, self._session)
            if isinstance(result, Packed):
                return pack_packed_response(request.msgid, result)
            return [pack_response(request.msgid, None, result)]
        except VswitchError as exc:
            error = exc
        except Exception:
            # One request must not end the switch; the traceback is for the developers.
            _log.exception("%s: %s failed", self._label, request.method)
            error = ControlError(
                f"{request.method} failed inside the switch",
                hint="this is a bug; the log of the switch has the details",
            )
        _log.debug("%s: %.64r: %r", self._label, request.method, error.message)
        return [pack_response(request.msgid, error)]

    async def _send(self, pieces: list[bytes]) -> None:
        """Return when the client has read most of it: memory stays bounded.

        Raises OSError when it went away or has read nothing for READ_PATIENCE_S.
        """
        if self._writer.is_closing():
            raise ConnectionResetError  # uvloop's own error for that is a RuntimeError
        self._writer.writelines(pieces)
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
        self._events.names = names
        self._subscriptions.add(self._events)

    def _unsubscribe(self) -> None:
        self._subscriptions.remove(self._events)
        self._events.clear()

    def _say_it_loses(self) -> None:
        _log.warning("%s: reads too slowly and loses events", self._label)

    async def _pump(self) -> None:
        """Send events as fast as the client reads them, and how many were lost when it did not."""
        with contextlib.suppress(OSError):
            while True:
                await self._events.filled()
                async with self._event_turn:
                    some = self._events.take()
                await self._send([some])
