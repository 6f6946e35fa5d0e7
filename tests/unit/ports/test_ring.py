"""One ring's states: what may follow what, what workers see in each, and what outlives a stop."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest

from tests.support.handover import AtOnce
from vswitch.config.settings import PortSettings
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.mapping import watch_lost_memory
from vswitch.ports.datapath import PortDatapath
from vswitch.ports.health import PortHealth
from vswitch.ports.ring import KEPT, TRANSITIONS, GuestRing, RingState
from vswitch.vhost_user.datapath import DatapathError, RingSetup
from vswitch.vhost_user.frontend import Frontend
from vswitch.vhost_user.protocol import Feature, MemRegion

PAGE = 4096
UVA = 0x7F00_0000_0000
TRANSMIT, OTHER = 1, 3

Result = TypeVar("Result")


class Bench:
    """A port whose frontend has handed over 16 pages, with a driver that kicks by `kick`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = Engine()
        self.fast = self.engine.add_port("vm")
        self.events: list[tuple[str, str | None]] = []
        self.health = PortHealth("vm", lambda name, reason: self.events.append((name, reason)))
        frontend = cast("Frontend", SimpleNamespace(peer_pid=None, signal_error=lambda _: None))
        self.datapath = PortDatapath(
            PortSettings(name="vm", socket=Path("/nowhere")), self.engine, self.fast,
            AtOnce(self.engine), lambda _: 0, self.health, lambda: frontend,
            lambda *_: "", lambda: None,
        )  # fmt: skip
        self.rings = self.datapath.rings
        self.fd = os.memfd_create("guest")
        os.truncate(self.fd, 16 * PAGE)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.do(self.datapath.set_memory([MemRegion(0, 16 * PAGE, UVA, 0)], [self.fd]))

    def do(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(coroutine)

    def setup(self, **changes: object) -> RingSetup:
        plain = RingSetup(
            16, UVA, UVA + 2 * PAGE, UVA + PAGE, 7, Feature.VERSION_1, True, self.kick, -1
        )
        return replace(plain, **changes)  # type: ignore[arg-type]

    def start(self, **changes: object) -> GuestRing:
        self.do(self.rings.start(TRANSMIT, self.setup(**changes)))
        return self.rings.by_index[TRANSMIT]

    def break_it(self) -> str:
        """The driver offers more than its ring has, and a worker finds that; the fault's text."""
        os.pwrite(self.fd, (1000).to_bytes(2, "little"), PAGE + 2)
        self.engine.publish()
        self.engine.workers[0].turn()
        self.rings.look_for_fault(TRANSMIT)
        assert self.health.fault is not None
        return self.health.fault


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.do(bench.datapath.stop_rings(
        [i for i, ring in bench.rings.by_index.items() if ring.state is not RingState.STOPPED]
    ))  # fmt: skip
    bench.do(bench.datapath.set_memory([], []))
    bench.loop.close()
    os.close(bench.kick)
    os.close(bench.fd)


def test_every_state_can_be_reached_and_stopped() -> None:
    assert set(TRANSITIONS) == set(RingState)
    for state in RingState:
        if state is not RingState.STOPPED:
            assert any(state in ends for start, ends in TRANSITIONS.items() if start is not state)
        assert state is RingState.STOPPED or RingState.STOPPING in TRANSITIONS[state]


def test_the_table_in_the_docs_is_the_one_in_the_code() -> None:
    text = (Path(__file__).parents[3] / "docs/architecture.md").read_text()
    section = text.partition("## The states of a ring")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| .+ \| ([\w, ]+) \|$", section, re.MULTILINE)[1:]
    assert {
        RingState(state): {RingState(end) for end in ends.split(", ")} for state, ends in rows
    } == (TRANSITIONS)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (start, end)
        for start, end in itertools.product(RingState, RingState)
        if end not in TRANSITIONS[start]
    ],
    ids=lambda state: state.value,
)
def test_what_the_table_lacks_is_refused(start: RingState, end: RingState) -> None:
    ring = GuestRing(Engine().add_port("vm"), TRANSMIT)
    ring.state = start
    with pytest.raises(AssertionError, match="transmitq0 from"):
        ring.become(end)
    assert ring.state is start


