"""A `vswitch start` subprocess, as the demo and the end-to-end tests run it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from vswitch.control.client import Client
from vswitch.lab import programs
from vswitch.lab.errors import LabError
from vswitch.lab.qemu import process

START_TIMEOUT_S = 20.0
READY = b"vswitch: ready"


class SwitchProcess:
    """A switch in a process of its own; a context manager that stops it.

    `config` is the configuration file, `control` the control socket it names. What the switch says
    is appended to `log`, over restarts. `program` is the `vswitch` to be started, with its first
    arguments; by default the one that this is part of.
    """

    def __init__(self, config: Path, control: Path, log: Path, program: Sequence[str] = ()) -> None:
        self.config = config
        self.control = control
        self.log = log
        self._program = tuple(program) or tuple(programs.python("vswitch"))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = START_TIMEOUT_S) -> Self:
        """Start the switch and wait for its ready line."""
        if self.running:
            raise LabError("the switch is running already")
        said_before = self.log.stat().st_size if self.log.exists() else 0
        self._process = process.start(
            [*self._program, "start", "--config", str(self.config)],
            log=self.log,
            death_signal="TERM",
        )
        deadline = process.Deadline(timeout_s)
        while True:
            ended = self._process.poll()
            # Read after the poll: what it said last is complete then.
            said = self.log.read_bytes()[said_before:]
            if READY in said:
                return self
            if ended is not None:
                reason = said.decode(errors="replace").strip()
                raise LabError(f"`vswitch start` ended with {ended}: {reason}")
            if deadline.passed():
                process.kill(self._process)
                raise LabError(
                    f"the switch was not ready within {timeout_s:g} s:\n{process.tail(self.log)}"
                )
            time.sleep(0.01)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the switch."""
        if self._process is None:
            raise LabError("the switch was never started")
        return self._process.pid

    def client(self, timeout_s: float = 10.0) -> Client:
        """A new connection to the control socket."""
        return Client(self.control, timeout=timeout_s)

    def stop(self, timeout_s: float = 10.0) -> int:
        """Stop the switch with SIGTERM; returns its exit code."""
        return 0 if self._process is None else process.stop(self._process, timeout_s)

    def kill(self) -> None:
        """End the switch with SIGKILL: it cannot tidy up anything."""
        if self._process is not None:
            process.kill(self._process)

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
