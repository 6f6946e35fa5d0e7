"""Nobody makes the event loop or a worker wait: measured by the switch's own account of its turns.

Each hostile frontend or client has a process of its own and does its worst, while a client asks,
two guests exchange frames of which none may be missing, and no turn may be long. What counts of a
turn is what the switch took: the time in which no CPU ran the thread is not in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance import hostile
from tests.conformance.threads import held, workers_of
from tests.conformance.turns import TURN_NS_MAX, longest_turns
from tests.support.processes import environment
from tests.support.running import DEADLINE_S, RunningSwitch, Wire, exchanging, teach
from vswitch.daemon.log import BURST_LINES
from vswitch.lab.guest import SoftwareGuest

ROUNDS_S = 60.0
PIPE_LEN = 4096

ROUNDS = {
    "memory_tables": 40, "memory_slots": 5, "dirty_logs": 100, "rings": 50, "many_rings": 4,
    "many_rings_features": 2, "many_rings_logged": 4, "comes_and_goes": 2, "iotlb": 1,
    "iotlb_of_many_rings": 1, "inflight": 200, "rarps": 20, "back_to_back": 3, "refused": 2000,
    "connects": 50, "nonsense": 300, "postcopy": 5, "clients": 30, "longest_requests": 300,
    "deepest_requests": 300, "questions": 5, "subscribers": 20,
}  # fmt: skip

ANNOUNCING = {"rarps"}
"""Kinds whose frames reach everybody, and so are between those of others."""


@contextlib.contextmanager
def raging(kind: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A hostile process of this kind; it has done all its rounds when the context ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", hostile.__name__, kind, str(ROUNDS[kind]), str(path)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
        _, error = process.communicate(timeout=ROUNDS_S)
        assert process.returncode == 0, error
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def no_long_turn(wire: Wire) -> Iterator[None]:
    before = longest_turns(wire.client)
    yield
    for name, turn_ns in longest_turns(wire.client).items():
        # One from before is another test's.
        assert turn_ns < TURN_NS_MAX or turn_ns == before[name], name


def innocents(wire: Wire) -> tuple[SoftwareGuest, SoftwareGuest]:
    b, c = wire.guest("b", 2), wire.guest("c", 3)
    teach(b, c)
    return b, c


def rage(wire: Wire, kind: str, path: Path) -> None:
    b, c = innocents(wire)
    others = contextlib.nullcontext() if kind in ANNOUNCING else exchanging(b, c)
    with no_long_turn(wire), others, raging(kind, path) as process:
        while process.poll() is None:
            wire.client.ping()
            time.sleep(0.005)
    if kind not in ANNOUNCING:
        assert wire.drops("b") == wire.drops("c") == {}


@pytest.mark.parametrize("kind", hostile.FRONTENDS)
def test_frontends(wire: Wire, kind: str) -> None:
    rage(wire, kind, wire.port("hostile", queues=128))


@pytest.mark.parametrize("kind", hostile.CLIENTS)
def test_clients(wire: Wire, kind: str) -> None:
    rage(wire, kind, wire.switch.run_dir / "control.sock")


def test_every_kind_has_its_rounds() -> None:
    assert ROUNDS.keys() == hostile.FRONTENDS.keys() | hostile.CLIENTS.keys()


def test_a_worker_that_hangs_holds_up_no_loop(start: Callable[..., Wire]) -> None:
    """Each frontend that changes something waits for it, and nobody else does."""
    wire = start(polling="busy")
    paths = {name: wire.port(name) for name in ("p0", "p1", "p2", "p3")}
    with contextlib.ExitStack() as frontends, held(workers_of(wire.switch)[0]):
        waiting = [frontends.enter_context(raging("rings", path)) for path in paths.values()]
        for name in paths:
            # Its memory has come, and its first ring is to start: that takes the worker.
            wire.wait_until(lambda name=name: wire.info(name)["rings"] != [], "a ring")  # type: ignore[misc]
        for _ in range(100):
            wire.client.ping()
            time.sleep(0.005)
        turns = longest_turns(wire.client)
        assert turns["event loop"] < TURN_NS_MAX
        assert turns["worker 0"] > 500_000_000
        assert [each.poll() for each in waiting] == [None] * len(paths)


class Unread(RunningSwitch):
    """Once it is ready its log fills a pipe of a page, and nobody reads on before `read_on`."""

    def _read(self) -> None:
        self._go_on = threading.Event()
        assert self.process.stderr is not None
        fd = self.process.stderr.fileno()
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_LEN)
        while data := os.read(fd, PIPE_LEN):
            with self._more:
                self.log += data.decode()
                self._more.notify_all()
            if "vswitch: ready" in self.log:
                self._go_on.wait()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def read_on(self) -> None:
        self._go_on.set()


@pytest.fixture
def unread(run_dir: Path, tmp_path: Path) -> Iterator[Wire]:
    directory = run_dir / tmp_path.name[-8:]
    directory.mkdir()
    switch = Unread(directory)
    try:
        yield Wire(switch)
    finally:
        switch.read_on()
        switch.kill()


def test_a_log_that_nobody_reads(unread: Wire) -> None:
    """A frontend fills it; nobody waits for its reader, who gets it all in the end."""
    assert isinstance(unread.switch, Unread)
    rage(unread, "refused", unread.port("hostile"))
    unread.close()
    unread.client.stop()
    unread.switch.read_on()
    unread.wait_log("stopped\n")
    assert unread.switch.process.wait(DEADLINE_S) == 0
    assert unread.switch.log.count("port hostile: SET_MEM_TABLE: region 0: ") >= BURST_LINES
    assert len(unread.switch.log) > 10 * PIPE_LEN


def test_the_end_does_not_wait_for_who_does_not_read_the_log(unread: Wire) -> None:
    rage(unread, "refused", unread.port("hostile"))
    unread.close()
    unread.client.stop()
    assert unread.switch.process.wait(DEADLINE_S) == 0
    assert "stopped\n" not in unread.switch.log
