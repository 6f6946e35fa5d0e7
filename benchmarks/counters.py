"""Cycles, instructions and cache misses of a switch, as `perf stat` counts them where it can."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.errors import MissingError
from benchmarks.machine import program

EVENTS = ("cycles", "instructions", "cache-misses")


def parse(text: str) -> dict[str, float]:
    """Counts a second that an event was counted, from the lines of `perf stat -x,`.

    Left out is what the machine does not support, or what was not counted.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        fields = line.split(",")
        # count, unit, event, nanoseconds counted, percent of the time, ...
        if len(fields) < 5 or not fields[0].isdigit() or not fields[3].isdigit():
            continue
        event = fields[2].partition(":")[0]
        if event in EVENTS and int(fields[3]):
            found[event] = int(fields[0]) / (int(fields[3]) / 1e9)
    return found


def check() -> None:
    """MissingError if this machine's counters cannot be read, with the reason."""
    command = [program("perf"), "stat", "-x,", "-e", ",".join(EVENTS), "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingError(f"perf failed: {(done.stderr.strip() or 'no reason').splitlines()[0]}")
    if "cycles" not in parse(done.stderr):
        raise MissingError("perf counts no cycles on this machine")


@contextlib.contextmanager
def counting(pid: int) -> Iterator[dict[str, float]]:
    """Count what a process does during the block; afterwards the dict has what `parse` returns."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="vswitch-bench-") as folder:
        out = Path(folder, "perf")
        command = [program("perf"), "stat", "-x,", "-o", str(out), "-e", ",".join(EVENTS)]
        perf = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.DEVNULL)
        try:
            yield found
        finally:
            perf.send_signal(signal.SIGINT)
            perf.wait()
        if out.exists():
            found.update(parse(out.read_text()))
