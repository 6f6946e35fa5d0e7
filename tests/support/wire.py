"""A frontend's end of a socket pair, and a Datapath that writes down what it is told."""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import os
import socket
import tempfile
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from vswitch.relay.link import Link
from vswitch.relay.process import Relay
from vswitch.vhost_user import protocol
from vswitch.vhost_user.backend import Backend
from vswitch.vhost_user.connection import Connection
from vswitch.vhost_user.datapath import DatapathError, RingLog, RingSetup, TranslationPending
from vswitch.vhost_user.descriptors import close_fd
from vswitch.vhost_user.endpoint import Listener
from vswitch.vhost_user.net import NetBackend
from vswitch.vhost_user.protocol import (
    FLAG_NEED_REPLY,
    HEADER,
    Feature,
    LogArea,
    MemRegion,
    VringAddr,
    VringState,
)

OFFERED = Feature.VERSION_1 | Feature.MRG_RXBUF | Feature.RING_EVENT_IDX


class RecordingDatapath:
    """Does nothing, remembers all of it; `refuse` maps a call's name to why it fails."""

    def __init__(self, queue_pairs: int = 2) -> None:
        self.queue_pairs = queue_pairs
        self.memory_slots = 64
        self.features = OFFERED
        self.calls: list[tuple[Any, ...]] = []
        self.running: dict[int, RingSetup] = {}
        self.stop_at = 100
        self.refuse: dict[str, str] = {}
        self.translating = False
        self.has_postcopy = True
        self.uffd = -1
        self.base_offset = 1 << 40
        self.pending: set[int] = set()
        """Addresses of descriptors that wait for a translation."""

    def _note(self, name: str, *what: Any) -> None:
        self.calls.append((name, *what))
        if name in self.refuse:
            raise DatapathError(self.refuse[name])

    async def set_memory(self, regions: list[MemRegion], fds: list[int]) -> None:
        assert not self.running, "memory changed under a running ring"
        assert len(regions) == len(fds)
        for fd in fds:
            os.fstat(fd)
        self._note("set_memory", list(regions))

    async def add_memory(self, region: MemRegion, fd: int) -> None:
        os.fstat(fd)
        self._note("add_memory", region)

    async def remove_memory(self, region: MemRegion) -> None:
        for setup in self.running.values():
            for uva in (setup.desc_uva, setup.used_uva, setup.avail_uva):
                assert not region.uva <= uva < region.uva + region.size, "a ring runs in there"
        self._note("remove_memory", region)

    async def set_dirty_log(self, fd: int, area: LogArea) -> None:
        os.fstat(fd)
        self._note("set_dirty_log", *area)

    async def log_rings(self, logs: dict[int, RingLog | None]) -> None:
        assert logs.keys() <= self.running.keys()
        self._note("log_rings", logs)

    async def start_ring(self, index: int, setup: RingSetup) -> int:
        assert index not in self.running
        for fd in (setup.kick_fd, setup.call_fd):
            if fd >= 0:
                os.fstat(fd)
        self._note("start", index)
        if setup.desc_uva in self.pending:
            raise TranslationPending
        self.running[index] = setup
        return setup.base

    async def stop_rings(self, indices: list[int]) -> list[int]:
        for index in indices:
            setup = self.running.pop(index)
            if setup.kick_fd >= 0:
                os.fstat(setup.kick_fd)
        self._note("stop", *indices)
        await asyncio.sleep(0)
        return [self.stop_at + index for index in indices]

    def make_inflight(self) -> tuple[int, int]:
        self._note("make_inflight")
        return os.memfd_create("inflight"), 4096

    def use_inflight(self, fd: int, size: int, offset: int) -> None:
        assert not self.running
        os.fstat(fd)
        self._note("use_inflight", size, offset)

    def forget_ring(self, index: int) -> None:
        assert index not in self.running
        self._note("forget", index)

    def use_iotlb(self, on: bool) -> None:
        if on != self.translating:
            self._note("use_iotlb", on)
        self.translating = on

    def iotlb_update(self, iova: int, size: int, uva: int, access: int) -> None:
        self._note("iotlb_update", iova, size, uva, access)
        self.pending.discard(iova)

    async def iotlb_invalidate(self, iova: int, size: int) -> None:
        self._note("iotlb_invalidate", iova, size)

    async def advise_postcopy(self) -> int:
        self._note("advise_postcopy")
        self.uffd = os.eventfd(0, os.EFD_CLOEXEC)
        return self.uffd

    def listen_postcopy(self) -> None:
        self._note("listen_postcopy")

    async def fault_base(self, region: MemRegion, fd: int) -> int:
        os.fstat(fd)
        self._note("fault_base", region)
        return region.uva + self.base_offset

    def allow_faults(self, allowed: bool) -> None:
        self._note("allow_faults", allowed)

    async def end_postcopy(self) -> None:
        assert not self.running
        self._note("end_postcopy")
        os.close(self.uffd)

    def ask_again(self) -> None:
        self._note("ask_again")

    async def enable_ring(self, index: int, enabled: bool) -> None:
        self._note("enable", index, enabled)

    def set_call(self, index: int, fd: int, old: int) -> None:
        if fd >= 0:
            os.fstat(fd)
        close_fd(old)
        self._note("set_call", index)

    def signal(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(fd, 1)

    def set_mtu(self, mtu: int) -> None:
        self._note("set_mtu", mtu)

    def announce(self, mac: bytes) -> None:
        self._note("announce", mac.hex(":"))


class Peer:
    """The frontend's end. Its calls block, but never for long: both ends are in this process."""

    def __init__(
        self,
        datapath: RecordingDatapath,
        connection: Connection,
        sock: socket.socket,
        device: Callable[[str, Connection, RecordingDatapath], Backend] = NetBackend,
    ):
        self.datapath = datapath
        self.sock = sock
        self.sock_fd = str(sock.fileno())
        self.link_fd = str(connection.link.fileno())
        self.backend = device("p", connection, datapath)
        self.task = asyncio.create_task(self._run(connection))

    async def _run(self, connection: Connection) -> None:
        try:
            await self.backend.run()
        finally:
            connection.close()

    async def send(
        self, request: int, payload: bytes = b"", fds: list[int] | None = None, *, flags: int = 0
    ) -> None:
        await self.send_raw(protocol.encode(request, payload, flags=flags), fds or [])

    async def send_raw(self, data: bytes, fds: list[int]) -> None:
        rights = array.array("i", fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
        self.sock.sendmsg([data], ancillary)

    async def reply(self) -> tuple[int, int, bytes]:
        """Request, flags and payload of the next reply. ConnectionError at the end."""
        loop = asyncio.get_running_loop()
        raw = await loop.sock_recv(self.sock, HEADER.size)
        if not raw:
            raise ConnectionResetError
        request, flags, size = HEADER.unpack(raw)
        return request, flags, await loop.sock_recv(self.sock, size) if size else b""

    async def ask(self, request: int, payload: bytes = b"") -> bytes:
        await self.send(request, payload)
        answered, flags, data = await self.reply()
        assert (answered, flags) == (request, 0x5)
        return data

    async def ack(self, request: int, payload: bytes = b"", fds: list[int] | None = None) -> int:
        """Send with NEED_REPLY and return the status."""
        await self.send(request, payload, fds, flags=FLAG_NEED_REPLY)
        answered, flags, data = await self.reply()
        assert (answered, flags) == (request, 0x5)
        return protocol.decode_u64(data)

    async def hung_up(self) -> BaseException | None:
        """Wait for the backend to end; why it did."""
        await asyncio.wait([self.task])
        return self.task.exception()


def with_peer(
    test: Callable[[Peer], Awaitable[None]],
    datapath: RecordingDatapath | None = None,
    device: Callable[[str, Connection, RecordingDatapath], Backend] = NetBackend,
) -> None:
    """Run `test` with a connected peer, then close it and see that no descriptor is left.

    `device` is the type of device that the peer finds.
    """

    async def run() -> None:
        async with relayed() as (link, theirs):
            before = open_fds(collect=True)
            peer = Peer(datapath or RecordingDatapath(), Connection(link), theirs, device)
            try:
                async with asyncio.timeout(60):
                    await test(peer)
            finally:
                theirs.close()
                await asyncio.wait([peer.task])
            problem = None if peer.task.cancelled() else peer.task.exception()
            while problem is not None:
                traceback.clear_frames(problem.__traceback__)  # they know what came
                problem = problem.__cause__ or problem.__context__
            for closed in (peer.link_fd, peer.sock_fd):
                del before[closed]
            assert open_fds() == before
            assert not peer.datapath.running

    asyncio.run(run())


@contextlib.asynccontextmanager
async def relayed() -> AsyncIterator[tuple[Link, socket.socket]]:
    """A connection through a relay of its own: the switch's end of it, and the frontend's."""
    relay = await Relay.start()
    try:
        with tempfile.TemporaryDirectory(prefix="vswitch-") as directory:
            listener = Listener(relay, Path(directory, "s"), mode=0o600, owner=None, group=None)
            listener.open()
            theirs = socket.socket(socket.AF_UNIX)
            theirs.connect(f"{directory}/s")
            theirs.setblocking(False)
            link = await listener.next()
            yield link, theirs
            listener.close()
    finally:
        await relay.close()


def open_fds(*, collect: bool = False) -> dict[str, str]:
    """The descriptors of this process, by number, and what they are.

    With `collect` those are closed first that only garbage holds: what an earlier test dropped is
    not to go, by chance, while a later one counts.
    """
    if collect:
        gc.collect()
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the directory's own
    return found


def state(vring: int, num: int) -> bytes:
    return protocol.encode_vring_state(VringState(vring, num))


def addr(vring: int, **other: int) -> bytes:
    fields = {
        "flags": 0, "desc_uva": 0x1000, "used_uva": 0x3000, "avail_uva": 0x2000, "log_gpa": 0,
    } | other  # fmt: skip
    return protocol.encode_vring_addr(VringAddr(vring, **fields))


class Eventfd:
    """An eventfd that closes itself."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)
