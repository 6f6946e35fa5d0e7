"""What is measured without a generator: starting a switch, and the table of addresses by itself."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
from array import array
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random

from benchmarks.errors import BenchmarkError
from benchmarks.machine import running_on
from benchmarks.samples import Case, Reading, Setup
from benchmarks.switches import Switch
from vswitch.fastpath.main.fdb import Fdb

ALONE = "alone"
"""Stands in Case.generator where there is none."""
ENTRIES = (10, 1_000, 100_000, 1_000_000)
_LEAST_FDB_SIZE = 65536
_KEYS = 1 << 16
_LOOK_EVERY_S = 0.0005
_START_TIMEOUT_S = 30.0


class Starter:
    """Starts a switch with two ports, anew for every sample, and ends it."""

    def __init__(self, kind: type[Switch], cpu: int) -> None:
        self.name = kind.name
        self.title = kind.title
        self.pids: set[int] = set()
        self.version: str | None = None
        self._kind = kind
        self._cpu = cpu

    def running(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def prepare(self, case: Case) -> None:
        pass

    def arrange(self, case: Case) -> None:
        pass

    def measure(self, case: Case, _seconds: float) -> Reading:
        """Nanoseconds from the start of its first process until a frontend can connect."""
        with tempfile.TemporaryDirectory(prefix="vswitch-bench-") as folder:
            switch = self._kind(Path(folder), self._cpu, Setup(case.frame_len))
            found: list[int] = []
            ended = threading.Event()
            start = time.monotonic_ns()
            # The switch's processes must not be started by a thread that ends before they do.
            looking = threading.Thread(
                target=_wait_for_listener, args=(switch.sockets[0], found, ended), daemon=True
            )
            looking.start()
            try:
                switch.start()
                looking.join(_START_TIMEOUT_S)
                self.version = switch.version()
            finally:
                ended.set()
                looking.join()
                switch.close()
        if not found:
            raise BenchmarkError(f"{self.title} does not listen on {switch.sockets[0].name}")
        return Reading(found[0] - start)


def _wait_for_listener(path: Path, found: list[int], ended: threading.Event) -> None:
    while not ended.is_set():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(str(path)) == 0:
                found.append(time.monotonic_ns())
                return
        time.sleep(_LOOK_EVERY_S)


class Table:
    """The switch's forwarding database with `case.entries` addresses, looked up in random order."""

    name = "vswitch"
    title = "vswitch"

    def __init__(self, cpu: int) -> None:
        self.pids = {os.getpid()}
        self._cpu = cpu

    def running(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def prepare(self, case: Case) -> None:
        random = Random(case.entries)  # noqa: S311
        self._fdb = Fdb(max(case.entries, _LEAST_FDB_SIZE))
        # Addresses of 48 bits, none of them a group's.
        wanted = (random.getrandbits(48) & ~1 | 2 for _ in range(case.entries))
        known = [key for key in wanted if self._fdb.learn(key, 1)]
        self._keys = array("Q", random.choices(known, k=_KEYS))

    def arrange(self, case: Case) -> None:
        pass

    def measure(self, _case: Case, seconds: float) -> Reading:
        """Nanoseconds a lookup, of many that do not wait for each other."""
        with running_on({self._cpu}):
            rounds, found = 0, self._fdb.count_known(self._keys)
            start = time.monotonic_ns()
            while (spent := time.monotonic_ns() - start) < seconds * 1e9 or not rounds:
                found += self._fdb.count_known(self._keys)
                rounds += 1
        return Reading(spent / (rounds * _KEYS), lost=(rounds + 1) * _KEYS - found)


def table_bytes(entries: int) -> int:
    """Memory of the table that a Table case of so many addresses uses."""
    return Fdb(max(entries, _LEAST_FDB_SIZE)).memory_len
