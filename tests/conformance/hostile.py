"""Frontends and control clients that ask for all they can get, each in a process of its own.

`python hostile.py KIND ROUNDS SOCKET` does its worst ROUNDS times and ends; what it says on stderr
is why it could not.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack

from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import (
    FLAG_NEED_REPLY,
    Feature,
    IotlbEntry,
    IotlbType,
    LogArea,
    MemRegion,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
)

PATIENCE_S = 60.0
MIB = 1 << 20
GIB = 1 << 30
PAGE = 4096
RING_SIZE = 256
UVA = 1 << 40
FEATURES = (
    Feature.VERSION_1 | Feature.MRG_RXBUF | Feature.RING_EVENT_IDX | Feature.MQ
    | Feature.PROTOCOL_FEATURES | Feature.CTRL_VQ
)  # fmt: skip
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.LOG_SHMFD | ProtocolFeature.RARP | ProtocolFeature.MTU
    | ProtocolFeature.INFLIGHT_SHMFD | ProtocolFeature.STATUS | ProtocolFeature.RESET_DEVICE
)  # fmt: skip


def memory_file(size: int) -> int:
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


class Frontend:
    """A connection on which a request is one line."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))  # waits while the backlog is full
        self.socket.settimeout(PATIENCE_S)

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.socket.sendmsg([data], rights)
        if sent < len(data):
            self.socket.sendall(data[sent:])

    def ask(self, request: Request, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        """Send a request that is answered; the payload of the answer."""
        self.send(protocol.encode(request, payload), fds)
        return self.answer()

    def do(self, request: Request, payload: bytes = b"", fds: tuple[int, ...] = ()) -> int:
        """Send a request with NEED_REPLY; the status that comes back."""
        self.send(protocol.encode(request, payload, flags=FLAG_NEED_REPLY), fds)
        return protocol.decode_u64(self.answer())

    def answer(self) -> bytes:
        header = protocol.decode_header(self._exactly(protocol.HEADER_LEN))
        return self._exactly(header.size)

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            if not more:
                raise ConnectionError("the switch closed the connection")
            data += more
        return data

    def negotiate(self, features: Feature = FEATURES, more: int = 0) -> None:
        value = protocol.encode_u64(PROTOCOL_FEATURES | more)
        self.send(protocol.encode(Request.SET_PROTOCOL_FEATURES, value))
        self.do(Request.SET_FEATURES, protocol.encode_u64(features))


def u64(value: int) -> bytes:
    return protocol.encode_u64(value)


def state(index: int, value: int) -> bytes:
    return protocol.encode_vring_state(VringState(index, value))


class Device:
    """Rings of `pairs` queue pairs, side by side from UVA on, and what is theirs."""

    STRIDE = 4 * PAGE

    def __init__(self, frontend: Frontend, pairs: int, *, memory_len: int = 0) -> None:
        self.frontend = frontend
        self.count = 2 * pairs
        self.memory_len = memory_len or self.count * self.STRIDE
        self.memory = memory_file(self.memory_len)
        self.region = MemRegion(0, self.memory_len, UVA, 0)
        self.kick, self.call = os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC)

    def table(self) -> None:
        payload = protocol.encode_mem_table([self.region])
        assert self.frontend.do(Request.SET_MEM_TABLE, payload, (self.memory,)) == 0

    def addr(self, index: int) -> bytes:
        at = UVA + index * self.STRIDE
        return protocol.encode_vring_addr(VringAddr(index, 0, at, at + 3 * PAGE, at + 2 * PAGE, 0))

    def ring(self, index: int) -> None:
        do = self.frontend.do
        assert do(Request.SET_VRING_NUM, state(index, RING_SIZE)) == 0
        assert do(Request.SET_VRING_BASE, state(index, 0)) == 0
        assert do(Request.SET_VRING_ADDR, self.addr(index)) == 0
        assert do(Request.SET_VRING_CALL, u64(index), (self.call,)) == 0
        assert do(Request.SET_VRING_KICK, u64(index), (self.kick,)) == 0
        assert do(Request.SET_VRING_ENABLE, state(index, 1)) == 0

    def start(self) -> None:
        self.table()
        for index in range(self.count):
            self.ring(index)


