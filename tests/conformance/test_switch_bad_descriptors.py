"""File descriptors of every wrong number and kind, with every message: refused, and closed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.test_switch_bad_messages import PAGE, UVA, Bench, eventfds, memory
from tests.support.running import RunningSwitch, Wire, open_files
from vswitch.lab.guest import BackendClosedError, Frontend
from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import (
    MAX_FDS,
    PAYLOAD_SIZES,
    REQUESTS,
    Feature,
    Inflight,
    LogArea,
    MemRegion,
    Request,
    encode_inflight,
    encode_log,
    encode_mem_region,
    encode_mem_table,
    encode_u64,
)

REGION = MemRegion(0, PAGE, UVA, 0)

# What takes a descriptor, with a payload that is right, and the kind of file that belongs to it.
TAKERS = {
    Request.SET_MEM_TABLE: (encode_mem_table([REGION]), "memory"),
    Request.ADD_MEM_REG: (encode_mem_region(REGION), "memory"),
    Request.SET_LOG_BASE: (encode_log(LogArea(PAGE, 0)), "memory"),
    Request.SET_INFLIGHT_FD: (encode_inflight(Inflight(PAGE, 0, 2, 256)), "journal"),
    Request.SET_LOG_FD: (b"", "eventfd"),
    Request.SET_VRING_KICK: (encode_u64(0), "eventfd"),
    Request.SET_VRING_CALL: (encode_u64(0), "eventfd"),
    Request.SET_VRING_ERR: (encode_u64(0), "eventfd"),
    Request.SET_BACKEND_REQ_FD: (b"", "socket"),
}


@pytest.fixture
def bench(wire: Wire) -> Iterator[Bench]:
    """Every test ends with as many descriptors as it began with."""
    bench = Bench(wire)
    before = open_files(wire)
    yield bench
    bench.wire.wait_until(
        lambda: len(open_files(wire)) == len(before), f"the descriptors are {before} again"
    )


@contextlib.contextmanager
def every_kind() -> Iterator[dict[str, int]]:
    """A descriptor of each kind of file there is, and of memory that will not do."""
    with contextlib.ExitStack() as stack:

        def keep(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        left, right = socket.socketpair()
        datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        internet = socket.socket(socket.AF_INET)
        epoll = select.epoll()
        for each in (left, right, datagram, internet, epoll):
            stack.callback(each.close)
        reading, writing = (keep(fd) for fd in os.pipe())
        whole = stack.enter_context(memory())
        sealed = keep(os.memfd_create("bad", os.MFD_ALLOW_SEALING))
        os.ftruncate(sealed, PAGE)
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        short = stack.enter_context(memory(PAGE - 1))
        empty = stack.enter_context(memory(0))
        disk = stack.enter_context(tempfile.TemporaryFile())
        disk.write(bytes(PAGE))
        disk.flush()
        yield {
            "directory": keep(os.open("/", os.O_RDONLY)),
            "directory by path": keep(os.open("/", os.O_PATH)),
            "/dev/zero": keep(os.open("/dev/zero", os.O_RDWR)),
            "/dev/null": keep(os.open("/dev/null", os.O_RDWR)),
            "pipe for reading": reading,
            "pipe for writing": writing,
            "socket": left.fileno(),
            "datagram socket": datagram.fileno(),
            "TCP socket": internet.fileno(),
            "epoll": epoll.fileno(),
            "process": keep(os.pidfd_open(os.getpid())),
            "status of a process": keep(os.open("/proc/self/status", os.O_RDONLY)),
            "eventfd": keep(os.eventfd(0)),
            "memory": whole,
            "memory by path": keep(os.open(f"/proc/self/fd/{whole}", os.O_PATH)),
            "memory for reading": keep(os.open(f"/proc/self/fd/{whole}", os.O_RDONLY)),
            "memory for writing": keep(os.open(f"/proc/self/fd/{whole}", os.O_WRONLY)),
            "sealed memory": sealed,
            "short memory": short,
            "empty memory": empty,
        }


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
def test_wrong_numbers(bench: Bench, request_: Request) -> None:
    """One too few, one too many, all that a message can have, and more."""
    spec = REQUESTS[request_]
    payload = bytes(PAYLOAD_SIZES[spec.payload][0])
    for n_fds in {max(0, spec.min_fds - 1), spec.max_fds + 1, MAX_FDS, MAX_FDS + 1, 64}:
        if spec.min_fds <= n_fds <= spec.max_fds:
            continue
        with eventfds(n_fds) as fds:
            frontend = bench.connect()
            frontend.send(request_, payload, fds)
            reason = f"{request_.name}: {n_fds} file descriptors came with it"
            if n_fds > MAX_FDS:
                reason = f"more than {MAX_FDS} file descriptors"
            bench.ended(frontend, reason)


@pytest.mark.parametrize("request_", TAKERS, ids=lambda request: request.name)
def test_wrong_kinds(bench: Bench, request_: Request) -> None:
    payload, wanted = TAKERS[request_]
    with every_kind() as kinds:
        for kind, fd in kinds.items():
            if kind == wanted:
                continue
            frontend = bench.connect()
            frontend.send(request_, payload, [fd])
            try:
                bench.ended(frontend, request_.name)
            except AssertionError as exc:
                raise AssertionError(f"{kind}: {exc}") from exc


def test_the_table_of_takers_is_complete() -> None:
    takes = {request for request, spec in REQUESTS.items() if spec.max_fds}
    assert takes - set(TAKERS) == {Request.REM_MEM_REG}, "which closes what comes with it"


def test_a_flood_of_new_descriptors(bench: Bench) -> None:
    """Each takes the place of the last, under a ring that waits for its memory."""
    frontend = bench.connect()
    for _ in range(500):
        for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            with eventfds(1) as fds:
                frontend.send(request, encode_u64(1), fds)
        with memory() as fd:
            frontend.send(Request.SET_MEM_TABLE, encode_mem_table([REGION]), [fd])
    frontend.sync()
    bench.others_forward()
    frontend.close()
    bench.wire.wait_state("bad", "listening")


def test_a_message_that_comes_too_slowly(run_dir: Path) -> None:
    """Byte after byte and never all of it; the others do not wait, the descriptor is closed."""
    patience_s = 0.5
    directory = run_dir / "slow"
    directory.mkdir()
    code = (
        f"from vswitch.vhost_user import connection; connection.MESSAGE_PATIENCE_S = {patience_s}\n"
        "from vswitch.cli.main import main; main()"
    )
    switch = RunningSwitch(directory, command=(sys.executable, "-c", code))
    wire = Wire(switch)
    try:
        bench = Bench(wire)
        before = open_files(wire)
        frontend = Frontend.connect(bench.socket, 5.0)
        frontend.negotiate(Feature.PROTOCOL_FEATURES, 0)
        # At 30 ms a byte it would take many times as long.
        whole = protocol.encode(Request.SET_MEM_TABLE, encode_mem_table([REGION] * 8))
        begun = time.monotonic()
        with memory() as fd:
            frontend.send_raw(whole[:1], [fd])

        def trickle() -> None:
            for i in range(1, len(whole) - 1):
                frontend.send_raw(whole[i : i + 1])
                bench.others_forward()
                time.sleep(0.03)  # it comes slowly

        with pytest.raises(BackendClosedError):
            trickle()
        assert time.monotonic() - begun >= patience_s
        bench.ended(frontend, "began a message and did not finish it in 0.5 s")
        wire.wait_until(lambda: len(open_files(wire)) == len(before), "its descriptor is closed")
    finally:
        wire.close()
        switch.stop()
