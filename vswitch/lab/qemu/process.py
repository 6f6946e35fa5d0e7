"""Child processes that never outlive us.

Each child leads a process group of its own, so that Ctrl-C reaches only the parent, which then
stops its children in order. Should the parent be killed outright, the kernel sends the children
their death signal (`setpriv --pdeathsig`, from util-linux).

The death signal is tied to the *thread* that starts the child: start children from a thread that
lives as long as they shall.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vswitch.lab import programs


def start(
    argv: Sequence[str],
    *,
    log: Path,
    death_signal: str = "KILL",
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start `argv` with its stdout and stderr appended to `log` and stdin closed.

    `death_signal` names what the child gets when this thread dies without having stopped it.
    """
    command = list(argv)
    if setpriv := programs.find("setpriv"):
        command = [setpriv, "--pdeathsig", death_signal, "--", *command]
    with log.open("ab") as sink:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            env=None if env is None else dict(env),
            cwd=cwd,
            process_group=0,
        )


def stop(process: subprocess.Popen[bytes], timeout_s: float = 3.0) -> int:
    """Stop `process` with SIGTERM, after `timeout_s` seconds SIGKILL; returns its exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            kill(process)
    return process.wait()


def kill(process: subprocess.Popen[bytes]) -> int:
    """Kill the whole process group of `process` at once; returns its exit code."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def tail(path: Path, lines: int = 30) -> str:
    """The last `lines` lines of a log, or an empty string if there is no log."""
    try:
        text = path.read_bytes()[-65536:].decode(errors="replace")
    except FileNotFoundError:
        return ""
    kept = [line for line in text.replace("\r", "").splitlines() if line.strip()]
    return "\n".join(kept[-lines:])


class Deadline:
    """A moment in the future that several waits share."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

    def passed(self) -> bool:
        return time.monotonic() >= self._end


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM and SIGHUP leave this block as SystemExit, so that context managers run."""

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
