"""DPDK's testpmd as a child process that takes commands."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import threading
from collections.abc import Sequence

from benchmarks.errors import BenchmarkError
from benchmarks.machine import program, running_on, version_of

_PROMPT = "testpmd> "
_runs = itertools.count()


def version() -> str:
    return "DPDK " + version_of("dpkg-query", "-W", "-f", "${Version}", "dpdk-dev")


class Testpmd:
    """An interactive testpmd with one forwarding core, all of it on one CPU.

    `vdevs` are its virtual devices, `options` follow the EAL's arguments. Its memory is
    `memory_mib` MiB of hugepages that disappear with it.
    """

    def __init__(
        self, cpu: int, vdevs: Sequence[str], options: Sequence[str], *, memory_mib: int
    ) -> None:
        # Without stdbuf the prompt, which it writes by itself, would overtake what it prints.
        command = ["setpriv", "--pdeathsig", "KILL", "--", "stdbuf", "-oL"]
        command += [program("dpdk-testpmd")]
        command += ["--lcores", f"(0,1)@{cpu}", "-m", str(memory_mib), "--in-memory"]
        command += ["--single-file-segments", "--no-pci", "--no-telemetry"]
        command += ["--file-prefix", f"vswitch-bench-{os.getpid()}-{next(_runs)}"]
        for vdev in vdevs:
            command += ["--vdev", vdev]
        self._log = ""
        self._more = threading.Condition()
        self._ended = False
        with running_on({cpu}):
            self._process = subprocess.Popen(
                [*command, "--", "-i", "--nb-cores=1", *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self._reader = threading.Thread(target=self._read, name="testpmd output", daemon=True)
        self._reader.start()
        try:
            self._wait_for_prompt(0, 30.0)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def command(self, text: str, timeout_s: float = 20.0) -> str:
        """Give a command and return what it printed."""
        assert self._process.stdin is not None
        start = len(self._log)
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()
        return self._wait_for_prompt(start, timeout_s)

    def frames(self) -> tuple[int, int]:
        """Frames received and sent so far, over all ports."""
        text = self.command("show port stats all")
        received, sent = (
            sum(map(int, re.findall(rf"{name}-packets: +(\d+)", text))) for name in ("RX", "TX")
        )
        return received, sent

    def _read(self) -> None:
        """Take in output as it comes: testpmd stops dead when the pipe is full."""
        assert self._process.stdout is not None
        while data := os.read(self._process.stdout.fileno(), 65536):
            with self._more:
                self._log += data.decode(errors="replace")
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def _wait_for_prompt(self, start: int, timeout_s: float) -> str:
        with self._more:
            self._more.wait_for(
                lambda: self._ended or self._log.find(_PROMPT, start) >= 0, timeout_s
            )
            end = self._log.find(_PROMPT, start)
            if end < 0:
                why = "has ended" if self._ended else f"gave no prompt in {timeout_s:g} s"
                raise BenchmarkError(f"testpmd {why}; it said: {self._log[-2000:].strip()}")
            return self._log[start:end]

    def close(self) -> None:
        """End it at once: it has nothing to tidy up, as all its memory is its own."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
