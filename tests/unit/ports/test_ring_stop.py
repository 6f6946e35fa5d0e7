"""A ring that is being stopped stays away from workers, whatever comes in the midst of that."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.unit.ports.test_port_postcopy import BASE, PAGE, PAGES, Process
from vswitch.config.settings import PortSettings
from vswitch.dataplane.handover import HandOver
from vswitch.fastpath.main.engine import Engine
from vswitch.ports import postcopy as port_postcopy
from vswitch.ports.guest import VhostPort
from vswitch.ports.postcopy import PortPostcopy
from vswitch.relay.process import Relay
from vswitch.vhost_user.backend import Backend
from vswitch.vhost_user.datapath import RingSetup
from vswitch.vhost_user.protocol import Feature, MemRegion

UVA = 0x7F00_0000_0000
RECEIVE = 0


class Held(Engine):
    """Its worker passes no quiescent point while `held`."""

    held = False

    def passed(self, ticket: int) -> bool:
        return not self.held and super().passed(ticket)


class Bench:
    """A port with a frontend that answers misses when the test says so."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.region = MemRegion(0, PAGES * PAGE, UVA, 0)
        self.engine = Held()
        self.handover = HandOver(self.engine)
        self.fast = self.engine.add_port("vm")
        settings = PortSettings(name="vm", socket=Path("/nowhere"))
        self.port = VhostPort(
            settings, self.engine, self.fast, cast("Relay", None), self.handover,
            lambda _: 0, lambda *_: None,
        )  # fmt: skip
        self.answers: list[Callable[[int], None]] = []

        def ask(iova: int, access: int, answered: Callable[[int], None]) -> bool:
            self.answers.append(answered)
            return True

        frontend = SimpleNamespace(ask_translation=ask, signal_error=lambda _: None, peer_pid=None)
        self.port._backend = cast("Backend", frontend)

    async def stop(self, meanwhile: Callable[[], None]) -> int:
        """Stop the ring; where it stopped. `meanwhile` happens while workers are waited for."""
        self.engine.held = True
        stopping = asyncio.create_task(self.port.datapath.stop_rings([RECEIVE]))
        for _ in range(3):
            await asyncio.sleep(0)
        assert not stopping.done()
        meanwhile()
        assert not self.fast.rings[RECEIVE].published
        self.engine.held = False
        [base] = await stopping
        return base


@contextmanager
def bench() -> Iterator[Bench]:
    fd = os.memfd_create("guest")
    os.truncate(fd, PAGES * PAGE)
    try:
        yield Bench(fd)
    finally:
        os.close(fd)


def setup(uva: int) -> RingSetup:
    return RingSetup(16, uva, uva + 2 * PAGE, uva + PAGE, 7, Feature.VERSION_1, True, -1, -1)


def test_behind_an_iommu() -> None:
    """Its memory is taken away by an invalidation and comes back."""

    async def run(bench: Bench) -> None:
        port = bench.port.datapath
        await port.set_memory([bench.region], [bench.fd])
        port.use_iotlb(True)
        port.iotlb_update(0, PAGES * PAGE, UVA, 3)
        await port.start_ring(RECEIVE, setup(0))
        await port.iotlb_invalidate(0, PAGE)
        assert len(bench.answers) == 1
        base = await bench.stop(lambda: port.iotlb_update(0, PAGE, UVA, 3))
        assert base == 0

    with bench() as here:
        asyncio.run(run(here))


def test_in_postcopy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages come from the other machine at last."""
    monkeypatch.setattr(port_postcopy, "tells_pages", lambda _: False)

    async def run(bench: Bench) -> None:
        port = bench.port.datapath
        rings = port.rings
        postcopy = PortPostcopy(rings.by_index, bench.handover, rings.run_late, pytest.fail)
        process = Process()
        postcopy._process = process  # type: ignore[assignment]
        rings.postcopy = postcopy
        port.listen_postcopy()
        await port.set_memory([bench.region], [bench.fd])
        assert await port.fault_base(bench.region, bench.fd) == BASE
        port.allow_faults(True)
        await port.start_ring(RECEIVE, setup(UVA))
        assert process.touched == [0, 1, 2]
        base = await bench.stop(lambda: postcopy._found([BASE + page * PAGE for page in range(3)]))
        assert base == 7
        assert not bench.fast.rings[RECEIVE].started

    with bench() as here:
        asyncio.run(run(here))
