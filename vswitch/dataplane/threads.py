"""The poll threads: starting, pinning, naming and ending them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import cast

from vswitch.api import QueueInfo, WorkerInfo
from vswitch.errors import ConfigError, VswitchError
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.worker import Worker
from vswitch.fastpath.shared.turns import cycles
from vswitch.host.privileges import limit_capabilities

log = logging.getLogger("vswitch.worker")

_COMM_LEN_MAX = 15
STOP_PATIENCE_S = 5.0
"""How long a worker that is to end may take for a turn of its loop, which is microseconds."""


class WorkerThreads:
    """Runs an engine's workers, each in a thread, optionally each on a CPU of its own.

    `failed` gets an exception should one of them end without being told to.
    """

    def __init__(self, engine: Engine, cpus: list[int] | None) -> None:
        self._engine = engine
        self._cpus = cpus
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._progress: list[tuple[int, int]] = []
        self._cycles, self._ns = cycles()

    def start(self) -> None:
        """Start them all; each has its name, its CPU and no capabilities when this returns.

        Raises ConfigError for a CPU that this process may not use, VswitchError if one cannot be
        prepared.
        """
        allowed = os.sched_getaffinity(0)
        for cpu in self._cpus or ():
            if cpu not in allowed:
                raise ConfigError(
                    f"switch.cpus: CPU {cpu} is not one this process may run on",
                    hint=f"those are {', '.join(map(str, sorted(allowed)))}",
                )
        # Threads inherit the signal mask. Signals are the main thread's, except those that a thread
        # causes itself; of these, SIGBUS is survived (fastpath/sigbus.h).
        own = {signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE, signal.SIGILL}
        old = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - own)
        prepared: list[Future[None]] = []
        try:
            for worker in self._engine.workers:
                prepared.append(Future())
                thread = threading.Thread(
                    target=self._run, args=(worker, prepared[-1]), daemon=True
                )
                thread.start()
                self._threads.append(thread)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        for number, each in enumerate(prepared):
            try:
                each.result()
            except OSError as exc:
                raise VswitchError(f"worker {number} cannot be started: {exc.strerror}") from exc

    def stop(self) -> None:
        """End them all; they need microseconds.

        Raises VswitchError for one that does not end: nothing that it uses can be freed then.
        """
        self._stopping = True
        for worker in self._engine.workers:
            worker.stop()
        for number, thread in enumerate(self._threads):
            thread.join(STOP_PATIENCE_S)
            if thread.is_alive():
                raise VswitchError(f"worker {number} does not end")
        self._threads.clear()
        if not self.failed.done():
            self.failed.cancel()

    def stuck(self) -> list[int]:
        """Those that have finished no turn of their loop since the last call and do not sleep."""
        found = []
        progress = []
        for number, worker in enumerate(self._engine.workers):
            stats = worker.stats()
            # Who has just woken up has finished no turn, but was asleep.
            progress.append((stats["loops"], stats["wakeups"]))
            moved = not self._progress or progress[number] != self._progress[number]
            if stats["state"] != "sleeping" and not moved:
                found.append(number)
        self._progress = progress
        return found

    def info(self, queues: Mapping[int, list[QueueInfo]]) -> list[WorkerInfo]:
        """All workers, each with those of its queues that are in `queues`."""
        found = []
        now_cycles, now_ns = cycles()
        cycles_per_ns = (now_cycles - self._cycles) / max(1, now_ns - self._ns)
        for number, worker in enumerate(self._engine.workers):
            stats = worker.stats()
            frames, busy_ns = stats["frames"], stats["busy_ns"]
            per_frame = round(cycles_per_ns * busy_ns / frames, 1) if frames else None
            info = {
                **stats,
                "cpu": self._cpus[number] if self._cpus else None,
                "rings": self._engine.n_transmitqs(number),
                "cycles_per_frame": per_frame or None,
                "turns": worker.turns(),
                "queues": queues.get(number, []),
            }
            found.append(cast(WorkerInfo, info))
        return found

    def _run(self, worker: Worker, prepared: Future[None]) -> None:
        try:
            self._prepare(worker)
        except BaseException as exc:
            prepared.set_exception(exc)
            return
        prepared.set_result(None)
        try:
            worker.run()
        except BaseException as exc:
            log.exception("worker %d failed", worker.id)
            self._report(worker, exc)
        else:
            self._report(worker, None)

    def _prepare(self, worker: Worker) -> None:
        tid = threading.get_native_id()
        with contextlib.suppress(OSError):  # the name is for `top -H` only
            Path(f"/proc/self/task/{tid}/comm").write_text(f"vs-worker-{worker.id}"[:_COMM_LEN_MAX])
        # It reads what guests wrote: it may do nothing that not every process may.
        limit_capabilities(frozenset())
        if self._cpus:
            os.sched_setaffinity(tid, {self._cpus[worker.id]})

    def _report(self, worker: Worker, exc: BaseException | None) -> None:
        if self._stopping:
            return
        error = VswitchError(f"worker {worker.id} ended unexpectedly: {exc or 'no error'}")
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: VswitchError) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)
