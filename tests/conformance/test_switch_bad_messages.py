"""A frontend that sends nonsense loses its connection, is named in the log, and harms nobody."""

from __future__ import annotations

import contextlib
import os
import socket as sockets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.frames import frame, mac
from tests.support.running import Wire, teach
from vswitch.lab.guest import (
    BackendRefusedError,
    Frontend,
)
from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HEADER,
    MAX_FDS,
    PAYLOAD_SIZES,
    REQUESTS,
    VRING_NOFD,
    Feature,
    MemRegion,
    Payload,
    ProtocolFeature,
    Reply,
    Request,
    VringAddr,
    VringState,
    encode_mem_table,
    encode_u64,
    encode_vring_addr,
    encode_vring_state,
)

A, B = mac(1), mac(2)
PAGE = 4096
UVA = 0x7F00_0000_0000


class Bench:
    """A port for bad frontends, and two guests that exchange a frame after each of them."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.a, self.b = wire.guest("a", 1), wire.guest("b", 2)
        teach(self.a, self.b)
        self.socket = wire.port("bad")
        self._tags = 0

    def connect(self, *, negotiated: bool = True) -> Frontend:
        """A connection that a mistake is to end; negotiated as a usual one if wanted."""
        frontend = Frontend.connect(self.socket, 5.0)
        if negotiated:
            frontend.negotiate(
                Feature.VERSION_1 | Feature.PROTOCOL_FEATURES,
                ~ProtocolFeature.REPLY_ACK & ~ProtocolFeature.INBAND_NOTIFICATIONS,
            )
            frontend.sync()
        return frontend

    def ended(self, frontend: Frontend, reason: str) -> None:
        """The switch has closed this connection and said why."""
        frontend.read_to_end()
        frontend.close()
        self.wire.wait_state("bad", "listening")
        error = self.wire.info("bad")["error"] or ""
        assert reason in error
        self.wire.wait_log(f"port bad: frontend disconnected: {error}")
        self.others_forward()

    def others_forward(self) -> None:
        self._tags += 1
        for sender, receiver, dst, src in ((self.a, self.b, B, A), (self.b, self.a, A, B)):
            sent = frame(dst, src, tag=self._tags)
            sender.send([sent])
            assert receiver.recv(1) == [sent]


@pytest.fixture
def bench(wire: Wire) -> Bench:
    return Bench(wire)


@contextlib.contextmanager
def memory(length: int = PAGE) -> Iterator[int]:
    fd = os.memfd_create("bad")
    try:
        os.ftruncate(fd, length)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def eventfds(n: int) -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(n)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


# Lengths and headers.


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.name)
def test_wrong_length(bench: Bench, request_: Request) -> None:
    low, high = PAYLOAD_SIZES[REQUESTS[request_].payload]
    for length in {max(0, low - 1), high + 1} - {low}:
        frontend = bench.connect()
        frontend.send(request_, bytes(length))
        bench.ended(frontend, f"{request_.name}: size is {length}, expected {low}")


def test_wrong_headers(bench: Bench) -> None:
    for header, reason in (
        (HEADER.pack(1, 0, 0), "version 0"),
        (HEADER.pack(1, 2, 0), "version 2"),
        (HEADER.pack(1, 1, 4097), "size 4097"),
        (HEADER.pack(1, 1, 0xFFFF_FFFF), "size 4294967295"),
        (HEADER.pack(1, 1 | FLAG_REPLY, 0), "marked as a reply"),
        (b"GET / HTTP/1.1\r\n\r\n", "version"),
    ):
        frontend = bench.connect(negotiated=False)
        frontend.send_raw(header)
        bench.ended(frontend, reason)


def test_unknown_requests(bench: Bench) -> None:
    for number in (0, 44, 1000, 0xFFFF_FFFF, Request.GET_CONFIG, Request.SET_VRING_ENDIAN):
        frontend = bench.connect()
        frontend.send(number)
        bench.ended(frontend, "is not supported")
    # With REPLY_ACK it is answered with a failure, and the connection goes on.
    frontend = bench.connect(negotiated=False)
    frontend.negotiate(Feature.PROTOCOL_FEATURES, ProtocolFeature.REPLY_ACK)
    assert frontend.request(1000, flags=FLAG_NEED_REPLY) != encode_u64(0)
    frontend.sync()
    frontend.close()


def test_requests_that_were_not_negotiated(bench: Bench) -> None:
    for request, spec in REQUESTS.items():
        if not spec.needs:
            continue
        frontend = bench.connect(negotiated=False)
        frontend.negotiate(Feature.PROTOCOL_FEATURES, 0)
        with eventfds(spec.min_fds) as fds:
            frontend.send(request, bytes(PAYLOAD_SIZES[spec.payload][0]), fds)
        bench.ended(frontend, f"{spec.needs.name} was not negotiated")


# Ends in the middle.


@pytest.mark.parametrize("n_fds", [0, 1, MAX_FDS])
@pytest.mark.parametrize("length", [1, 11, 12, 13, 47])
def test_disconnect_in_mid_message(bench: Bench, length: int, n_fds: int) -> None:
    whole = protocol.encode(Request.SET_MEM_TABLE, encode_mem_table([MemRegion(0, PAGE, UVA, 0)]))
    with eventfds(n_fds) as fds:
        frontend = bench.connect()
        frontend.send_raw(whole[:length], fds)
        # Others go on while the rest of it is still to come.
        bench.others_forward()
        frontend.close()
        bench.wire.wait_log("in the middle of a message")
        bench.wire.wait_state("bad", "listening")
        assert "in the middle of a message" in str(bench.wire.info("bad")["error"])
        bench.others_forward()


def test_messages_in_small_pieces(bench: Bench) -> None:
    """Which is allowed: a stream has no borders."""
    frontend = bench.connect()
    with eventfds(1) as fds:
        whole = protocol.encode(Request.SET_VRING_CALL, encode_u64(0))
        frontend.send_raw(whole[:1], fds)
        for i in range(1, len(whole)):
            frontend.send_raw(whole[i : i + 1])
    several = protocol.encode(Request.SET_OWNER) * 50 + protocol.encode(Request.GET_FEATURES)
    frontend.send_raw(several)
    assert frontend.receive_reply(Request.GET_FEATURES)
    frontend.close()


def test_connections_without_a_word(bench: Bench) -> None:
    for _ in range(20):
        bench.connect(negotiated=False).close()
    bench.wire.wait_until(
        lambda: bench.wire.info("bad")["connects"] == 20, "20 connections are over"
    )
    bench.wire.wait_state("bad", "listening")
    assert bench.wire.info("bad")["error"] is None


def test_replies_that_nobody_reads(bench: Bench) -> None:
    """Thousands of questions and no look at the answers; the others do not wait for it."""
    frontend = bench.connect()
    frontend.socket.setblocking(False)
    question = protocol.encode(Request.GET_FEATURES) * 100
    with contextlib.suppress(BlockingIOError):
        for _ in range(10_000):
            frontend.socket.send(question)
    bench.others_forward()
    frontend.close()
    bench.wire.wait_state("bad", "listening")
    bench.others_forward()


# Descriptors.


def test_wrong_numbers_of_descriptors(bench: Bench) -> None:
    one = encode_mem_table([MemRegion(0, PAGE, UVA, 0)])
    for request, payload, n_fds, reason in (
        (Request.GET_FEATURES, b"", 1, "1 file descriptors came with it"),
        (Request.SET_OWNER, b"", 8, "8 file descriptors came with it"),
        (Request.SET_OWNER, b"", 9, "more than 8 file descriptors"),
        (Request.SET_OWNER, b"", 64, "more than 8 file descriptors"),
        (Request.SET_VRING_KICK, encode_u64(0), 0, "came with 0 file descriptors, expected 1"),
        (Request.SET_VRING_KICK, encode_u64(0), 2, "2 file descriptors came with it"),
        (Request.SET_VRING_CALL, encode_u64(VRING_NOFD), 1, "expected 0"),
        (Request.SET_VRING_ERR, encode_u64(0), 3, "3 file descriptors came with it"),
        (Request.SET_MEM_TABLE, one, 0, "1 regions came with 0 file descriptors"),
        (Request.SET_MEM_TABLE, one, 2, "1 regions came with 2 file descriptors"),
    ):
        with eventfds(n_fds) as fds:
            frontend = bench.connect()
            frontend.send(request, payload, fds)
            bench.ended(frontend, reason)


def test_wrong_kinds_of_descriptors(bench: Bench) -> None:
    read_end, write_end = os.pipe()
    left, right = sockets.socketpair()
    plain = os.open("/dev/null", os.O_RDWR)
    directory = os.open("/", os.O_RDONLY)
    try:
        for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            for fd in (read_end, write_end, left.fileno(), plain, directory):
                frontend = bench.connect()
                frontend.send(request, encode_u64(0), [fd])
                bench.ended(frontend, "the file descriptor is no eventfd")
        table = encode_mem_table([MemRegion(0, PAGE, UVA, 0)])
        for fd in (read_end, left.fileno(), plain, directory):
            frontend = bench.connect()
            frontend.send(Request.SET_MEM_TABLE, table, [fd])
            bench.ended(frontend, "region 0")
        # A file that may only be read.
        with memory() as fd:
            frontend = bench.connect()
            readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
            frontend.send(Request.SET_MEM_TABLE, table, [readable])
            os.close(readable)
            bench.ended(frontend, "SET_MEM_TABLE")
    finally:
        for fd in (read_end, write_end, plain, directory):
            os.close(fd)
        left.close()
        right.close()


# Values.


def test_bad_memory_tables(bench: Bench) -> None:
    top = (1 << 64) - PAGE
    for regions, reason in (
        ([MemRegion(0, 0, UVA, 0)], "region 0: size is 0"),
        ([MemRegion(0, 2 * PAGE, UVA, 0)], "beyond the end of its file"),
        ([MemRegion(0, PAGE, UVA, PAGE)], "beyond the end of its file"),
        ([MemRegion(top, 2 * PAGE, UVA, 0)], "guest address"),
        ([MemRegion(0, 2 * PAGE, top, 0)], "user address"),
        ([MemRegion(0, PAGE, UVA, top)], "region 0: mmap offset"),
        ([MemRegion(0, PAGE, UVA, 0), MemRegion(0, PAGE, 0, 0)], "overlaps region 0"),
        ([MemRegion(0, PAGE, UVA, 0), MemRegion(PAGE, PAGE, UVA + 1, 0)], "overlaps region 0"),
    ):
        with memory() as fd:
            frontend = bench.connect()
            frontend.send(Request.SET_MEM_TABLE, encode_mem_table(regions), [fd] * len(regions))
            bench.ended(frontend, reason)
    for count in (2, 9, 0xFFFF_FFFF):
        with memory() as fd:
            payload = bytearray(encode_mem_table([MemRegion(0, PAGE, UVA, 0)]))
            payload[:4] = count.to_bytes(4, "little")
            frontend = bench.connect()
            frontend.send(Request.SET_MEM_TABLE, bytes(payload), [fd])
            bench.ended(frontend, f"SET_MEM_TABLE: {count} regions")


def test_bad_values(bench: Bench) -> None:
    state, addr = encode_vring_state, encode_vring_addr
    for request, payload, reason in (
        (Request.SET_FEATURES, encode_u64(1 << 50), "never offered"),
        (Request.SET_FEATURES, encode_u64((1 << 64) - 1), "never offered"),
        (Request.SET_PROTOCOL_FEATURES, encode_u64(1 << 63), "never offered"),
        (Request.SET_VRING_NUM, state(VringState(0, 0)), "num 0 of vring 0"),
        (Request.SET_VRING_NUM, state(VringState(0, 3)), "num 3 of vring 0"),
        (Request.SET_VRING_NUM, state(VringState(0, 65536)), "num 65536 of vring 0"),
        (Request.SET_VRING_NUM, state(VringState(2, 256)), "vring index 2"),
        (Request.SET_VRING_NUM, state(VringState(0xFFFF_FFFF, 256)), "vring index 4294967295"),
        (Request.SET_VRING_BASE, state(VringState(0, 0x10000)), "num 65536 of vring 0"),
        (Request.GET_VRING_BASE, state(VringState(7, 0)), "vring index 7"),
        (Request.SET_VRING_ENABLE, state(VringState(0, 2)), "num 2 of vring 0"),
        (Request.SET_VRING_ADDR, addr(VringAddr(9, 0, 0, 0, 0, 0)), "vring index 9"),
        (Request.SET_VRING_ADDR, addr(VringAddr(0, 0, 8, 0, 0, 0)), "desc_uva"),
        (Request.SET_VRING_ADDR, addr(VringAddr(0, 0, 0, 2, 0, 0)), "used_uva"),
        (Request.SET_VRING_ADDR, addr(VringAddr(0, 0, 0, 0, 1, 0)), "avail_uva"),
        (Request.SET_VRING_ADDR, addr(VringAddr(0, 6, 0, 0, 0, 0)), "flags 0x6"),
        (Request.SET_VRING_KICK, encode_u64(VRING_NOFD | 5), "vring index 5"),
        (Request.SET_VRING_KICK, encode_u64(1 << 32 | VRING_NOFD), "unknown bits"),
        (Request.NET_SET_MTU, encode_u64(67), "MTU 67"),
        (Request.NET_SET_MTU, encode_u64(1 << 40), "MTU 1099511627776"),
        (Request.SEND_RARP, b"\xff" * 6 + b"\0\0", "not a unicast address"),
        (Request.SEND_RARP, bytes(8), "not a unicast address"),
    ):
        frontend = bench.connect()
        frontend.send(request, payload)
        bench.ended(frontend, reason)


@pytest.mark.parametrize("part", ["desc_uva", "used_uva", "avail_uva"])
def test_rings_outside_of_the_memory(bench: Bench, part: str) -> None:
    """Refused when the ring starts, which the kick's descriptor brings about."""
    good = {"desc_uva": UVA, "used_uva": UVA + 8192, "avail_uva": UVA + 16384}
    size = 8 * PAGE
    for bad in (0, UVA - 16, UVA + size - 16, UVA + size, (1 << 64) - 16):
        with memory(size) as fd, eventfds(1) as fds:
            frontend = bench.connect()
            frontend.set_mem_table([MemRegion(0, size, UVA, 0)], [fd])
            frontend.set_vring_num(0, 256)
            frontend.set_vring_addr(VringAddr(0, 0, log_gpa=0, **(good | {part: bad})))
            frontend.set_vring_enable(0, True)
            frontend.send(Request.SET_VRING_KICK, encode_u64(0), fds)
            bench.ended(frontend, "vring 0")


