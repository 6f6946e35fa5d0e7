"""vhost-user frontends that lie: the usual start of a connection, with fields, sizes, descriptors
and the order of messages changed, sent to a running switch.

A case is plain data: a list of messages as [request, flags, payload in hex digits, kinds of
descriptors, length to claim or None].
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import itertools
import os
import select
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.bed import Violation
from tests.support.frames import frame, mac
from tests.support.running import RunningSwitch, Wire, teach
from vswitch.fastpath.main.journal import SLOT_LEN
from vswitch.fastpath.main.port import MAX_VRINGS
from vswitch.ports.journals import make_shared
from vswitch.vhost_user.net import PROTOCOL_FEATURES
from vswitch.vhost_user.protocol import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HEADER,
    REQUESTS,
    VERSION,
    VRING_NOFD,
    Feature,
    Inflight,
    IotlbEntry,
    IotlbType,
    LogArea,
    MemRegion,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
    encode_inflight,
    encode_iotlb,
    encode_log,
    encode_mem_region,
    encode_mem_table,
    encode_u64,
    encode_vring_addr,
    encode_vring_state,
)

DEADLINE_S = 60.0
MEMORY_LEN = 1 << 20
UVA = 0x7F00_0000_0000
JOURNAL_LEN = MAX_VRINGS * SLOT_LEN
QUEUES = 2
Message = list[Any]


def _memory(length: int = MEMORY_LEN) -> int:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, length)
    # Something to find there, for rings that start: small numbers of 16 bits.
    os.pwrite(fd, bytes(i % 7 if i % 2 == 0 else 0 for i in range(min(length, 1 << 14))), 0)
    return fd


def _sealed() -> int:
    fd = _memory()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return fd


def _read_only() -> int:
    fd = _memory()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def _end_of_pipe(which: int) -> int:
    pair = os.pipe()
    os.close(pair[1 - which])
    return pair[which]


def _socket() -> int:
    a, b = socket.socketpair()
    b.close()
    return a.detach()


CHANNELS: list[socket.socket] = []
"""Our ends of the channels for backend requests in this conversation."""


def _channel() -> int:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    CHANNELS.append(ours)
    return theirs.detach()


def _epoll() -> int:
    with select.epoll() as one:
        return os.dup(one.fileno())


FDS: dict[str, Callable[[], int]] = {
    "memory": _memory,
    "journal": lambda: make_shared(MAX_VRINGS)[0],
    "short": lambda: _memory(4096),
    "empty": lambda: _memory(0),
    "sealed": _sealed,
    "read-only": _read_only,
    "event": lambda: os.eventfd(0, os.EFD_NONBLOCK),
    "event-full": lambda: os.eventfd(0xFFFFFFFF, os.EFD_NONBLOCK),
    "event-blocking": lambda: os.eventfd(0, 0),
    "event-semaphore": lambda: os.eventfd(3, os.EFD_SEMAPHORE),
    "directory": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
    "path": lambda: os.open("/etc/passwd", os.O_PATH),
    "file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "zero": lambda: os.open("/dev/zero", os.O_RDWR),
    "null": lambda: os.open("/dev/null", os.O_RDWR),
    "pipe-read": lambda: _end_of_pipe(0),
    "pipe-write": lambda: _end_of_pipe(1),
    "socket": _socket,
    "channel": _channel,
    "epoll": _epoll,
    "proc": lambda: os.open("/proc/self/maps", os.O_RDONLY),
    "pidfd": lambda: os.pidfd_open(os.getpid()),
}
"""Descriptors to send along, by kind."""


def usual(rng: Random) -> list[Message]:
    """What an honest frontend says, from its first message to its last."""
    features = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES | Feature.MRG_RXBUF
    for one in (
        Feature.RING_PACKED, Feature.RING_EVENT_IDX, Feature.RING_INDIRECT_DESC, Feature.CSUM,
        Feature.HOST_TSO4, Feature.GUEST_CSUM, Feature.MQ, Feature.LOG_ALL,
    ):  # fmt: skip
        if rng.random() < 0.3:
            features |= one
    protocol = ProtocolFeature(0)
    for protocol_feature in PROTOCOL_FEATURES:
        if rng.random() < 0.8:
            protocol |= protocol_feature
    iommu = rng.random() < 0.35
    if iommu:
        features |= Feature.ACCESS_PLATFORM
        protocol |= ProtocolFeature.BACKEND_REQ
    if not {ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK} <= set(protocol):
        protocol &= ~ProtocolFeature.INBAND_NOTIFICATIONS
    ack = FLAG_NEED_REPLY if rng.random() < 0.3 else 0
    log: list[Message] = []

    def say(request: Request, payload: bytes = b"", *fds: str) -> None:
        needs = REQUESTS[request].needs
        if needs is not None and needs not in protocol and rng.random() < 0.97:
            return
        log.append([int(request), VERSION | ack, payload.hex(), list(fds), None])

    def one_of(*choices: Callable[[], None]) -> None:
        rng.choice(choices)()

    def map_some(regions: list[MemRegion]) -> None:
        for region in rng.sample(regions, rng.randrange(len(regions) + 1)):
            # I/O virtual addresses are those of the frontend, which is what rings are given below.
            at = rng.choice([0, 0, 0, 0x1000, 0x2000, 0x4000])
            size = rng.choice([region.size - at, region.size - at, 0x1000, 0x4000])
            access = rng.choice([3, 3, 3, 1, 2, 0])
            entry = IotlbEntry(region.uva + at, size, region.uva + at, access, IotlbType.UPDATE)
            for i in range(rng.choice([1, 1, 1, 20])):
                more = entry._replace(iova=entry.iova + (i << 36))
                say(Request.IOTLB_MSG, encode_iotlb(more))

    def unmap_some(regions: list[MemRegion]) -> None:
        region = rng.choice(regions)
        iova, size = rng.choice([(region.uva, 0x1000), (region.uva + 0x2000, 0x3000), (0, 0)])
        say(Request.IOTLB_MSG, encode_iotlb(IotlbEntry(iova, size, 0, 0, IotlbType.INVALIDATE)))

    say(Request.GET_FEATURES)
    say(Request.GET_PROTOCOL_FEATURES)
    say(Request.SET_PROTOCOL_FEATURES, encode_u64(protocol))
    say(Request.GET_QUEUE_NUM)
    say(Request.SET_OWNER)
    say(Request.SET_FEATURES, encode_u64(features))
    extras: list[Callable[[], None]] = [
        lambda: say(Request.NET_SET_MTU, encode_u64(1500)),
        lambda: say(Request.GET_MAX_MEM_SLOTS),
        lambda: say(Request.SET_BACKEND_REQ_FD, b"", "socket"),
        lambda: say(Request.GET_INFLIGHT_FD, encode_inflight(Inflight(0, 0, 2, 16))),
        lambda: say(
            Request.SET_INFLIGHT_FD, encode_inflight(Inflight(JOURNAL_LEN, 0, 2, 16)), "journal"
        ),
        lambda: say(Request.SET_LOG_BASE, encode_log(LogArea(4096, 0)), "memory"),
        lambda: say(Request.SET_LOG_FD, b"", "event"),
        lambda: say(Request.SET_STATUS, encode_u64(7)),
        lambda: say(Request.GET_STATUS),
        lambda: say(Request.SEND_RARP, encode_u64(0x112233445566)),
    ]
    for extra in rng.sample(extras, rng.randrange(4)):
        extra()
    postcopy = ProtocolFeature.PAGEFAULT in protocol and rng.random() < 0.2
    if postcopy:
        say(Request.POSTCOPY_ADVISE)
        say(Request.POSTCOPY_LISTEN)
    regions = [
        MemRegion(i << 32, MEMORY_LEN >> (i and 1), UVA + (i << 32), 0)
        for i in range(rng.choice([1, 1, 2, 4]))
    ]

    def add_one_by_one() -> None:
        for region in regions:
            say(Request.ADD_MEM_REG, encode_mem_region(region), "memory")

    one_of(
        lambda: say(Request.SET_MEM_TABLE, encode_mem_table(regions), *["memory"] * len(regions)),
        add_one_by_one,
    )
    if postcopy and rng.random() < 0.9:
        # The frontend knows all addresses.
        log.append([log[-1][0], VERSION, encode_u64(0).hex(), [], None])
    if iommu:
        if rng.random() < 0.9:
            say(Request.SET_BACKEND_REQ_FD, b"", rng.choice(["channel"] * 8 + ["socket"]))
        map_some(regions)
    for vring in range(rng.choice([2, 2, 2 * QUEUES])):
        base = UVA + 0x4000 * vring
        size = rng.choice([16, 64, 256])
        say(Request.SET_VRING_NUM, encode_vring_state(VringState(vring, size)))
        say(Request.SET_VRING_BASE, encode_vring_state(VringState(vring, 0)))
        where = VringAddr(vring, 0, base, base + 0x2000, base + 0x3000, 0)
        say(Request.SET_VRING_ADDR, encode_vring_addr(where))
        say(Request.SET_VRING_CALL, encode_u64(vring), "event")
        one_of(
            partial(say, Request.SET_VRING_KICK, encode_u64(vring), "event"),
            partial(say, Request.SET_VRING_KICK, encode_u64(vring | VRING_NOFD)),
        )
        say(Request.SET_VRING_ERR, encode_u64(vring), "event")
        say(Request.SET_VRING_ENABLE, encode_vring_state(VringState(vring, 1)))
    for _ in range(rng.choice([1, 2, 4]) if iommu else 0):
        one_of(lambda: map_some(regions), lambda: map_some(regions), lambda: unmap_some(regions))
    for extra in rng.sample(extras, rng.randrange(4)):
        extra()
    if rng.random() < 0.3:
        say(Request.REM_MEM_REG, encode_mem_region(regions[-1]))
    for vring in range(2):
        if rng.random() < 0.5:
            say(Request.GET_VRING_BASE, encode_vring_state(VringState(vring, 0)))
    if postcopy and rng.random() < 0.7:
        say(Request.POSTCOPY_END)
    return log


ANSWERS = [
    *["success"] * 6, "failure", "failure", "twice", "other", "short", "long", "silent", "end",
]  # fmt: skip
"""To requests of the backend, in turn."""

NUMBERS = [0, 1, 2, 3, 255, 256, 257, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 1 << 31, (1 << 32) - 1]
WIDE = [1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1, UVA, MEMORY_LEN]


def lie(rng: Random, log: list[Message]) -> None:
    """Change one thing about a conversation."""
    at = rng.randrange(len(log))
    message = log[at]
    what = rng.randrange(10)
    payload = bytearray.fromhex(message[2])
    if what < 4 and len(payload) >= 4:
        width = rng.choice([4, 8]) if len(payload) >= 8 else 4
        where = rng.randrange(0, len(payload) - width + 1, 4)
        (old,) = struct.unpack_from("<I" if width == 4 else "<Q", payload, where)
        new = rng.choice([*NUMBERS, *(WIDE if width == 8 else []), old + 1, old - 1, old ^ 1])
        struct.pack_into("<I" if width == 4 else "<Q", payload, where, new & ((1 << 8 * width) - 1))
        message[2] = payload.hex()
    elif what == 4:
        kinds = message[3]
        how = rng.randrange(3)
        if how == 0 and kinds:
            kinds[rng.randrange(len(kinds))] = rng.choice(list(FDS))
        elif how == 1 and kinds:
            kinds.pop()
        else:
            kinds += [rng.choice(list(FDS)) for _ in range(rng.choice([1, 1, 2, 8, 9]))]
    elif what == 5:
        message[2] = (payload + bytes(8) if rng.random() < 0.5 else payload[:-1]).hex()
    elif what == 6:
        message[4] = rng.choice([*NUMBERS, len(payload) + 1])
    elif what == 7:
        flags = [0, 1, 2, 3, VERSION | FLAG_REPLY, VERSION | FLAG_NEED_REPLY, 0xFFFFFFFF]
        message[1] = rng.choice(flags)
    elif what == 8:
        message[0] = rng.choice([*(int(r) for r in REQUESTS), 0, 44, 255, (1 << 32) - 1])
    else:
        how = rng.randrange(4)
        if how == 0 and len(log) > 1:
            log.pop(at)
        elif how == 1:
            log.insert(rng.randrange(len(log) + 1), [*message[:3], list(message[3]), message[4]])
        elif how == 2:
            other = rng.randrange(len(log))
            log[at], log[other] = log[other], log[at]
        else:
            del log[at:]
            log.append(message)


def make(seed: int) -> dict[str, Any]:
    """The case of a seed."""
    rng = Random(seed)
    ops = usual(rng)
    for _ in range(rng.choice([0, 1, 1, 2, 3, 6])):
        lie(rng, ops)
    answers = [rng.choice(ANSWERS) for _ in range(rng.choice([1, 1, 2, 5]))]
    return {"kind": "messages", "seed": seed, "ops": ops, "answers": answers}


class MessageBench:
    """A running switch, two guests on it that exchange frames, and a port for bad frontends."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        run_dir = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vswitch-"))
        self.switch = RunningSwitch(Path(run_dir))
        self.wire = Wire(self.switch)
        self.reached: Counter[str] = Counter()
        # A write beyond what the switch says it wrote is an error of these guests.
        self.guests = [self.wire.guest("ab"[n - 1], n, rx_guard_len=32) for n in (1, 2)]
        teach(*self.guests)
        self.socket = self.wire.port("bad", queues=QUEUES)
        self.count = 0
        self._answers = itertools.cycle(["success"])
        self.fds = self.open_fds()

    def close(self) -> None:
        """Stop the switch and see that it went in good order."""
        try:
            self.wire.close()
            self.switch.stop()
        finally:
            self._stack.close()

    def open_fds(self) -> list[str]:
        folder = f"/proc/{self.switch.process.pid}/fd"
        found = []
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"{folder}/{name}"))
        return sorted(found)

    def run(self, case: dict[str, Any]) -> None:
        """Say all of it, hang up, and see that nobody was harmed. Raises Violation."""
        self._answers = itertools.cycle(case.get("answers", ["success"]))
        try:
            self.talk(case["ops"])
        finally:
            while CHANNELS:
                CHANNELS.pop().close()
        self.check()

    def talk(self, messages: list[Message]) -> None:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.closing(peer), contextlib.suppress(ConnectionError):
            peer.connect(str(self.socket))
            peer.setblocking(False)
            for request, flags, payload, kinds, claimed in messages:
                raw = bytes.fromhex(payload)
                size = len(raw) if claimed is None else claimed
                header = HEADER.pack(request & 0xFFFFFFFF, flags, size & 0xFFFFFFFF)
                with made(kinds) as fds:
                    self._send(peer, header + raw, fds)
            peer.shutdown(socket.SHUT_WR)
            while self._wait(peer, select.POLLIN) and peer.recv(4096):
                pass

    def _send(self, peer: socket.socket, data: bytes, fds: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while data:
            events = self._wait(peer, select.POLLIN | select.POLLOUT)
            # Replies are taken in, so that the switch never waits for us.
            if events & select.POLLIN and not peer.recv(4096):
                raise ConnectionResetError
            if events & select.POLLOUT:
                data = data[peer.sendmsg([data], rights) :]
                rights = []

    def _wait(self, peer: socket.socket, events: int) -> int:
        """What of `events` there is; what the switch asks for meanwhile is answered."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            poll = select.poll()
            poll.register(peer, events)
            for channel in CHANNELS:
                poll.register(channel, select.POLLIN)
            found = dict(poll.poll(DEADLINE_S * 1000))
            for channel in [one for one in CHANNELS if one.fileno() in found]:
                try:
                    self._answer(channel)
                except ConnectionError:
                    CHANNELS.remove(channel)
                    channel.close()
            if peer.fileno() in found:
                return found[peer.fileno()]
        raise Violation("the switch neither reads nor answers nor hangs up")

    def _answer(self, channel: socket.socket) -> None:
        """Answer one request of the switch, which sends the next one only then."""
        asked = channel.recv(4096)
        if len(asked) < HEADER.size:
            raise ConnectionResetError
        (request, _, _) = HEADER.unpack_from(asked)
        how = next(self._answers)
        self.reached[f"answered: {how}"] += 1
        status = struct.pack("<Q", how != "success" and how != "twice")
        reply = HEADER.pack(request, VERSION | FLAG_REPLY, len(status)) + status
        match how:
            case "twice":
                reply *= 2
            case "other":
                reply = HEADER.pack(request + 1, VERSION | FLAG_REPLY, len(status)) + status
            case "short":
                reply = HEADER.pack(request, VERSION | FLAG_REPLY, 4) + status[:4] + bytes(4)
            case "long":
                reply = HEADER.pack(request, VERSION | FLAG_REPLY, 0xFFFFFFFF) + bytes(3000)
            case "silent":
                return
            case "end":
                raise ConnectionResetError
        channel.send(reply)

    def check(self) -> None:
        self.count += 1
        deadline = time.monotonic() + DEADLINE_S
        while (info := self.wire.info("bad"))["state"] != "listening":
            if time.monotonic() > deadline:
                raise Violation(f"the port stays {info['state']}")
            time.sleep(0.001)  # between two looks
        self.reached[(info["error"] or "no error").split(":")[0][:40]] += 1
        a, b = self.guests
        for sender, receiver, dst, src in ((a, b, mac(2), mac(1)), (b, a, mac(1), mac(2))):
            sent = frame(dst, src, 200, self.count)
            sender.send([sent])
            # Frames of the hostile port may have come before.
            while (got := receiver.recv(1)) and got != [sent]:
                if got[0][6:12] != b"" and got[0][6:12] == sent[6:12]:
                    raise Violation("a neighbour's frame came changed")
            if got != [sent]:
                raise Violation("the neighbours do not hear each other any more")
        while (now := self.open_fds()) != self.fds:
            if time.monotonic() > deadline:
                raise Violation(f"open descriptors were {self.fds} and are {now}")
            time.sleep(0.001)  # between two looks
        if "Traceback" in self.switch.log or "internal error" in self.switch.log:
            raise Violation(f"the switch stumbled:\n{self.switch.log[-4000:]}")
        if len(self.switch.log) > 1 << 20:
            self.switch.log = ""


@contextlib.contextmanager
def made(kinds: list[str]) -> Iterator[list[int]]:
    """Descriptors of these kinds, closed afterwards."""
    fds: list[int] = []
    try:
        for kind in kinds:
            fds.append(FDS[kind]())
        yield fds
    finally:
        for fd in fds:
            os.close(fd)