Rounds = Iterator[None]


def memory_tables(path: Path) -> Rounds:
    """Eight regions of 64 GiB each, again and again."""
    frontend = Frontend(path)
    frontend.negotiate()
    size = 64 * GIB
    fds = tuple(memory_file(size) for _ in range(8))
    table = protocol.encode_mem_table(
        [MemRegion(i * size, size, UVA + i * size, 0) for i in range(8)]
    )
    while True:
        assert frontend.do(Request.SET_MEM_TABLE, table, fds) == 0
        yield


def memory_slots(path: Path) -> Rounds:
    """All 64 slots filled and emptied under running rings."""
    frontend = Frontend(path)
    frontend.negotiate()
    Device(frontend, 1).start()
    fd = memory_file(GIB)
    regions = [
        protocol.encode_mem_region(MemRegion((8 + i) * GIB, GIB, 2 * UVA + i * GIB, 0))
        for i in range(63)
    ]
    while True:
        for region in regions:
            assert frontend.do(Request.ADD_MEM_REG, region, (fd,)) == 0
        for region in regions:
            assert frontend.do(Request.REM_MEM_REG, region) == 0
        yield


def dirty_logs(path: Path) -> Rounds:
    """A log of 4 GiB in place of another, with rings that write there."""
    frontend = Frontend(path)
    frontend.negotiate(FEATURES | Feature.LOG_ALL)
    Device(frontend, 1).start()
    fd = memory_file(4 * GIB)
    area = protocol.encode_log(LogArea(4 * GIB, 0))
    while True:
        frontend.ask(Request.SET_LOG_BASE, area, (fd,))
        yield


