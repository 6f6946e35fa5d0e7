"""Several workers, and the ways a worker can wait: the guests see no difference."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.frames import BROADCAST, frame, frames, mac
from tests.support.running import Wire, teach
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.load.load import Flow, FlowResult, Load

A, B, C, D = mac(1), mac(2), mac(3), mac(4)


def flow(
    sender: SoftwareGuest, receiver: SoftwareGuest | None, dst: str, src: str, window: int = 0
) -> Flow:
    return Flow(
        sender.transmitqs[0],
        None if receiver is None else receiver.receiveqs[0],
        frames(dst, src, [60, 200, 1514]),
        window=window,
        verify=True,
        write_off_s=60.0,
    )


def complete(result: FlowResult, count: int) -> None:
    assert (result.sent, result.received) == (count, count)
    assert (result.lost, result.misordered, result.corrupt, result.written_off) == (0,) * 4


@pytest.mark.parametrize("workers", [2, 3])
def test_a_worker_for_each_direction(start: Callable[..., Wire], workers: int) -> None:
    wire = start(workers=workers)
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    both = [flow(a, b, B, A, window=100), flow(b, a, A, B, window=100)]
    for result in Load(both).run(60.0, frames=50_000, settle_s=60.0, quiet_s=30.0):
        complete(result, 50_000)
    shares = [worker["rings"] for worker in wire.client.workers()]
    assert len(shares) == workers
    assert sum(shares) == 2
    assert max(shares) == 1
    assert wire.drops("a") == wire.drops("b") == {}


def test_workers_share_a_receiveq(start: Callable[..., Wire]) -> None:
    """Three senders to one guest: two workers write its only receiveq, and every frame counts."""
    wire = start(workers=2)
    a, b, c, d = (wire.guest(name, n) for n, name in enumerate("abcd", 1))
    teach(a, b, c, d)
    senders = [flow(g, None, D, src) for g, src in ((a, A), (b, B), (c, C))]
    sink = Flow(None, d.receiveqs[0], [bytes(60)])
    results = Load([*senders, sink]).run(60.0, frames=40_000, settle_s=5.0)
    for guest in (a, b, c):
        guest.drain()
    rest = 0
    while got := len(d.poll_frames(256)):
        rest += got
    assert [result.sent for result in results[:3]] == [40_000] * 3
    stats = wire.stats("d")
    # teach() sent one and brought three.
    assert stats["egress_frames"] == results[3].received + rest + 3
    assert set(stats["drops"]) <= {"no-buffer"}
    assert results[3].received + rest + stats["drops"].get("no-buffer", 0) == 120_000


def test_ports_come_and_go_with_several_workers(start: Callable[..., Wire]) -> None:
    wire = start(workers=2)
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    for n in range(10):
        c = wire.guest("c", 3)
        teach(a, b, c)
        for sender, receiver, dst, src in ((a, c, C, A), (c, b, B, C), (b, a, A, B)):
            sent = frames(dst, src, [60, 1514, 300], tag=n)
            sender.send(sent)
            assert receiver.recv(3) == sent
        wire.remove("c")


@pytest.mark.parametrize("polling", ["sleep", "adaptive"])
def test_sleeping_workers_wake(start: Callable[..., Wire], polling: str) -> None:
    """Whenever a worker sleeps, the next frame wakes it: no kick is lost, with EVENT_IDX or not."""
    wire = start(polling=polling, idle_us=0)
    a, b = wire.guest("a", 1), wire.guest("b", 2, features=0)
    teach(a, b)

    def slept_a_hundred_times() -> bool:
        for n in range(500):
            sent = frame(B, A, tag=n)
            a.send([sent])
            assert b.recv(1) == [sent]
            back = frame(A, B, tag=n)
            b.send([back])
            assert a.recv(1) == [back]
        (worker,) = wire.client.workers()
        return worker["sleeps"] > 100

    # Nearly every time, unless this thread is faster than a worker that waits for a CPU.
    wire.wait_until(slept_a_hundred_times, "the worker sleeps between frames")
    wire.wait_until(
        lambda: wire.client.workers()[0]["state"] == "sleeping", "the worker goes to sleep"
    )


def test_idle_switch_costs_nothing(start: Callable[..., Wire]) -> None:
    """Its threads are woken a few times a second, with guests connected and their rings armed.

    And none spins. What that comes to in CPU time is the machine's, and measured in benchmarks/.
    """
    wire = start()
    guests = [wire.guest(f"g{n}", n) for n in range(1, 6)]
    teach(*guests)
    wire.wait_until(
        lambda: wire.client.workers()[0]["state"] == "sleeping", "the worker goes to sleep"
    )

    def cost() -> tuple[int, int]:
        """How often its threads have slept, and for how many nanoseconds they have run."""
        woken = ran = 0
        for thread in Path(f"/proc/{wire.switch.process.pid}/task").iterdir():
            status = (thread / "status").read_text()
            woken += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
            ran += int((thread / "schedstat").read_text().split()[0])
        return woken, ran

    before, begun = cost(), time.monotonic()
    time.sleep(2.0)  # the span that the cost is measured over, longer where the machine is busy
    after, elapsed_s = cost(), time.monotonic() - begun
    assert after[0] - before[0] < 10 * elapsed_s
    # One that spins would take its share of a CPU, a fifth or more.
    assert after[1] - before[1] < 0.1e9 * elapsed_s


def test_busy_polling_needs_no_kicks(start: Callable[..., Wire]) -> None:
    wire = start(polling="busy")
    a, b = wire.guest("a", 1), wire.guest("b", 2, features=0)
    teach(a, b)
    before = a.transmitqs[0].ring.kicks, b.transmitqs[0].ring.kicks
    for n in range(100):
        a.send([frame(BROADCAST, A, tag=n)])
        assert b.recv(1) == [frame(BROADCAST, A, tag=n)]
        b.send([frame(A, B, tag=n)])
        assert a.recv(1) == [frame(A, B, tag=n)]
    assert (a.transmitqs[0].ring.kicks, b.transmitqs[0].ring.kicks) == before
    assert wire.client.workers()[0]["sleeps"] == 0
