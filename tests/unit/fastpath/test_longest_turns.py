"""How long a loop's turns are, and how much of that is the machine's doing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.shared import turns
from vswitch.fastpath.shared.turns import LoopTurns, Record

S = 1_000_000_000
MS = 1_000_000
DEADLINE_S = 60.0


def in_loop(work: Callable[[LoopTurns], Coroutine[Any, Any, None]]) -> None:
    """Run `work` on a loop whose turns are measured."""

    async def run() -> None:
        measured = LoopTurns(asyncio.get_running_loop())
        try:
            # Its first turn began before it was measured.
            await asyncio.sleep(0.001)
            await work(measured)
        finally:
            measured.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def longest(measured: LoopTurns) -> int:
    info = measured.info()
    assert info is not None
    return info["since_start"]["longest_ns"]


def from_reader(block: Callable[[], None]) -> Callable[[], None]:
    """Have a reader of a socket do it, as for a frontend's message."""
    ours, theirs = socket.socketpair()

    def read() -> None:
        ours.recv(1)
        block()
        asyncio.get_running_loop().remove_reader(ours)
        ours.close()
        theirs.close()

    asyncio.get_running_loop().add_reader(ours, read)
    theirs.send(b"x")
    return lambda: None


KINDS: dict[str, Callable[[Callable[[], None]], object]] = {
    "soon": lambda block: asyncio.get_running_loop().call_soon(block),
    "timer": lambda block: asyncio.get_running_loop().call_later(0.001, block),
    "reader": from_reader,
    "thread": lambda block: threading.Thread(
        target=asyncio.get_running_loop().call_soon_threadsafe, args=(block,)
    ).start(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_that_sleeps_in_the_kernel(kind: str) -> None:
    async def work(measured: LoopTurns) -> None:
        done = asyncio.Event()

        def block() -> None:
            time.sleep(0.05)
            done.set()

        KINDS[kind](block)
        await done.wait()
        await asyncio.sleep(0.001)  # the turn has ended
        assert longest(measured) >= 50 * MS

    in_loop(work)


def test_waiting_for_events_is_no_turn() -> None:
    """Neither for the loop's own nor for one that comes in from outside."""

    async def work(measured: LoopTurns) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        sender = threading.Timer(0.5, theirs.send, [b"x"])
        sender.start()
        with ours, theirs:
            await asyncio.get_running_loop().sock_recv(ours, 1)
        await asyncio.sleep(0.5)
        info = measured.info()
        assert info is not None
        assert info["since_start"]["own_ns"] < 500 * MS

    in_loop(work)


@contextlib.contextmanager
def competed_for() -> Iterator[None]:
    """This thread has a CPU on which two others want to run all the time."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    spin = "print(flush=True)\nwhile True: pass"
    others = [
        subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) for _ in range(2)
    ]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        for other in others:
            other.kill()
            other.communicate()


def spin(cpu_s: float) -> None:
    until = time.thread_time() + cpu_s
    while time.thread_time() < until:
        pass


def test_what_no_cpu_ran_is_told_apart() -> None:
    async def work(measured: LoopTurns) -> None:
        asyncio.get_running_loop().call_soon(spin, 0.1)
        await asyncio.sleep(0.001)
        await asyncio.sleep(0.001)
        info = measured.info()
        assert info is not None
        turn = info["since_start"]
        assert turn["run_delay_ns"] is not None
        # A third of the CPU is its share. Half of that: others have priorities of their own.
        assert turn["run_delay_ns"] > 50 * MS
        assert turn["longest_ns"] - turn["run_delay_ns"] >= 90 * MS
        assert 90 * MS <= turn["own_ns"] < turn["longest_ns"]

    with competed_for():
        in_loop(work)


def test_without_schedstat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "open_schedstat", lambda: -1)

    async def work(measured: LoopTurns) -> None:
        asyncio.get_running_loop().call_soon(time.sleep, 0.05)
        await asyncio.sleep(0.001)
        await asyncio.sleep(0.001)
        assert longest(measured) >= 50 * MS
        info = measured.info()
        assert info is not None
        assert info["since_start"]["run_delay_ns"] is None

    in_loop(work)


def test_it_ends_with_its_loop_or_before() -> None:
    before = len(os.listdir("/proc/self/fd"))

    async def work(measured: LoopTurns) -> None:
        measured.close()
        assert measured.info() is None

    for _ in range(3):
        in_loop(work)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_loop_that_is_no_uvloop() -> None:
    async def run() -> None:
        with pytest.raises(TypeError):
            LoopTurns(asyncio.get_running_loop())

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(run())


def test_windows() -> None:
    record = Record()
    start = 1000 * S

    def shown(at: int) -> list[int]:
        info = record.info(at)
        return [
            info["last_10_s"]["longest_ns"] // MS,
            info["last_minute"]["longest_ns"] // MS,
            info["since_start"]["longest_ns"] // MS,
        ]

    assert shown(start) == [0, 0, 0]
    record.note(30 * MS, start)
    record.note(50 * MS, start + S // 2)
    record.note(20 * MS, start + 3 * S)
    assert shown(start + 3 * S) == [50, 50, 50]
    assert shown(start + 9 * S) == [50, 50, 50]
    assert shown(start + 10 * S) == [20, 50, 50]
    assert shown(start + 13 * S) == [0, 50, 50]
    assert shown(start + 60 * S) == [0, 20, 50]
    # The slot of its second belongs to another one now.
    record.note(MS, start + 64 * S)
    assert shown(start + 64 * S) == [1, 1, 50]
    record.note(MS, start + 67 * S)
    assert shown(start + 67 * S) == [1, 1, 50]


def test_a_worker() -> None:
    """One that sleeps has no long turn, and each of its turns has been seen."""
    engine = Engine(workers=1, idle_ns=1000)
    [worker] = engine.workers
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        deadline = time.monotonic() + DEADLINE_S
        while worker.stats()["state"] != "sleeping":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.5)
        found = worker.turns()
        assert found["last_10_s"] == found["since_start"]
        assert found["since_start"]["longest_ns"] > 0
        assert found["since_start"]["own_ns"] < 500 * MS
        assert found["since_start"]["run_delay_ns"] is not None
    finally:
        worker.stop()
        thread.join()
