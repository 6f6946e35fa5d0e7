"""DPDK's testpmd as a child process that takes commands; tests use it, too."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from benchmarks.errors import BenchmarkError
from benchmarks.machine import program, running_on, version_of

HUGE_PAGES = ("--in-memory", "--single-file-segments")
"""EAL arguments for memory of hugepages that disappears with it."""

_PROMPT = "testpmd> "
_runs = itertools.count()


def version() -> str:
    return "DPDK " + version_of("dpkg-query", "-W", "-f", "${Version}", "dpdk-dev")


class Testpmd:
    """An interactive testpmd, all of it on `cpus`; its forwarding loop polls.

    `eal` is added to the EAL's arguments, `vdevs` are its virtual devices, `options` follow. It has
    `memory_mib` MiB of memory. Everything it prints is in `log`. It dies with us.
    """

    __test__ = False

    def __init__(
        self,
        cpus: Iterable[int],
        vdevs: Sequence[str],
        options: Sequence[str],
        *,
        memory_mib: int,
        eal: Sequence[str] = HUGE_PAGES,
    ) -> None:
        cpus = sorted(cpus)
        command = ["setpriv", "--pdeathsig", "KILL", "--", program("dpdk-testpmd")]
        command += ["--lcores", f"(0,1)@({','.join(map(str, cpus))})", "-m", str(memory_mib)]
        command += ["--no-pci", "--no-telemetry", *eal]
        command += ["--file-prefix", f"vswitch-{os.getpid()}-{next(_runs)}"]
        for vdev in vdevs:
            command += ["--vdev", vdev]
        self.log = ""
        self._more = threading.Condition()
        self._ended = False
        # A terminal to write to: into a pipe it would keep its output back in a buffer.
        self._terminal, terminal = os.openpty()
        try:
            with running_on(set(cpus)):
                self._process = subprocess.Popen(
                    [*command, "--", "-i", *options],
                    stdin=subprocess.PIPE,
                    stdout=terminal,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
        except BaseException:
            os.close(self._terminal)
            raise
        finally:
            os.close(terminal)
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

    def command(self, text: str, timeout_s: float = 60.0) -> str:
        """Give a command and return what it printed."""
        start = len(self.log)
        self._write(text)
        return self._wait_for_prompt(start, timeout_s)

    def counters(self, port: int) -> dict[str, int]:
        """What `show port stats` says: rx_packets, tx_packets, rx_bytes, ..."""
        text = self.command(f"show port stats {port}")
        return {
            name.lower().replace("-", "_"): int(value)
            for name, value in re.findall(r"([RT]X-[a-z]+): +(\d+)", text)
        }

    def frames(self) -> tuple[int, int]:
        """Frames received and sent so far, over all ports."""
        text = self.command("show port stats all")
        received, sent = (
            sum(map(int, re.findall(rf"{name}-packets: +(\d+)", text))) for name in ("RX", "TX")
        )
        return received, sent

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        """Take in output as it comes: testpmd stops dead when the terminal is full."""
        while True:
            try:
                data = os.read(self._terminal, 65536)
            except OSError:  # EIO: the last writer has gone
                break
            with self._more:
                self.log += data.decode(errors="replace")
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def _wait_for_prompt(self, start: int, timeout_s: float) -> str:
        with self._more:
            self._more.wait_for(
                lambda: self._ended or self.log.find(_PROMPT, start) >= 0, timeout_s
            )
            end = self.log.find(_PROMPT, start)
            if end < 0:
                why = "has ended" if self._ended else f"gave no prompt in {timeout_s:g} s"
                raise BenchmarkError(f"testpmd {why}; it said: {self.log[-2000:].strip()}")
            return self.log[start:end]

    def close(self) -> None:
        """End it; by `quit`, so that it removes its runtime directory and its sockets."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                self._write("stop\nquit")
            try:
                self._process.wait(timeout=60.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join()
        os.close(self._terminal)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
