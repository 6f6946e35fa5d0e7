"""Runs DPDK's testpmd, the independent implementation of either side of vhost-user."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import threading
from collections.abc import Sequence
from types import TracebackType

_PROMPT = "testpmd> "
_runs = itertools.count()


class Testpmd:
    """One interactive testpmd without hugepages, on whatever cores this process may use.

    `vdevs` are its virtual devices, `options` what follows the EAL arguments, and `eal` is added to
    those. Everything it prints is in `log`. Its forwarding loop polls, so keep it for no longer
    than needed.
    """

    __test__ = False

    def __init__(
        self,
        vdevs: list[str],
        options: list[str],
        *,
        eal: Sequence[str] = (),
        memory_mib: int = 256,
    ) -> None:
        cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        command = ["dpdk-testpmd", "--lcores", f"(0,1)@({cpus})", "-m", str(memory_mib)]
        command += ["--no-huge", "--no-pci", "--no-telemetry"]
        command += ["--file-prefix", f"vswitch-{os.getpid()}-{next(_runs)}"]
        command += eal
        for vdev in vdevs:
            command += ["--vdev", vdev]
        self.log = ""
        # A terminal to write to: into a pipe it would keep its output back in a buffer.
        self._terminal, terminal = os.openpty()
        try:
            self._process = subprocess.Popen(
                [*command, "--", "-i", *options],
                stdin=subprocess.PIPE,
                stdout=terminal,
                stderr=subprocess.STDOUT,
            )
        except BaseException:
            os.close(self._terminal)
            raise
        finally:
            os.close(terminal)
        self._more = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="testpmd output", daemon=True)
        self._reader.start()
        try:
            self._wait_for_prompt(0, 30.0)
        except BaseException:
            self.close()
            raise

    def command(self, text: str, timeout: float = 60.0) -> str:
        """Give a command and return what it printed."""
        assert self._process.stdin is not None
        start = len(self.log)
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()
        return self._wait_for_prompt(start, timeout)

    def counters(self, port: int) -> dict[str, int]:
        """What `show port stats` says: rx_packets, tx_packets, rx_bytes, ..."""
        text = self.command(f"show port stats {port}")
        return {
            name.lower().replace("-", "_"): int(value)
            for name, value in re.findall(r"([RT]X-[a-z]+): +(\d+)", text)
        }

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

    def _wait_for_prompt(self, start: int, timeout: float) -> str:
        with self._more:
            self._more.wait_for(lambda: self._ended or self.log.find(_PROMPT, start) >= 0, timeout)
            end = self.log.find(_PROMPT, start)
            if end < 0:
                why = "has ended" if self._ended else f"gave no prompt in {timeout:g} s"
                raise AssertionError(f"testpmd {why}:\n{self.log}")
            return self.log[start:end]

    def close(self) -> None:
        if self._process.poll() is None:
            # "quit" lets it remove its runtime directory and its sockets.
            with contextlib.suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.write(b"stop\nquit\n")
                self._process.stdin.flush()
            try:
                self._process.wait(timeout=60.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join()
        os.close(self._terminal)
        assert self._process.stdin is not None
        self._process.stdin.close()

    def __enter__(self) -> Testpmd:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