def rings(path: Path) -> Rounds:
    """One running ring is moved, resized, enabled, kicked and called anew."""
    frontend = Frontend(path)
    frontend.negotiate()
    device = Device(frontend, 1)
    device.start()
    do = frontend.do
    while True:
        for size in (RING_SIZE // 2, RING_SIZE):
            do(Request.SET_VRING_NUM, state(1, size))
            do(Request.SET_VRING_KICK, u64(1), (device.kick,))
            do(Request.SET_VRING_CALL, u64(1), (device.call,))
            do(Request.SET_VRING_ERR, u64(1), (device.call,))
            do(Request.SET_VRING_ENABLE, state(1, size // RING_SIZE))
            frontend.ask(Request.GET_VRING_BASE, state(1, 0))
        yield


def many_rings(path: Path) -> Rounds:
    """All rings that a port can have stop and start with each memory table."""
    frontend = Frontend(path)
    frontend.negotiate()
    device = Device(frontend, 128)
    device.start()
    while True:
        device.table()
        yield


def many_rings_features(path: Path) -> Rounds:
    """The same with each change of the features."""
    frontend = Frontend(path)
    frontend.negotiate()
    Device(frontend, 128).start()
    while True:
        for features in (FEATURES & ~Feature.RING_EVENT_IDX, FEATURES):
            assert frontend.do(Request.SET_FEATURES, u64(features)) == 0
        yield


def many_rings_logged(path: Path) -> Rounds:
    """Migration begins and ends for all of them; their log is replaced."""
    frontend = Frontend(path)
    frontend.negotiate()
    Device(frontend, 128).start()
    fd = memory_file(4 * GIB)
    area = protocol.encode_log(LogArea(4 * GIB, 0))
    while True:
        for features in (FEATURES | Feature.LOG_ALL, FEATURES):
            assert frontend.do(Request.SET_FEATURES, u64(features)) == 0
            frontend.ask(Request.SET_LOG_BASE, area, (fd,))
        yield


def comes_and_goes(path: Path) -> Rounds:
    """All rings are set up, and the frontend leaves."""
    while True:
        frontend = Frontend(path)
        frontend.negotiate()
        Device(frontend, 128).start()
        frontend.close()
        yield


def behind_iommu(frontend: Frontend) -> socket.socket:
    """Negotiate it, and all of the memory at once; the channel for misses."""
    frontend.negotiate(FEATURES | Feature.ACCESS_PLATFORM, ProtocolFeature.BACKEND_REQ)
    ours, theirs = socket.socketpair()
    assert frontend.do(Request.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),)) == 0
    theirs.close()
    return ours


def iotlb(path: Path, pairs: int = 1, pages: int = 4096) -> Rounds:
    """As many mappings as there may be: changed, taken back one by one, and all at once."""
    frontend = Frontend(path)
    channel = behind_iommu(frontend)
    device = Device(frontend, pairs, memory_len=64 * MIB)
    device.table()

    def message(kind: IotlbType, page: int, size: int = PAGE) -> bytes:
        entry = IotlbEntry(UVA + page * PAGE, size, UVA + page * PAGE, 3, kind)
        return protocol.encode_iotlb(entry)

    for page in range(4 * device.count):
        assert frontend.do(Request.IOTLB_MSG, message(IotlbType.UPDATE, page)) == 0
    for index in range(device.count):
        device.ring(index)
    updates = [message(IotlbType.UPDATE, page) for page in range(pages)]
    while True:
        for update in updates:
            assert frontend.do(Request.IOTLB_MSG, update) == 0
        for page in range(0, min(pages, 64)):
            assert frontend.do(Request.IOTLB_MSG, message(IotlbType.INVALIDATE, page)) == 0
            assert frontend.do(Request.IOTLB_MSG, updates[page]) == 0
        everything = protocol.encode_iotlb(IotlbEntry(0, 0, 0, 0, IotlbType.INVALIDATE))
        assert frontend.do(Request.IOTLB_MSG, everything) == 0
        with contextlib.suppress(BlockingIOError):
            while channel.recv(1 << 16, socket.MSG_DONTWAIT):
                pass
        yield


def iotlb_of_many_rings(path: Path) -> Rounds:
    """The same with all rings that a port can have."""
    return iotlb(path, 128, 32)


def inflight(path: Path) -> Rounds:
    """Notes of what is in flight, made and handed back."""
    frontend = Frontend(path)
    frontend.negotiate()
    Device(frontend, 1).start()
    asked = protocol.encode_inflight(protocol.Inflight(0, 0, 128, RING_SIZE))
    while True:
        frontend.send(protocol.encode(Request.GET_INFLIGHT_FD, asked))
        data, ancillary, _, _ = frontend.socket.recvmsg(protocol.HEADER_LEN, 64)
        header = protocol.decode_header(data)
        told = frontend._exactly(header.size)
        fds = array.array("i", ancillary[0][2])
        assert frontend.do(Request.SET_INFLIGHT_FD, told, (fds[0],)) == 0
        os.close(fds[0])
        yield


def rarps(path: Path) -> Rounds:
    """Announcements, a hundred in one write."""
    frontend = Frontend(path)
    frontend.negotiate()
    Device(frontend, 1).start()
    one = protocol.encode(Request.SEND_RARP, bytes.fromhex("5254000000fe0000"))
    while True:
        frontend.send(one * 100)
        frontend.ask(Request.GET_FEATURES)
        yield


def back_to_back(path: Path) -> Rounds:
    """A thousand requests in a write, and their answers read in pieces."""
    frontend = Frontend(path)
    frontend.negotiate()
    one = protocol.encode(Request.GET_FEATURES)
    while True:
        frontend.send(one * 1000)
        for _ in range(1000):
            frontend.answer()
        yield


def refused(path: Path) -> Rounds:
    """Requests that are refused with an answer, and logged."""
    frontend = Frontend(path)
    frontend.negotiate()
    fd = memory_file(PAGE)
    table = protocol.encode_mem_table([MemRegion(0, GIB, 0, 0)])
    while True:
        assert frontend.do(Request.SET_MEM_TABLE, table, (fd,)) == 1
        yield


def connects(path: Path) -> Rounds:
    """Connections that say nothing, or that are one too many."""
    while True:
        # connect() waits while the backlog is full.
        many = [socket.socket(socket.AF_UNIX) for _ in range(16)]
        for one in many:
            one.connect(str(path))
        for one in many:
            one.close()
        yield


def nonsense(path: Path) -> Rounds:
    """A connection that ends with an error, again and again."""
    while True:
        frontend = Frontend(path)
        with contextlib.suppress(ConnectionError):
            frontend.ask(Request.SET_VRING_NUM, state(99999, 0))
        frontend.close()
        yield


def postcopy(path: Path) -> Rounds:
    """The process for a guest in postcopy is started, and given up."""
    frontend = Frontend(path)
    while True:
        frontend.negotiate(more=ProtocolFeature.PAGEFAULT)
        frontend.send(protocol.encode(Request.POSTCOPY_ADVISE))
        data, ancillary, _, _ = frontend.socket.recvmsg(protocol.HEADER_LEN, 64)
        for _, _, raw in ancillary:
            for fd in array.array("i", raw):
                os.close(fd)
        assert data
        frontend.close()
        frontend = Frontend(path)
        yield


# Clients of the control socket.


def client(path: Path) -> socket.socket:
    one = socket.socket(socket.AF_UNIX)
    one.connect(str(path))  # waits while the backlog is full
    one.settimeout(PATIENCE_S)
    return one


def clients(path: Path) -> Rounds:
    """Clients that come and go without a word."""
    while True:
        many = [client(path) for _ in range(16)]
        for one in many:
            one.close()
        yield


def _answers(one: socket.socket, count: int) -> None:
    unpacker = msgpack.Unpacker(max_buffer_size=1 << 28)
    while count:
        data = one.recv(1 << 16)
        if not data:
            raise ConnectionError("the switch closed the connection")
        unpacker.feed(data)
        count -= sum(1 for _ in unpacker)


def longest_requests(path: Path) -> Rounds:
    """As many elements and as much text as a request may have, and none of it known."""
    text = "x" * 120
    params: dict[str, object] = {f"{i:03}{text}": [[[[]]]] * 3 for i in range(200)}
    request = msgpack.packb([0, 1, "add_port", [params]])
    assert len(request) < 1 << 15
    one = client(path)
    while True:
        one.sendall(request)
        _answers(one, 1)
        yield


def deepest_requests(path: Path) -> Rounds:
    """Arrays in arrays as deep as they go."""
    request = msgpack.packb([0, 1, "stats", [{}]])[:-1] + b"\x91" * 500 + b"\x90"
    while True:
        one = client(path)
        one.sendall(request)
        with contextlib.suppress(ConnectionError):
            one.recv(4096)
        one.close()
        yield


def questions(path: Path) -> Rounds:
    """All that can be asked, a hundred times in a write."""
    one = client(path)
    methods = ("ports", "stats", "workers", "settings", "fdb", "event_loop")
    batch = b"".join(msgpack.packb([0, 1, method, []]) for method in methods) * 20
    while True:
        one.sendall(batch)
        _answers(one, 20 * len(methods))
        yield


def subscribers(path: Path) -> Rounds:
    """Sixty that subscribe to everything and read nothing, while frontends come and go nearby."""
    many = [client(path) for _ in range(60)]
    for one in many:
        one.sendall(msgpack.packb([0, 1, "subscribe", []]))
        _answers(one, 1)
    last = client(path)
    port = path.with_name("hostile.events.sock")
    add = {"name": "events", "socket": str(port)}
    last.sendall(msgpack.packb([0, 1, "add_port", [add]]))
    _answers(last, 1)
    while True:
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as frontend:
                frontend.connect(str(port))
        last.sendall(msgpack.packb([0, 1, "ping", []]))
        _answers(last, 1)
        yield


FRONTENDS: dict[str, Callable[[Path], Rounds]] = {
    one.__name__: one
    for one in (
        memory_tables, memory_slots, dirty_logs, rings, many_rings, many_rings_features,
        many_rings_logged, comes_and_goes, iotlb, iotlb_of_many_rings, inflight, rarps,
        back_to_back, refused, connects, nonsense, postcopy,
    )
}  # fmt: skip
CLIENTS: dict[str, Callable[[Path], Rounds]] = {
    one.__name__: one
    for one in (clients, longest_requests, deepest_requests, questions, subscribers)
}


def main() -> None:
    kind, rounds, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    for _, _ in zip((FRONTENDS | CLIENTS)[kind](path), range(rounds), strict=False):
        pass


if __name__ == "__main__":
    main()