def test_refusals_with_reply_ack(bench: Bench) -> None:
    """What the memory or the MTU makes impossible is answered, and the connection goes on."""
    frontend = Frontend.connect(bench.socket, 5.0)
    frontend.negotiate(
        Feature.VERSION_1 | Feature.PROTOCOL_FEATURES,
        ProtocolFeature.REPLY_ACK | ProtocolFeature.MTU,
    )
    with memory() as fd, pytest.raises(BackendRefusedError):
        frontend.set_mem_table([MemRegion(0, 2 * PAGE, UVA, 0)], [fd])
    with pytest.raises(BackendRefusedError):
        frontend.net_set_mtu(10)
    frontend.net_set_mtu(1500)
    with memory() as fd:
        frontend.set_mem_table([MemRegion(0, PAGE, UVA, 0)], [fd])
    assert bench.wire.info("bad")["memory"] == [
        {"gpa": 0, "size": PAGE, "uva": UVA, "mmap_offset": 0}
    ]
    frontend.close()
    bench.others_forward()


def test_nothing_leaks(bench: Bench) -> None:
    """Descriptors and mappings of connections that ended badly are gone."""
    fd_dir = Path(f"/proc/{bench.wire.switch.process.pid}/fd")
    before = len(list(fd_dir.iterdir()))
    region = encode_mem_table([MemRegion(0, PAGE, UVA, 0)])
    for _ in range(10):
        with memory() as fd, eventfds(8) as fds:
            frontend = bench.connect()
            frontend.send(Request.SET_MEM_TABLE, region, [fd])
            for i in range(2):
                frontend.send(Request.SET_VRING_KICK, encode_u64(i), [fds[3 * i]])
                frontend.send(Request.SET_VRING_CALL, encode_u64(i), [fds[3 * i + 1]])
                frontend.send(Request.SET_VRING_ERR, encode_u64(i), [fds[3 * i + 2]])
            frontend.send(Request.SET_OWNER, b"", fds)
            bench.ended(frontend, "file descriptors")
    assert len(list(fd_dir.iterdir())) == before
    maps = Path(f"/proc/{bench.wire.switch.process.pid}/maps").read_text()
    assert "memfd:bad" not in maps


def test_every_reply_rule(bench: Bench) -> None:
    """Requests with an answer of their own get that one only; others the acknowledgement."""
    frontend = Frontend.connect(bench.socket, 5.0)
    frontend.negotiate(Feature.PROTOCOL_FEATURES, ProtocolFeature.REPLY_ACK | ProtocolFeature.MQ)
    for request in (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM):
        assert REQUESTS[request].reply is Reply.ALWAYS
        assert REQUESTS[request].payload is Payload.NONE
        plain = frontend.request(request)
        assert frontend.request(request, flags=FLAG_NEED_REPLY) == plain != encode_u64(0)
    assert frontend.request(Request.SET_OWNER, flags=FLAG_NEED_REPLY) == encode_u64(0)
    # Without the flag there is no acknowledgement: the next reply belongs to the next question.
    frontend.send(Request.SET_OWNER)
    assert frontend.request(Request.GET_QUEUE_NUM) == encode_u64(1)
    frontend.close()
