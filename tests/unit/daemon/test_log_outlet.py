"""What is said goes out in order, and nobody waits for who does not read it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
from collections.abc import Iterator

import pytest

from vswitch.daemon import outlet as log_outlet
from vswitch.daemon.outlet import Outlet

DEADLINE_S = 20.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(reading end, writing end), with room for a page."""
    ends = os.pipe()
    fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, 4096)
    yield ends
    for end in ends:
        os.close(end)


def read_until(fd: int, text: str) -> str:
    got = ""
    while text not in got:
        got += os.read(fd, 1 << 16).decode()
    return got


@pytest.fixture(autouse=True)
def _short_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_outlet, "HELD_LEN", 1 << 16)


def test_before_it_is_started(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1])
    print("one", file=outlet)
    assert os.read(pipe[0], 100) == b"one\n"
    assert outlet.finish(0)


def test_in_order_and_from_any_thread(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1])
    outlet.write("first\n")
    prepared = threading.Event()
    outlet.start(prepared.set)
    texts = [f"{n} \udcff\n" for n in range(1000)]
    writer = threading.Thread(target=lambda: [outlet.write(text) for text in texts])
    writer.start()
    got = read_until(pipe[0], "999 \\udcff\n")
    writer.join()
    assert got == "first\n" + "".join(texts).replace("\udcff", "\\udcff")
    assert prepared.is_set()
    outlet.write("last\n")
    assert outlet.finish(DEADLINE_S)
    assert read_until(pipe[0], "\n") == "last\n"
    outlet.write("too late\n")
    outlet.flush()
    os.set_blocking(pipe[0], False)
    with pytest.raises(BlockingIOError):
        os.read(pipe[0], 1)


def test_nobody_reads(pipe: tuple[int, int]) -> None:
    """Lines beyond what there is room for are counted, and the count is told later."""
    outlet = Outlet(pipe[1])
    outlet.start()
    line = "x" * 2999 + "\n"
    for _ in range(100):  # a page and 64 KiB hold less
        outlet.write(line)
    got, told = "", 0
    while told + got.count("x\n") < 100:
        # In its own time, as a reader that was stopped.
        got += os.read(pipe[0], 1 << 14).decode()
        told = sum(map(int, re.findall(r"left out (\d+) lines: whoever", got)))
        outlet.flush()
    assert told >= 60
    assert re.sub(r".*left out .*\n", "", got) == line * (100 - told)
    outlet.write("again\n")
    assert read_until(pipe[0], "again\n").endswith("again\n")
    assert outlet.finish(DEADLINE_S)


def test_the_end_is_not_waited_for_for_ever(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1])
    outlet.start()
    for _ in range(100):
        outlet.write("x" * 2999 + "\n")
    assert not outlet.finish(0.01)
    # Its thread goes on, and ends when somebody reads.
    os.set_blocking(pipe[0], False)
    while not outlet.finish(0.01):
        with contextlib.suppress(BlockingIOError):
            os.read(pipe[0], 1 << 16)


def test_nobody_is_left_to_read() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    outlet = Outlet(writing)
    outlet.start()
    for _ in range(100):
        outlet.write("x\n")
    assert outlet.finish(DEADLINE_S)
    os.close(writing)
