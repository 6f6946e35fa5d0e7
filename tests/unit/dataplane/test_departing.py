"""Memory that goes is taken apart by a thread, and nobody but its port waits."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.handover import AtOnce
from vswitch.config.settings import PortSettings
from vswitch.dataplane.departing import AT_ONCE_LEN, Part, forget_pages
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.mapping import DirtyLog, Memory
from vswitch.ports import datapath as port_datapath
from vswitch.ports import memory as port_memory
from vswitch.ports.datapath import PortDatapath
from vswitch.ports.health import PortHealth
from vswitch.vhost_user.protocol import LogArea, MemRegion

MIB = 1 << 20
LEN = 64 * MIB
NAME = "departing"


class Slow:
    """Takes as long to be taken apart as somebody says."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.go_on = threading.Event()
        self.thread: threading.Thread | None = None

    def forget_pages(self) -> None:
        self.thread = threading.current_thread()
        self.go_on.wait()


def test_others_have_their_turn_meanwhile() -> None:
    async def run() -> None:
        part = Slow(AT_ONCE_LEN + 1)
        going = asyncio.create_task(forget_pages([part]))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not going.done()
        part.go_on.set()
        await going
        assert part.thread is not threading.main_thread()

    asyncio.run(run())


def test_a_small_one_goes_at_once() -> None:
    async def run() -> None:
        part = Slow(AT_ONCE_LEN)
        await forget_pages([part])
        assert part.thread is None

    asyncio.run(run())


def test_who_is_cancelled_leaves_it_to_the_thread() -> None:
    async def run() -> None:
        part = Slow(LEN)
        going = asyncio.create_task(forget_pages([part]))
        while part.thread is None:
            await asyncio.sleep(0.001)
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going
        part.go_on.set()

    asyncio.run(run())


def resident_kib(name: str) -> int:
    """Of the mappings of a memfd, how much is in our page tables."""
    found, ours = 0, False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            if "-" in line.split(" ", 1)[0]:
                ours = f"memfd:{name}" in line
            elif ours and line.startswith("Rss:"):
                found += int(line.split()[1])
    return found


def address(name: str) -> int:
    with Path("/proc/self/maps").open() as lines:
        return next(int(line.split("-")[0], 16) for line in lines if f"memfd:{name}" in line)


def test_pages_are_forgotten_and_what_is_in_them_is_not() -> None:
    fd = os.memfd_create(NAME)
    try:
        os.ftruncate(fd, LEN)
        memory = Memory([(0, LEN, 0, 0)], [fd])
        ctypes.memset(address(NAME), 0x5A, LEN)
        assert resident_kib(NAME) == LEN >> 10
        [part] = memory.parts()
        assert part.length == LEN
        part.forget_pages()
        assert resident_kib(NAME) == 0
        assert os.pread(fd, 1, LEN - 1) == b"\x5a"
        assert ctypes.string_at(address(NAME) + LEN - 1, 1) == b"\x5a"
    finally:
        os.close(fd)


def test_what_stays_is_no_part_of_what_goes() -> None:
    fd = os.memfd_create(NAME)
    try:
        os.ftruncate(fd, 2 * LEN)
        first = Memory([(0, LEN, 0, 0)], [fd])
        both = first.with_region((LEN, LEN, LEN, LEN), fd)
        assert first.parts(both) == []
        assert len(both.parts(first)) == 1
        assert len(both.parts()) == 2
    finally:
        os.close(fd)


def test_a_log() -> None:
    fd = os.memfd_create(NAME)
    try:
        os.ftruncate(fd, LEN)
        log = DirtyLog(fd, LEN, 0)
        ctypes.memset(address(NAME), 1, LEN)
        log.forget_pages()
        assert resident_kib(NAME) == 0
    finally:
        os.close(fd)


def test_a_port_has_its_memory_and_logs_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way they go."""
    gone: list[int] = []

    async def forget(parts: Iterable[Part]) -> None:
        gone.extend(part.length for part in parts)

    for module in (port_datapath, port_memory):
        monkeypatch.setattr(module, "forget_pages", forget)
    engine = Engine()
    settings = PortSettings(name="p", socket=Path("/nowhere"))
    port = PortDatapath(
        settings, engine, engine.add_port("p"), AtOnce(engine), lambda _: 0,
        PortHealth("p", lambda *_: None), lambda: None, lambda *_: "", lambda: None,
    )  # fmt: skip
    fd = os.memfd_create(NAME)

    async def run() -> None:
        first, second = MemRegion(0, LEN, 0, 0), MemRegion(LEN, 2 * LEN, LEN, 0)
        await port.set_memory([first], [fd])
        await port.add_memory(second, fd)
        assert gone == []
        await port.remove_memory(first)
        assert gone == [LEN]
        await port.set_memory([first], [fd])
        assert gone == [LEN, 2 * LEN]
        for size in (LEN, 3 * LEN):
            await port.set_dirty_log(fd, LogArea(size, 0))
        assert gone == [LEN, 2 * LEN, LEN]
        await port.set_memory([], [])
        assert gone == [LEN, 2 * LEN, LEN, LEN, 3 * LEN]

    try:
        os.ftruncate(fd, 3 * LEN)
        asyncio.run(run())
    finally:
        os.close(fd)
