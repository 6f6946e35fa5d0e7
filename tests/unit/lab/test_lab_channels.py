"""The lab's two lines into a guest: its shell and QEMU's monitor, against a scripted other end."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

import pytest

from vswitch.lab.errors import MachineError
from vswitch.lab.qemu.process import Deadline
from vswitch.lab.qemu.qmp import Qmp
from vswitch.lab.qemu.shell import CommandResult, GuestShell

Script = Callable[[IO[bytes]], object]
DEADLINE_S = 60.0


class OtherEnd:
    """Runs a script on the far end of a socket pair, in a thread."""

    def __init__(self) -> None:
        self.near, self._far = socket.socketpair()
        self._thread: threading.Thread | None = None

    def play(self, script: Script) -> None:
        def run() -> None:
            with self._far, self._far.makefile("rwb", buffering=0) as line:
                script(line)  # type: ignore[arg-type]

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the end of the script."""
        assert self._thread is not None
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.near.close()
        self._far.close()
        if self._thread is not None:
            self._thread.join(DEADLINE_S)


@pytest.fixture
def other_end() -> Iterator[OtherEnd]:
    end = OtherEnd()
    yield end
    end.close()


def answer(line: IO[bytes], code: int, output: bytes, noise: bytes = b"") -> str:
    """Take one command as init.sh does; returns its script."""
    token, _seconds, encoded = line.readline().split()
    line.write(noise + b"done %s %d %d\n%s" % (token, code, len(output), output))
    return base64.b64decode(encoded).decode()


def test_command_and_its_binary_output(other_end: OtherEnd) -> None:
    scripts = []

    def guest(line: IO[bytes]) -> None:
        line.write(b"\nready boot-1\n")
        scripts.append(answer(line, 0, b"done xx 0 3\nabc\n", noise=b"garbage\n"))
        scripts.append(answer(line, 3, b""))

    other_end.play(guest)
    shell = GuestShell(other_end.near)
    assert shell.wait_ready(None, Deadline(DEADLINE_S)) == "boot-1"
    assert shell.run("echo 'x'", DEADLINE_S) == CommandResult(0, "done xx 0 3\nabc\n")
    assert shell.run("exit 3", DEADLINE_S) == CommandResult(3, "")
    other_end.close()
    other_end.finish()
    assert scripts == ["echo 'x'", "exit 3"]


def test_next_boot_is_told_from_the_last(other_end: OtherEnd) -> None:
    other_end.play(lambda line: line.write(b"ready one\nready one\nready two\n"))
    shell = GuestShell(other_end.near)
    shell.wait_ready(None, Deadline(DEADLINE_S))
    assert shell.wait_ready("one", Deadline(DEADLINE_S)) == "two"


def test_guest_that_ends_is_an_error(other_end: OtherEnd) -> None:
    other_end.play(lambda line: line.readline())
    with pytest.raises(MachineError, match="QEMU ended before"):
        GuestShell(other_end.near).run("true", DEADLINE_S)


def test_guest_that_says_nothing_is_an_error(other_end: OtherEnd) -> None:
    with pytest.raises(MachineError, match=r"did not send its ready line in 0\.05 s"):
        GuestShell(other_end.near).wait_ready(None, Deadline(0.05))


def qemu(answers: Sequence[Mapping[str, object]], seen: list[str]) -> Script:
    def script(line: IO[bytes]) -> None:
        line.write(b'{"QMP": {"version": {}}}\n')
        seen.append(json.loads(line.readline())["execute"])
        line.write(b'{"return": {}}\n')
        seen.append(json.loads(line.readline())["execute"])
        for message in answers:
            line.write(json.dumps(message).encode() + b"\n")

    return script


def test_monitor_command_and_event(other_end: OtherEnd) -> None:
    seen: list[str] = []
    reset = {"event": "RESET"}
    other_end.play(qemu([{"event": "STOP"}, {"return": {"status": "x"}}, reset], seen))
    monitor = Qmp(other_end.near)
    assert monitor.command("query-status") == {"status": "x"}
    assert monitor.wait_event("RESET", after=1) == reset
    assert [event["event"] for event in monitor.events] == ["STOP", "RESET"]
    other_end.finish()
    assert seen == ["qmp_capabilities", "query-status"]


def test_monitor_error_is_quoted(other_end: OtherEnd) -> None:
    other_end.play(qemu([{"error": {"class": "X", "desc": "no such device"}}], []))
    with pytest.raises(MachineError, match="device_del failed: no such device"):
        Qmp(other_end.near).command("device_del", id="x")
