"""A switch as a process: ready, signals, `stop`, failures; all with a fake switch inside."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.controlled import DEADLINE_S
from tests.support.processes import environment, sockets
from vswitch import Client
from vswitch.control.protocol import ControlError


class Daemon(subprocess.Popen[str]):
    """A started switch, and the line that said that it is ready."""

    ready_line = ""

    def read_line(self) -> str:
        assert self.stderr is not None
        return self.stderr.readline()


Start = Callable[..., Daemon]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "ports.toml"
    path.write_text(
        '[switch]\ncontrol = "run/deep/c.sock"\n[[port]]\nname = "vm1"\nsocket = "vm1.sock"\n'
        '[[uplink]]\nname = "tap9"\n'
    )
    return path


def until_ready(process: Daemon, ready: str = "vswitch: ready") -> str:
    """What it says up to and with the line that begins like this, or until it ends."""
    said = ""
    while line := process.read_line():
        said += line
        if line.startswith(ready):
            break
    return said


@pytest.fixture
def start(config: Path) -> Iterator[Start]:
    started: list[Daemon] = []

    def function(*arguments: str, expect: str = "vswitch: ready") -> Daemon:
        program = (sys.executable, "-m", "tests.support.fakedaemon")
        process = Daemon(
            [*program, "start", "-c", str(config), *arguments],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        if expect:
            said = until_ready(process, expect)
            process.ready_line = said.splitlines(keepends=True)[-1]
            assert process.ready_line.startswith(expect), said
        return process

    yield function
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=DEADLINE_S)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, err


def test_ready_means_that_all_sockets_are_open(start: Start, tmp_path: Path) -> None:
    process = start("--log-level", "error")
    control = tmp_path / "run/deep/c.sock"
    assert process.ready_line == (f"vswitch: ready, 1 port, 1 uplink, control socket {control}\n")
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(str(tmp_path / "vm1.sock"))
    with Client(control, timeout=DEADLINE_S) as client:
        assert client.switch["pid"] == process.pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_in_order(start: Start, tmp_path: Path, number: int) -> None:
    process = start()
    process.send_signal(number)
    code, log = end(process)
    assert code == 0
    assert signal.Signals(number).name in log
    assert sockets(tmp_path) == []


@pytest.mark.parametrize("nohup", [False, True])
def test_a_hangup_is_ignored_and_said(start: Start, tmp_path: Path, nohup: bool) -> None:
    """It is the usual way to have a daemon read its configuration anew, and not to end it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        process = start()
    finally:
        signal.signal(signal.SIGHUP, before)
    with Client(tmp_path / "run/deep/c.sock", timeout=DEADLINE_S) as client:
        for _ in range(3):
            process.send_signal(signal.SIGHUP)
            line = process.read_line()
            assert "SIGHUP: ignored" in line
            assert "vswitchctl" in line
        assert client.ping() > 0
        assert [port["name"] for port in client.ports()] == ["vm1", "tap9"]
        client.stop()
    assert end(process)[0] == 0


def test_stop_over_the_control_socket(start: Start, tmp_path: Path) -> None:
    process = start()
    with Client(tmp_path / "run/deep/c.sock", timeout=DEADLINE_S) as client:
        client.stop()
        assert sockets(tmp_path) == []
    assert end(process)[0] == 0


def test_it_starts_again_after_it_was_killed(start: Start, tmp_path: Path) -> None:
    process = start()
    process.kill()
    end(process)
    assert len(sockets(tmp_path)) == 2
    assert "1 port" in start().ready_line


def test_a_failing_worker_ends_the_process_with_an_error(start: Start, tmp_path: Path) -> None:
    process = start()
    with (
        Client(tmp_path / "run/deep/c.sock", timeout=DEADLINE_S) as client,
        contextlib.suppress(ControlError),  # the answer may not get out any more
    ):
        client.add_port("crash", tmp_path / "crash")
    code, log = end(process)
    assert code == 1
    assert "worker 0 ended" in log
    assert sockets(tmp_path) == []


def test_a_second_switch_with_the_same_file_leaves_the_first_alone(
    start: Start, tmp_path: Path
) -> None:
    start()
    code, log = end(start(expect=""))
    assert code == 1
    assert "listens on the control socket" in log
    assert "vswitchctl --socket" in log
    assert "Traceback" not in log
    assert len(sockets(tmp_path)) == 2
    with Client(tmp_path / "run/deep/c.sock", timeout=DEADLINE_S) as client:
        assert client.ping() > 0


def test_of_switches_that_start_at_once_over_a_crashed_one_one_runs(
    start: Start, tmp_path: Path
) -> None:
    crashed = start()
    crashed.kill()
    end(crashed)
    switches = [start(expect="") for _ in range(4)]
    said = [until_ready(process) for process in switches]
    ready = ["\nvswitch: ready" in f"\n{text}" for text in said]
    assert ready.count(True) == 1, said
    with Client(tmp_path / "run/deep/c.sock", timeout=DEADLINE_S) as client:
        assert client.switch["pid"] == switches[ready.index(True)].pid
    for process, runs, text in zip(switches, ready, said, strict=True):
        if not runs:
            code, log = end(process)
            assert code == 1
            assert "listens on the control socket" in text + log


def test_a_port_that_cannot_open_ends_the_start_and_leaves_nothing(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "vm1.sock").write_text("mine")
    code, log = end(start(expect=""))
    assert code == 1
    assert f"{tmp_path / 'vm1.sock'}: the path exists and is a regular file" in log
    assert "hint: " in log
    assert "Traceback" not in log
    assert sockets(tmp_path) == []
    assert (tmp_path / "vm1.sock").read_text() == "mine"


def test_a_control_directory_that_cannot_be(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    code, log = end(start(expect=""))
    assert code == 1
    assert "cannot create the directory" in log
    assert "Traceback" not in log


def test_group_and_permissions_of_the_control_socket(
    start: Start, config: Path, tmp_path: Path
) -> None:
    group = os.getegid()  # what anybody may give
    text = config.read_text().replace(
        "[switch]\n", f'[switch]\ncontrol_group = "{group}"\ncontrol_permissions = "0660"\n'
    )
    config.write_text(text)
    start()
    status = (tmp_path / "run/deep/c.sock").stat()
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert status.st_gid == group


def test_save_writes_the_file_it_was_started_with(
    start: Start, config: Path, tmp_path: Path
) -> None:
    config.write_text("# my lab\n" + config.read_text())
    process = start()
    with Client(tmp_path / "run/deep/c.sock", timeout=DEADLINE_S) as client:
        client.add_port("vm2", tmp_path / "vm2.sock", mtu=9000)
        client.del_uplink("tap9")
        assert client.save() == config
        assert client.version()["config"] == str(config)
        client.stop()
    end(process)
    text = config.read_text()
    assert text.startswith("# my lab\n")
    assert 'name = "vm2"' in text
    assert "tap9" not in text
    assert "2 ports" in start().ready_line


def test_the_log_level_changes_while_it_runs(start: Start, tmp_path: Path) -> None:
    process = start("--log-level", "warning")
    with Client(tmp_path / "run/deep/c.sock", timeout=DEADLINE_S) as client:
        assert client.log_level() == "warning"
        assert client.log_level("debug") == "debug"
        client.ping()
        client.stop()
    assert "log level is debug" in end(process)[1]
