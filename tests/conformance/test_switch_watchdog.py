"""A switch of which a part hangs or ends: it is never taken for whole, and goes down as a whole."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance.threads import held, workers_of
from tests.support.running import DEADLINE_S, RunningSwitch, Wire, teach
from vswitch.lab.guest import BackendClosedError

PERIOD_S = 0.6

Start = Callable[..., RunningSwitch]


class Manager:
    """Hears what the switch tells its service manager."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))

    def hear(self, timeout: float = DEADLINE_S) -> str:
        self.socket.settimeout(timeout)
        return self.socket.recv(4096).decode()

    def hear_until(self, text: str) -> None:
        while text not in self.hear():
            pass

    def hear_for(self, seconds: float) -> str:
        """All that comes in so many seconds: silence is heard in no other way."""
        heard = ""
        until = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while (left := until - time.monotonic()) > 0:
                heard += self.hear(left)
        return heard


@pytest.fixture
def manager(run_dir: Path, tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(run_dir / f"{tmp_path.name[-8:]}.notify")
    yield manager
    manager.socket.close()


@pytest.fixture
def start_switch(run_dir: Path, tmp_path: Path, manager: Manager) -> Iterator[Start]:
    started: list[RunningSwitch] = []

    def function(code: str = "", **settings: object) -> RunningSwitch:
        """`code` runs in the process before the command does."""
        directory = run_dir / f"{tmp_path.name[-8:]}.{len(started)}"
        directory.mkdir()
        main = f"import os\n{code}\nfrom vswitch.cli.main import main\nmain()"
        switch = RunningSwitch(
            directory,
            command=(sys.executable, "-c", main),
            env={
                "NOTIFY_SOCKET": manager.socket.getsockname(),
                "WATCHDOG_USEC": str(int(PERIOD_S * 1e6)),
            },
            **settings,  # type: ignore[arg-type]
        )
        started.append(switch)
        manager.hear_until("READY=1")
        return switch

    yield function
    for switch in started:
        switch.kill()


def test_workers_that_sleep_are_alive(start_switch: Start, manager: Manager) -> None:
    switch = start_switch(workers=2)
    for _ in range(6):
        manager.hear_until("WATCHDOG=1")
    assert [worker["state"] for worker in switch.client.workers()] == ["sleeping"] * 2


def test_a_worker_that_hangs_silences_the_watchdog(start_switch: Start, manager: Manager) -> None:
    """One of two, while the event loop goes on as ever."""
    switch = start_switch(workers=2, polling="busy")
    manager.hear_until("WATCHDOG=1")
    with held(workers_of(switch)[1]):
        manager.hear_until("STATUS=worker 1 makes no progress")
        # The other one may be without a core for as long, and is named then.
        assert "WATCHDOG" not in manager.hear_for(2 * PERIOD_S)
        assert switch.client.ping() > 0
        switch.wait_for_log("worker 1 makes no progress")
    manager.hear_until("WATCHDOG=1")
    switch.wait_for_log("all workers make progress again")
    manager.hear_until("WATCHDOG=1")


def test_the_turn_of_a_worker_that_hangs(start_switch: Start) -> None:
    """It is told while it lasts, and afterwards; that of the other worker is its own."""
    switch = start_switch(workers=2, polling="busy")

    def longest(worker: int) -> int:
        return switch.client.workers()[worker]["turns"]["since_start"]["own_ns"]

    wire = Wire(switch)
    with held(workers_of(switch)[1]):
        wire.wait_until(lambda: longest(1) >= 1_000_000_000, "a second has passed")
    assert 1_000_000_000 <= longest(1) < 2**32 * 1000
    assert longest(0) < 1_000_000_000


def test_a_worker_that_does_not_end_is_not_waited_for(
    start_switch: Start, manager: Manager
) -> None:
    switch = start_switch(
        "import vswitch.dataplane.threads as w; w.STOP_PATIENCE_S = 0.2", polling="busy"
    )
    with held(workers_of(switch)[0]):
        switch.process.terminate()
        switch.wait_for_log("worker 0 does not end: ending at once")
    assert switch.process.wait(DEADLINE_S) == 1


ENDS = """
import threading
from vswitch.dataplane import threads as workers

class Ending:
    '''Forwards until somebody connects to this port, then ends as its kind does.'''

    def __init__(self, worker):
        self.id, self._worker = worker.id, worker

    def run(self):
        threading.Thread(target=self._wait, daemon=True).start()
        self._worker.run()
        {ending}

    def _wait(self):
        import os, time
        while not os.path.exists({signal!r}):
            time.sleep(0.01)  # between two looks
        self._worker.stop()

real = workers.WorkerThreads._run
workers.WorkerThreads._run = lambda self, worker, prepared: real(self, Ending(worker), prepared)
"""


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("raise RuntimeError('lost my way')", "lost my way"),
        ("raise SystemExit(0)", "0"),
        ("return", "no error"),
    ],
)
def test_a_worker_that_ends_takes_the_process_with_it(
    start_switch: Start, manager: Manager, run_dir: Path, tmp_path: Path, ending: str, reason: str
) -> None:
    """Guests lose the link and see that they do, and whoever supervises the process as well."""
    path = run_dir / f"{tmp_path.name[-8:]}.end"
    switch = start_switch(ENDS.format(ending=ending, signal=str(path)))
    wire = Wire(switch)
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    try:
        teach(a, b)
        path.touch()
        manager.hear_until("STOPPING=1")
        assert switch.process.wait(DEADLINE_S) == 1
        switch.wait_for_log("the switch failed and was stopped")
        assert f"worker 0 ended unexpectedly: {reason}" in switch.log
        for guest in (a, b):
            with pytest.raises(BackendClosedError):
                guest.recv(1)
        left = [each for each in switch.run_dir.iterdir() if each.is_socket()]
        assert left == []
    finally:
        a.close()
        b.close()
