"""What a service manager is told: by a switch that starts, lives, hangs in part, and stops."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.controlled import DEADLINE_S
from tests.support.processes import environment
from vswitch import Client
from vswitch.daemon.supervisor import Supervisor

PERIOD_S = 0.3


class Manager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(DEADLINE_S)

    def hear(self) -> dict[str, str]:
        """The variables of the next message."""
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().splitlines())

    def hear_until(self, key: str) -> list[dict[str, str]]:
        """All messages up to one that has `key`."""
        heard = [self.hear()]
        while key not in heard[-1]:
            heard.append(self.hear())
        return heard

    def heard(self) -> list[dict[str, str]]:
        """What has come already."""
        found = []
        self.socket.setblocking(False)
        try:
            while True:
                found.append(self.hear())
        except BlockingIOError:
            return found
        finally:
            self.socket.settimeout(DEADLINE_S)

    def hear_for(self, seconds: float) -> list[dict[str, str]]:
        """What has come, and what comes in so many seconds: silence is heard in no other way."""
        heard = []
        deadline = time.monotonic() + seconds
        try:
            while (left := deadline - time.monotonic()) > 0:
                self.socket.settimeout(left)
                heard.append(self.hear())
        except TimeoutError:
            pass
        finally:
            self.socket.settimeout(DEADLINE_S)
        return heard


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Manager, str]]:
    name = str(tmp_path / "n")
    manager = Manager(name if request.param == "path" else f"\0{name}")
    yield manager, name if request.param == "path" else f"@{name}"
    manager.socket.close()


def test_what_is_said(manager: tuple[Manager, str]) -> None:
    heard, address = manager
    supervisor = Supervisor({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1500000"})
    assert supervisor.listens
    assert supervisor.watchdog_s == 1.5
    supervisor.ready("2 ports")
    assert heard.hear() == {"READY": "1", "STATUS": "2 ports"}
    supervisor.status("3 ports")
    assert heard.hear() == {"STATUS": "3 ports"}
    supervisor.alive()
    assert heard.hear() == {"WATCHDOG": "1"}
    supervisor.stopping()
    assert heard.hear() == {"STOPPING": "1", "STATUS": "stopping"}


@pytest.mark.parametrize(
    ("environ", "watchdog_s", "warning"),
    [
        ({}, None, ""),
        ({"WATCHDOG_USEC": "1000000"}, None, ""),
        ({"NOTIFY_SOCKET": "/nowhere"}, None, ""),
        ({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "0"}, None, "WATCHDOG_USEC=0"),
        ({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "-1"}, None, "WATCHDOG_USEC=-1"),
        ({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1e6"}, None, "WATCHDOG_USEC=1e6"),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}, None, ""),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "9", "WATCHDOG_PID": str(os.getpid())}, 9e-6, ""),
        ({"NOTIFY_SOCKET": "vsock:2:99"}, None, "vsock:2:99"),
        ({"NOTIFY_SOCKET": "@"}, None, "NOTIFY_SOCKET=@"),
    ],
)
def test_the_environment(
    environ: dict[str, str],
    watchdog_s: float | None,
    warning: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    supervisor = Supervisor(environ)
    assert supervisor.watchdog_s == watchdog_s
    assert warning in caplog.text
    assert bool(caplog.records) is bool(warning)


def test_a_manager_that_is_gone_or_does_not_read_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Supervisor({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("")
    assert "did not hear 'READY=1'" in caplog.text
    manager = Manager(str(tmp_path / "n"))
    supervisor = Supervisor({"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "9"})
    # Nobody reads. Were the socket waited for, this would go on for ever.
    for _ in range(1000):
        supervisor.alive()
    assert "did not hear 'WATCHDOG=1'" in caplog.text
    manager.socket.close()


class Started:
    """`vswitch start` with a fake switch and a watchdog."""

    def __init__(self, directory: Path, manager: Manager) -> None:
        self.manager = manager
        config = directory / "ports.toml"
        config.write_text(
            f'[switch]\ncontrol = "{directory}/c"\n[[port]]\nname = "a"\nsocket = "a"\n'
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fakedaemon", "start", "-c", str(config)],
            env=environment(
                NOTIFY_SOCKET=str(directory / "n"), WATCHDOG_USEC=str(int(PERIOD_S * 1e6))
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert manager.hear() == {"READY": "1", "STATUS": "1 port"}
        # By then it is ready indeed.
        self.client = Client(directory / "c", timeout=DEADLINE_S)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    manager = Manager(str(tmp_path / "n"))
    started = Started(tmp_path, manager)
    yield started
    started.client.close()
    if started.process.poll() is None:
        started.process.kill()
    started.process.communicate()
    manager.socket.close()


def test_from_ready_to_stopping(started: Started, tmp_path: Path) -> None:
    assert [started.manager.hear() for _ in range(4)] == [{"WATCHDOG": "1"}] * 4
    started.client.add_port("b", tmp_path / "b")
    assert started.manager.hear_until("STATUS")[-1] == {"STATUS": "2 ports"}
    started.client.stop()
    assert started.manager.hear_until("STOPPING")[-1]["STATUS"] == "stopping"
    assert started.process.wait(DEADLINE_S) == 0
    assert started.manager.heard() == []


def test_a_worker_that_hangs_silences_the_watchdog(started: Started, tmp_path: Path) -> None:
    started.client.add_port("stuck", tmp_path / "stuck")
    told = started.manager.hear_until("STATUS")[-1]
    assert told == {"STATUS": "worker 0 makes no progress"}
    assert started.manager.hear_for(2 * PERIOD_S) == []
    assert started.client.ping() > 0, "the loop turns, which is not enough"
    started.client.del_port("stuck")
    assert started.manager.hear() == {"WATCHDOG": "1"}
    assert started.manager.hear_until("STATUS")[-1] == {"STATUS": "1 port"}
    started.client.stop()
    _, log = started.process.communicate(timeout=DEADLINE_S)
    assert "ERROR   worker 0 makes no progress for 0.1 s" in log
    assert "all workers make progress again" in log


def test_a_loop_that_is_blocked_silences_the_watchdog(started: Started, tmp_path: Path) -> None:
    pipe = tmp_path / "blocked"
    os.mkfifo(pipe)
    adding = threading.Thread(target=started.client.add_port, args=("blocked", pipe))
    adding.start()
    with pipe.open("wb"):  # which takes until the loop has opened the other end
        started.manager.heard()
        assert started.manager.hear_for(2 * PERIOD_S) == []
    adding.join()
    assert started.manager.hear_until("WATCHDOG")