def test_workers_see_a_ring_that_runs_and_no_other(bench: Bench) -> None:
    ring = bench.start()
    for kept in (RingState.PARKED, RingState.UNTRANSLATED):
        assert ring.fast.published
        ring.become(kept)
        assert kept in KEPT
        assert not ring.fast.published
        assert ring.is_started, "the frontend knows nothing of it"
        ring.become(RingState.RUNNING)
    ring.become(RingState.STOPPING)
    assert not ring.fast.published


def test_a_stop_is_where_it_is_however_it_was_kept(bench: Bench) -> None:
    """A ring that never ran goes on from where its driver has it."""
    assert bench.start(quiet=True, enabled=False, base=9).state is RingState.QUIET
    assert bench.do(bench.rings.stop([TRANSMIT])) == [9]
    ring = bench.start()
    assert ring.state is RingState.RUNNING
    # A split ring goes on from its used ring, which has nothing yet.
    assert bench.do(bench.rings.stop([TRANSMIT])) == [0]


def test_a_ring_whose_start_failed_can_be_stopped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever went wrong in it: its frontend's other rings have to stop, too."""

    def fail(*_: object) -> str:
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(bench.rings, "_run", fail)
    with pytest.raises(RuntimeError):
        bench.start(base=9)
    assert bench.do(bench.rings.stop([TRANSMIT])) == [9]
    assert bench.rings.by_index[TRANSMIT].state is RingState.STOPPED


def test_the_text_of_a_fault_outlives_a_stop(bench: Bench) -> None:
    """QEMU stops a device that reports an error; its user looks some time later."""
    ring = bench.start()
    fault = bench.break_it()
    assert ring.state is RingState.FAULT
    assert "avail" in fault
    bench.do(bench.rings.stop([TRANSMIT]))
    assert bench.health.fault == fault
    os.pwrite(bench.fd, bytes(2), PAGE + 2)
    assert bench.start().state is RingState.RUNNING
    assert bench.health.fault is None


def test_a_ring_that_is_woken_after_a_fault_is_not_at_fault(bench: Bench) -> None:
    bench.start()
    bench.break_it()
    bench.do(bench.rings.stop([TRANSMIT]))
    os.pwrite(bench.fd, bytes(2), PAGE + 2)
    ring = bench.start(quiet=True, enabled=False)
    assert bench.health.fault is not None
    bench.do(bench.rings.enable(TRANSMIT, True))
    assert [ring.fault, bench.health.fault] == [None, None]
    assert ring.fast.published


@pytest.mark.parametrize("state", [RingState.RUNNING, RingState.PARKED, RingState.FAULT])
def test_memory_that_is_taken_away(bench: Bench, state: RingState) -> None:
    ring = bench.start()
    if state is RingState.FAULT:
        bench.break_it()
    elif state is RingState.PARKED:
        ring.become(state)
    lose(bench)
    assert ring.state is RingState.LOST
    bench.do(bench.rings.enable(TRANSMIT, True))
    assert not ring.fast.published
    assert bench.health.fault is not None
    assert "truncated its memory file" in bench.health.fault
    with pytest.raises(DatapathError, match="truncated"):
        bench.do(bench.rings.start(0, bench.setup()))


def test_memory_that_is_taken_away_under_a_quiet_ring(bench: Bench) -> None:
    ring = bench.start(quiet=True, enabled=False)
    lose(bench)
    with pytest.raises(DatapathError, match="its memory is gone"):
        bench.do(bench.rings.enable(TRANSMIT, True))
    assert ring.state is RingState.QUIET


def test_a_link_that_is_down_is_no_matter_of_states(bench: Bench) -> None:
    ring = bench.start()
    bench.do(bench.rings.set_link(False))
    assert (ring.state, ring.fast.enabled, ring.enabled) == (RingState.RUNNING, False, True)
    bench.do(bench.rings.set_link(True))
    assert ring.fast.enabled


def lose(bench: Bench) -> None:
    """The frontend truncates the file, and a worker touches what is not there any more."""
    watch_lost_memory()
    bench.do(bench.rings.start(OTHER, bench.setup(kick_fd=-1)))
    os.truncate(bench.fd, 0)
    bench.engine.workers[0].turn()
    bench.rings.check_memory()
