"""What the switch promises with a reply: after it, no worker uses the old state any more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.frames import BROADCAST, frame, mac
from tests.support.running import Wire, loading, teach, used_on
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.load.load import Flow, Load

A, B = mac(1), mac(2)
PATTERN = 0x5A
BUF_LEN = 2048


@contextlib.contextmanager
def fire(sender: SoftwareGuest, dst: str, src: str) -> Iterator[None]:
    """Frames from `sender` as fast as they go, for as long as the block lasts."""
    load = Load([Flow(sender.transmitqs[0], None, [frame(dst, src, 300)])])
    with loading(load):
        used_on(sender.transmitqs, 100)
        yield
        used_on(sender.transmitqs, 100)


@pytest.fixture(params=[1, 2], ids=["one worker", "two workers"])
def pair(
    start: Callable[..., Wire], request: pytest.FixtureRequest
) -> tuple[Wire, SoftwareGuest, SoftwareGuest]:
    wire = start(workers=request.param)
    a = wire.guest("a", 1, rx_buf_len=BUF_LEN, rx_guard_len=8, indirect=False)
    b = wire.guest("b", 2)
    teach(a, b)
    return wire, a, b


Pair = tuple[Wire, SoftwareGuest, SoftwareGuest]


def buffers(guest: SoftwareGuest) -> list[int]:
    """Addresses of all receive buffers."""
    queue = guest.receiveqs[0]
    return [queue.raw.read_desc(i).addr for i in range(queue.layout.size)]


def untouched(guest: SoftwareGuest, places: list[int], sender: SoftwareGuest) -> None:
    """Nobody writes to the buffers or the used ring, while the switch takes 500 of the frames."""
    used = guest.receiveqs[0].raw.used_idx
    pattern = bytes([PATTERN]) * BUF_LEN
    for _ in range(5):
        used_on(sender.transmitqs, 100)
        assert guest.receiveqs[0].raw.used_idx == used
        for gpa in places:
            assert guest.memory.read(gpa, BUF_LEN) == pattern


def test_get_vring_base_ends_all_writing(pair: Pair) -> None:
    """Its reply gives the ring back to the guest, under fire as well as in peace."""
    wire, a, b = pair
    received = 0
    with fire(b, A, B):
        for _ in range(10):
            received += len(a.recv(300))
            a.stop_rings()
            # What had come is taken and its buffers posted again; from here on they are a's.
            received += len(a.poll_frames(256))
            assert a.receiveqs[0].base == a.receiveqs[0].raw.used_idx
            places = buffers(a)
            for gpa in places:
                a.memory.mapping.fill(gpa, BUF_LEN, PATTERN)
            untouched(a, places, b)
            for gpa in places:
                # As the guard bytes are to be when the ring goes on.
                a.memory.mapping.fill(gpa, BUF_LEN + 8, 0xA5)
            a.start_rings()
    b.drain()
    received += len(a.poll_frames(256))
    assert received == wire.stats("a")["egress_frames"] - 1
    assert set(wire.drops("a")) <= {"no-buffer"}
    assert set(wire.drops("b")) <= {"egress-down"}


def test_disabled_receiveq_is_left_alone(pair: Pair) -> None:
    """SET_VRING_ENABLE 0 with REPLY_ACK: no frame after the acknowledgement."""
    _, a, b = pair
    with fire(b, A, B):
        for _ in range(10):
            assert len(a.recv(300)) == 300
            a.frontend.set_vring_enable(0, False)
            a.poll_frames(256)
            places = buffers(a)
            for gpa in places:
                a.memory.mapping.fill(gpa, BUF_LEN, PATTERN)
            untouched(a, places, b)
            for gpa in places:
                a.memory.mapping.fill(gpa, BUF_LEN + 8, 0xA5)
            a.frontend.set_vring_enable(0, True)


def test_new_memory_table_under_fire(pair: Pair) -> None:
    """SET_MEM_TABLE again and again: the rings go on, and the old mapping is gone each time."""
    wire, a, b = pair
    maps = Path(f"/proc/{wire.switch.process.pid}/maps")

    def mappings() -> int:
        return maps.read_text().count("vswitch-guest")

    before = mappings()
    with fire(b, A, B):
        for _ in range(30):
            a.frontend.set_mem_table(*a.memory.table())
            assert mappings() == before
            assert len(a.recv(50)) == 50
    a.poll_frames(256)
    b.drain()
    a.poll_frames(256)
    a.send([frame(BROADCAST, A)])
    assert b.recv(1) == [frame(BROADCAST, A)]


def test_deleted_port_under_fire(pair: Pair) -> None:
    """When del_port has returned, the guest's memory is no longer mapped."""
    wire, a, b = pair
    maps = Path(f"/proc/{wire.switch.process.pid}/maps")
    with fire(b, A, B):
        for _ in range(10):
            assert len(a.recv(50)) == 50
            mapped = maps.read_text().count("vswitch-guest")
            wire.remove("a")
            assert maps.read_text().count("vswitch-guest") == mapped - 1
            a.connect(wire.port("a"))
            # b's frames are for anybody until A has spoken; a is the only other one there.
    b.drain()
    assert wire.info("a")["state"] == "ready"
