"""The machine: which CPUs to use, what it is, its hugepages, and who waits for a CPU."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.errors import BenchmarkError, MissingError
from vswitch._version import __version__
from vswitch.fastpath.shared.turns import cycles
from vswitch.lab import programs

HUGEPAGE_MIB = 2
_HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_BUSY_SHARE = 0.3
_STAT_PROCESSOR = 39 - 3
"""Where /proc/PID/stat has the CPU, counted from behind the name (proc(5))."""
_CYCLE_TRIAL_S = 0.05


@dataclass(frozen=True, slots=True)
class Cpus:
    """One CPU for the switch with all its threads, one for the generator and this program."""

    switch: int
    generator: int


def choose_cpus(wanted: tuple[int, ...] = ()) -> Cpus:
    """The first CPU allowed for the generator, the second for the switch, unless told otherwise."""
    allowed = sorted(os.sched_getaffinity(0))
    if wanted:
        if len(wanted) != 2 or len(set(wanted)) != 2 or not set(wanted) <= set(allowed):
            raise BenchmarkError(
                f"--cpus {','.join(map(str, wanted))}: not two different ones of {allowed}",
                hint="give the switch's CPU and the generator's, like --cpus 1,0",
            )
        return Cpus(*wanted)
    if len(allowed) < 2:
        raise BenchmarkError(
            "a benchmark needs two CPUs, one for the switch and one for the generator; "
            f"this process may use only CPU {allowed[0]}",
            hint="run it on a machine with two CPUs, or allow it another one with taskset",
        )
    return Cpus(switch=allowed[1], generator=allowed[0])


@contextlib.contextmanager
def running_on(cpus: set[int]) -> Iterator[None]:
    """This thread, and what it starts meanwhile, on these CPUs only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def describe() -> dict[str, Any]:
    """The machine and the versions of what is on it, for the report."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": os.cpu_count(),
        "virtual": bool(flags and "hypervisor" in flags[1].split()),
        "memory_mib": int(memory[1]) // 1024 if memory else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "vswitch": __version__,
        "commit": _commit(),
        "load_before": os.getloadavg()[0],
        "cycle_hz": cycle_hz(),
    }


def cycle_hz() -> float | None:
    """How fast the time-stamp counter runs; None where a program cannot read one."""
    first, start = cycles()
    time.sleep(_CYCLE_TRIAL_S)
    last, end = cycles()
    return round((last - first) / (end - start) * 1e9) if first else None


def _commit() -> str | None:
    """The commit that is measured, with a + if files differ from it; None outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def version_of(*command: str) -> str:
    """What a program or dpkg-query says its version is: the first number with dots."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    match = re.search(r"\d+(?:\.\d+)+", found.stdout + found.stderr)
    return match[0] if match else "unknown"


@contextlib.contextmanager
def hugepages(mib: int) -> Iterator[None]:
    """At least `mib` MiB of free 2 MiB hugepages; what was added is taken away at the end.

    MissingError where they cannot be had.
    """
    count = _HUGEPAGES / "nr_hugepages"
    try:
        before = int(count.read_text())
        short = -(-mib // HUGEPAGE_MIB) - int((_HUGEPAGES / "free_hugepages").read_text())
    except OSError as error:
        raise MissingError(f"this kernel has no 2 MiB hugepages ({error.strerror})") from error
    if short <= 0:
        yield
        return
    wanted = before + short
    try:
        count.write_text(str(wanted))
        added = int(count.read_text()) - before
    except OSError as error:
        raise MissingError(
            f"{short} more hugepages are needed and cannot be had: {error.strerror}",
            hint=f"as root: echo {wanted} > {count}",
        ) from error
    try:
        if added < short:
            raise MissingError(
                f"{short} more hugepages of 2 MiB are needed, the kernel has memory for {added}"
            )
        yield
    finally:
        # Not what was there before: somebody else may have changed the number meanwhile.
        count.write_text(str(max(0, int(count.read_text()) - added)))


class Thread(NamedTuple):
    """Nanoseconds on a CPU and waiting for one so far; the process, and the CPU it was on last."""

    on_cpu: int
    waited: int
    place: tuple[int, int]


class CpuWait:
    """How long the busy threads of some processes wait for a CPU that others have.

    A wait for another thread of the same process on the same CPU is the program's own affair.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = set(pids)
        self._start = time.monotonic_ns()
        self._before = self._read()

    def _read(self) -> dict[str, Thread]:
        found: dict[str, Thread] = {}
        for pid in self._pids:
            for task in Path(f"/proc/{pid}/task").iterdir():
                # A thread may end meanwhile.
                with contextlib.suppress(OSError):
                    on_cpu, waited, _ = (task / "schedstat").read_text().split()
                    after_name = (task / "stat").read_text().rpartition(")")[2].split()
                    cpu = int(after_name[_STAT_PROCESSOR])
                    found[task.name] = Thread(int(on_cpu), int(waited), (pid, cpu))
        return found

    def share(self) -> float:
        """The largest share of the time so far that a busy thread has waited, 0 to 1."""
        length = time.monotonic_ns() - self._start
        spent: dict[str, Thread] = {}
        for thread, now in self._read().items():
            before = self._before.get(thread, Thread(0, 0, now.place))
            spent[thread] = Thread(
                now.on_cpu - before.on_cpu, now.waited - before.waited, now.place
            )
        ran = Counter[tuple[int, int]]()
        for one in spent.values():
            ran[one.place] += one.on_cpu
        worst = 0
        for one in spent.values():
            if one.on_cpu + one.waited > _BUSY_SHARE * length:
                worst = max(worst, one.waited - (ran[one.place] - one.on_cpu))
        return worst / length


def cpu_time_ns(pid: int) -> int:
    """Nanoseconds that the threads of a process, those that live, have run so far."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        # A thread may end meanwhile.
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM, hugepages included."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.findall(r"^(?:VmRSS|HugetlbPages):\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * sum(map(int, found))


def program(name: str, *places: str) -> str:
    """Where a program is, on PATH or in `places`; MissingError if it is not installed."""
    if found := programs.find(name, *places):
        return found
    raise MissingError(f"{name} is not installed")
