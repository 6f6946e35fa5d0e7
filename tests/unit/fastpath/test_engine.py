"""Guest memory, rings and the hand-over to workers, without any guest."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.fdb import GROWS_MAX
from vswitch.fastpath.main.mapping import Memory
from vswitch.fastpath.main.parts import RingError
from vswitch.fastpath.main.port import Port
from vswitch.fastpath.main.ring import Ring

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 16 * PAGE
UVA = 0x7F0000000000
DESC, AVAIL, USED = UVA, UVA + PAGE, UVA + 2 * PAGE


@contextmanager
def guest_file(size: int = SIZE) -> Iterator[int]:
    fd = os.memfd_create("guest")
    os.truncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)


def start(ring: Ring, memory: Memory, **other: object) -> int:
    settings = {
        "size": 16, "desc_uva": DESC, "used_uva": USED, "avail_uva": AVAIL, "hdr_len": 12,
        "event_idx": True, "indirect": True, "mergeable": True, "base": 0, "poll_only": False,
    }  # fmt: skip
    return ring.start(memory, **(settings | other))  # type: ignore[arg-type]


@contextmanager
def workers(engine: Engine) -> Iterator[None]:
    threads = [threading.Thread(target=worker.run) for worker in engine.workers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for worker in engine.workers:
            worker.stop()
        for thread in threads:
            thread.join()


def eventually(condition: object, *, within_s: float = 60.0) -> None:
    until = time.monotonic() + within_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, "did not happen"
        time.sleep(0.0005)  # between two looks


# Memory


@pytest.mark.parametrize(
    ("regions", "why"),
    [
        ([(0, 0, UVA, 0)], "region 0: size is 0"),
        ([(2**64 - PAGE, 2 * PAGE, UVA, 0)], "guest address 0xfffffffffffff000 plus size 0x2000"),
        ([(2**64 - PAGE, PAGE, UVA, 0)], "guest address 0xfffffffffffff000 plus size 0x1000 reach"),
        ([(0, PAGE, 2**64 - 1, 0)], "user address 0xffffffffffffffff plus size 0x1000 wraps"),
        ([(0, PAGE, UVA, 2**64 - 1)], "mmap offset 0xffffffffffffffff plus size 0x1000 wraps"),
        ([(0, SIZE + 1, UVA, 0)], "is beyond the end of its file"),
        ([(0, PAGE, UVA, SIZE)], "is beyond the end of its file"),
        ([(0, 2 * PAGE, UVA, 0), (PAGE, PAGE, UVA + SIZE, 0)], "region 1: guest address 0x1000 ov"),
        ([(0, 2 * PAGE, UVA, 0), (SIZE, PAGE, UVA + PAGE, 0)], "region 1: user address"),
        ([(n * PAGE, PAGE, UVA + n * PAGE, 0) for n in range(65)], "65 regions, the most is 64"),
    ],
)
def test_regions_that_cannot_be(regions: list[tuple[int, int, int, int]], why: str) -> None:
    with guest_file() as fd, pytest.raises(ValueError, match=why):
        Memory(regions, [fd] * len(regions))


def test_regions_and_descriptors_are_counted() -> None:
    with guest_file() as fd, pytest.raises(ValueError, match="1 regions came with 2 file"):
        Memory([(0, PAGE, UVA, 0)], [fd, fd])


@pytest.mark.parametrize("path", ["/dev/zero", "/tmp", "pipe"])
def test_only_files_are_memory(path: str) -> None:
    fds = list(os.pipe()) if path == "pipe" else [os.open(path, os.O_RDONLY)]
    try:
        with pytest.raises(ValueError, match="is not a file of shared memory"):
            Memory([(0, PAGE, UVA, 0)], fds[:1])
    finally:
        for fd in fds:
            os.close(fd)


def test_a_read_only_file_is_refused_by_the_kernel() -> None:
    memfd = os.memfd_create("guest")
    os.ftruncate(memfd, PAGE)
    fd = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    os.close(memfd)
    try:
        with pytest.raises(OSError, match="region 0: mmap of 0x1000 bytes: Permission denied"):
            Memory([(0, PAGE, UVA, 0)], [fd])
    finally:
        os.close(fd)


def test_mapping_and_unmapping_leave_nothing() -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:guest")

    before = mappings()
    with guest_file() as fd:
        memory = Memory([(0, PAGE, UVA, 0), (PAGE, PAGE, UVA + PAGE, 3 * PAGE + 8)], [fd, fd])
        assert mappings() > before
        memory.close()
        assert mappings() == before
        again = Memory([(0, PAGE, UVA, 0)], [fd])
        del again
        with pytest.raises(ValueError, match="region 1"):
            Memory([(0, PAGE, UVA, 0), (0, PAGE, UVA, 0)], [fd, fd])
    assert mappings() == before


def test_memory_grows_and_shrinks_and_what_stays_lies_where_it_lay() -> None:
    first, second = (0, PAGE, UVA, 0), (PAGE, PAGE, UVA + PAGE, PAGE)

    def mappings() -> list[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return [line.split()[0] for line in lines if "memfd:guest" in line]

    gc.collect()  # what earlier tests left is not to go in the midst of this one
    before = mappings()
    with guest_file() as fd, guest_file() as other:
        small = Memory([first], [fd])
        alone = mappings()
        large = small.with_region(second, other)
        assert (small.regions, large.regions) == ([first], [first, second])
        assert set(alone) < set(mappings())
        small.close()
        assert set(alone) < set(mappings()), "the larger memory has it still"
        with pytest.raises(ValueError, match="region 2: guest address 0x1000 overlaps region 1"):
            large.with_region((PAGE, PAGE, UVA + SIZE, 0), fd)
        with pytest.raises(ValueError, match="no region with guest address 0x1000, size 0x1000 an"):
            large.without_region(PAGE, PAGE, UVA)
        rest = large.without_region(0, PAGE, UVA)
        assert rest.regions == [second]
        del large
        assert not set(alone) & set(mappings())
        rest.close()
        assert mappings() == before


def test_all_slots_in_use() -> None:
    with guest_file() as fd:
        rows = [(n * PAGE, PAGE, UVA + n * PAGE, 0) for n in range(64)]
        memory = Memory(rows, [fd] * 64)
        with pytest.raises(ValueError, match="all 64 memory slots are in use"):
            memory.with_region((64 * PAGE, PAGE, UVA + 64 * PAGE, 0), fd)
        # One in the middle makes room again.
        less = memory.without_region(5 * PAGE, PAGE, UVA + 5 * PAGE)
        assert len(less.with_region((64 * PAGE, PAGE, UVA + 64 * PAGE, 0), fd).regions) == 64


def test_a_running_ring_keeps_its_own_memory() -> None:
    with guest_file() as fd:
        port = Engine().add_port("p")
        ring = Ring(port, 1)
        memory = Memory([(0, SIZE, UVA, 0)], [fd])
        start(ring, memory)
        larger = memory.with_region((SIZE, PAGE, UVA + SIZE, 0), fd)
        ring.use_memory(larger)
        elsewhere = Memory([(0, SIZE, UVA, 0)], [fd])
        for other in (elsewhere, larger.without_region(0, SIZE, UVA)):
            with pytest.raises(RingError, match="the memory of the running ring at 0x7f000000"):
                ring.use_memory(other)
        assert ring.started


# Rings


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"size": 0}, "size 0 is not a power of two"),
        ({"size": 24}, "size 24 is not a power of two"),
        ({"size": 65536}, "size 65536 is not a power of two"),
        ({"desc_uva": UVA + 8}, "descriptor table address 0x7f0000000008 is not aligned to 16"),
        ({"avail_uva": AVAIL + 1}, "avail ring address 0x7f0000001001 is not aligned to 2"),
        ({"used_uva": USED + 2}, "used ring address 0x7f0000002002 is not aligned to 4"),
        ({"desc_uva": 0}, r"descriptor table address 0x0 \(size 16\) is outside the guest memory"),
        ({"desc_uva": UVA + SIZE - 240}, "descriptor table address"),
        ({"avail_uva": UVA + SIZE - 36}, "avail ring address"),
        ({"used_uva": UVA + SIZE - 132}, "used ring address"),
        ({"used_uva": 2**64 - 16}, "used ring address"),
    ],
)
def test_rings_that_cannot_be(other: dict[str, int], why: str) -> None:
    with guest_file() as fd:
        memory = Memory([(0, SIZE, UVA, 0)], [fd])
        ring = Ring(Engine().add_port("p"), 0)
        with pytest.raises(RingError, match=why):
            start(ring, memory, **other)
        assert not ring.started
        assert start(ring, memory) == 0


def test_a_ring_that_just_fits() -> None:
    with guest_file() as fd:
        memory = Memory([(0, SIZE, UVA, 0)], [fd])
        port = Engine().add_port("p")
        end = UVA + SIZE
        assert start(Ring(port, 0), memory, desc_uva=end - 256) == 0
        assert start(Ring(port, 2), memory, avail_uva=end - 38) == 0
        # 6 + 8 * 16 bytes; 4-byte alignment leaves two over.
        assert start(Ring(port, 4), memory, used_uva=end - 136) == 0


def test_a_ring_may_not_lie_across_regions() -> None:
    with guest_file() as fd:
        memory = Memory([(0, PAGE, UVA, 0), (PAGE, SIZE - PAGE, UVA + PAGE, PAGE)], [fd, fd])
        with pytest.raises(RingError, match="descriptor table address"):
            start(Ring(Engine().add_port("p"), 0), memory, desc_uva=UVA + PAGE - 128)


def test_the_used_ring_says_where_to_go_on() -> None:
    with guest_file() as fd:
        os.pwrite(fd, (65534).to_bytes(2, "little"), 2 * PAGE + 2)
        memory = Memory([(0, SIZE, UVA, 0)], [fd])
        ring = Ring(Engine().add_port("p"), 1)
        assert start(ring, memory, base=5) == 65534
        assert ring.base == 65534


def test_started_twice() -> None:
    with guest_file() as fd:
        memory = Memory([(0, SIZE, UVA, 0)], [fd])
        ring = Ring(Engine().add_port("p"), 0)
        start(ring, memory)
        with pytest.raises(RingError, match="running already"):
            start(ring, memory)


def test_vring_indices_end() -> None:
    port = Engine().add_port("p")
    assert Ring(port, 255).is_transmitq
    with pytest.raises(ValueError, match="vring index 256"):
        Ring(port, 256)


# Engine


def settle(engine: Engine) -> None:
    ticket = engine.publish()
    eventually(lambda: engine.wait(ticket))


def test_a_stopped_worker_holds_nobody_up() -> None:
    engine = Engine()
    assert engine.passed(engine.publish())


@pytest.mark.parametrize("idle_ns", [0, 50_000, None])
@pytest.mark.parametrize("count", [1, 2])
def test_publishing_passes_sleeping_and_busy_workers(idle_ns: int | None, count: int) -> None:
    engine = Engine(workers=count, idle_ns=idle_ns)
    with workers(engine):
        for n in range(200):
            port = engine.add_port(f"p{n}")
            settle(engine)
            engine.remove_port(port)
            settle(engine)
            engine.forget(port)
        assert engine.ports == {}


def test_idle_workers_sleep_and_busy_polling_does_not() -> None:
    sleepy, awake = Engine(idle_ns=1000), Engine(idle_ns=None)
    with workers(sleepy), workers(awake):
        eventually(lambda: sleepy.workers[0].stats()["state"] == "sleeping")
        loops = awake.workers[0].stats()["loops"]
        eventually(lambda: awake.workers[0].stats()["loops"] > loops + 1000)
        assert awake.workers[0].stats()["sleeps"] == 0
        still = sleepy.workers[0].stats()["loops"]
        settle(sleepy)
        eventually(lambda: sleepy.workers[0].stats()["loops"] > still)


def test_port_numbers_come_back_and_end() -> None:
    engine = Engine()
    ports = [engine.add_port(f"p{n}") for n in range(4096)]
    assert [port.id for port in ports] == list(range(4096))
    with pytest.raises(OSError, match="all 4096 ports are in use"):
        engine.add_port("one more")
    engine.remove_port(ports[7])
    settle(engine)
    with pytest.raises(OSError, match="all 4096"):
        engine.add_port("too early")
    engine.forget(ports[7])
    assert engine.add_port("again").id == 7


def test_a_new_port_begins_with_counters_at_zero() -> None:
    engine = Engine()
    with workers(engine):
        port = engine.add_port("p")
        settle(engine)
        engine.inject(port, frame())
        eventually(lambda: engine.stats(port)["ingress_frames"] == 1)
        remove(engine, port)
        again = engine.add_port("q")
        assert again.id == port.id
        assert engine.stats(again)["ingress_frames"] == 0


def frame(source: str = "52:54:00:00:00:01") -> bytes:
    return (b"\xff" * 6 + bytes.fromhex(source.replace(":", "")) + b"\x08\x06").ljust(60, b"\0")


def remove(engine: Engine, port: Port) -> None:
    engine.remove_port(port)
    settle(engine)
    engine.forget(port)


def test_injected_frames_are_learned_from_and_counted() -> None:
    engine = Engine()
    with workers(engine):
        port = engine.add_port("p")
        settle(engine)
        for n in range(100):
            engine.inject(port, frame(f"52:54:00:00:01:{n:02x}"))
        eventually(lambda: engine.stats(port)["ingress_frames"] == 100)
        # Nobody else is there.
        assert engine.stats(port)["drops"] == {"no-destination": 100}
        assert engine.stats(port)["ingress_bytes"] == 6000
        assert len(engine.fdb) == 100
        with pytest.raises(ValueError, match="at most 64"):
            engine.inject(port, b"\0" * 65)


def test_events_of_learning_arrive_when_asked_for() -> None:
    engine = Engine()
    a, b = engine.add_port("a"), engine.add_port("b")
    with workers(engine):
        settle(engine)
        engine.inject(a, frame())
        eventually(lambda: engine.stats(a)["ingress_frames"] == 1)
        assert engine.take_events() == []
        engine.report_macs = True
        engine.arm_events()
        engine.inject(b, frame())
        eventually(lambda: engine.stats(b)["ingress_frames"] == 1)
        os.eventfd_read(engine.event_fd)
        key = int.from_bytes(bytes.fromhex("525400000001"), "little")
        assert engine.take_events() == [("mac-moved", b.id, a.id, key)]
        engine.inject(b, frame("52:54:00:00:00:02"))
        eventually(lambda: engine.stats(b)["ingress_frames"] == 2)
        assert [event[0] for event in engine.take_events()] == ["mac-learned"]


def test_an_event_flood_is_bounded_and_counted() -> None:
    engine = Engine(fdb_size=2 * GROWS_MAX)  # a table that has room from the start
    engine.report_macs = True
    port = engine.add_port("p")
    with workers(engine):
        settle(engine)
        for n in range(1500):
            engine.inject(port, frame(f"52:54:00:00:{n // 256:02x}:{n % 256:02x}"))
        eventually(lambda: engine.stats(port)["ingress_frames"] == 1500)
    some = engine.take_events(100)
    assert len(some) == 100
    assert engine.arm_events(), "there are more, for another turn"
    rest = engine.take_events()
    assert len(some + rest) == 1024 - 64, "the rest is for faults"
    keys = [key for *_, key in some + rest]
    assert len(set(keys)) == len(keys)
    assert not engine.arm_events()
    assert engine.workers[0].stats()["events_lost"] == 1500 - (1024 - 64)


def test_worker_counts() -> None:
    with pytest.raises(ValueError, match="0 workers"):
        Engine(workers=0)
    with pytest.raises(ValueError, match="65 workers"):
        Engine(workers=65)


# Notifications


@pytest.mark.parametrize("aio", [True, False])
def test_signal_never_waits(aio: bool) -> None:
    """A full counter that blocks on write(2) is left as it is, or one more."""
    engine = Engine(aio=aio)
    assert engine.aio_error == 0
    assert engine.workers[0].stats()["notify"] == ("aio" if aio else "write")
    fd = os.eventfd(0)
    try:
        for _ in range(100):
            engine.signal(fd)
        assert os.eventfd_read(fd) == 100
        os.eventfd_write(fd, 2**64 - 2)
        os.set_blocking(fd, True)
        for _ in range(100):
            engine.signal(fd)
        assert os.eventfd_read(fd) >= 2**64 - 2
    finally:
        os.close(fd)
    engine.signal(fd)  # closed: nobody is there to be told
