"""Every write of the switch into a migrating guest's memory is logged, and nothing else is."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.conformance.dirtylog import PAGE_LEN, DirtyLog
from tests.conformance.scattering import scatter
from tests.support.frames import frame, frames, mac
from tests.support.running import Wire, teach, translated
from vswitch.lab.guest import DEFAULT_FEATURES, Region
from vswitch.lab.guest.net_driver import AnyQueue
from vswitch.lab.guest.raw import DESC_F_WRITE, RawDesc
from vswitch.vhost_user.protocol import Feature

A, B = mac(1), mac(2)
HIGH = 1 << 32
LOW = Region(0, 1 << 23, 0x7F00_0000_0000)
REGIONS = [LOW, Region(HIGH, 1 << 23, 0x7E00_0000_0000, 5 * PAGE_LEN, file=1)]


class Migrating:
    """A guest `b` whose memory is watched, and `a` that talks to it."""

    def __init__(self, wire: Wire, *, scattered: bool = False, **options: object) -> None:
        self.wire = wire
        self.a = wire.guest("a", 1)
        self.b = wire.guest("b", 2, regions=REGIONS, **options)  # type: ignore[arg-type]
        self.b.auto_post = False
        self.scattered = scattered
        if options.get("iommu"):
            translated(self.b)
        teach(self.a, self.b)
        if scattered:
            place = LOW.size // 2
            for queue in self.b.queues():
                place = scatter(self.b, queue, place)
        self.logs: list[DirtyLog] = []

    def log(self, **options: int) -> DirtyLog:
        self.logs.append(DirtyLog(self.b, **options))
        return self.logs[-1]

    def memory(self) -> dict[int, bytes]:
        """Every page by its number, which is that of the page whose place it has."""
        found = {}
        for region in self.b.memory.regions:
            data = self.b.memory.read(region.gpa, region.size)
            for at in range(0, len(data), PAGE_LEN):
                found[self.number(region.gpa + at)] = data[at : at + PAGE_LEN]
        return found

    def number(self, address: int) -> int:
        """Of the page that an address of the driver's is in, as the log has it."""
        return (self.b.iommu.place(address) if self.scattered else address) // PAGE_LEN

    def settle(self) -> None:
        """All that was on its way is there, and the worker has gone to sleep."""
        self.a.drain()
        self.b.drain()
        self.wire.wait_until(
            lambda: self.wire.client.workers()[0]["state"] == "sleeping", "the worker sleeps"
        )
        self.b.frontend.sync()

    def close(self) -> None:
        for log in self.logs:
            log.close()


@pytest.fixture(
    params=[
        "plain",
        "split",
        "no event_idx",
        "not mergeable",
        "in pieces",
        "far apart",
        "packed",
        "plain packed",
        "IOMMU",
        "packed IOMMU",
        "scattered IOMMU",
        "scattered packed IOMMU",
    ]
)
def migrating(wire: Wire, request: pytest.FixtureRequest) -> Iterator[Migrating]:
    options: dict[str, dict[str, object]] = {
        "plain": {"indirect": False},
        "IOMMU": {"iommu": True, "indirect": False},
        "packed IOMMU": {"iommu": True, "features": DEFAULT_FEATURES | Feature.RING_PACKED},
        "scattered IOMMU": {"iommu": True, "scattered": True, "queue_size": 1024},
        "scattered packed IOMMU": {
            "iommu": True,
            "scattered": True,
            "queue_size": 1024,
            "features": DEFAULT_FEATURES | Feature.RING_PACKED,
        },
        "split": {},
        "plain packed": {"indirect": False, "features": DEFAULT_FEATURES | Feature.RING_PACKED},
        "no event_idx": {"features": DEFAULT_FEATURES & ~Feature.RING_EVENT_IDX},
        "not mergeable": {"features": DEFAULT_FEATURES & ~Feature.MRG_RXBUF},
        "in pieces": {"rx_cuts": (0, 100, 700), "indirect": False},
        "packed": {"features": DEFAULT_FEATURES | Feature.RING_PACKED},
        "far apart": {"slot_offset": 60, "rx_buf_len": 600, "queue_size": 1024},
    }
    found = Migrating(wire, **options[request.param])  # type: ignore[arg-type]
    try:
        yield found
    finally:
        found.close()


def ring_pages(migrating: Migrating, queue: AnyQueue) -> set[int]:
    """The pages of a ring of the guest's that the device may write."""
    layout = queue.layout
    if queue.ring.packed:
        places = [(layout.desc_gpa, 16 * layout.size), (layout.used_gpa, 4)]
    else:
        places = [(layout.used_gpa, 6 + 8 * layout.size)]
    return {
        migrating.number(page * PAGE_LEN)
        for gpa, length in places
        for page in range(gpa // PAGE_LEN, (gpa + length - 1) // PAGE_LEN + 1)
    }


def changed(before: dict[int, bytes], after: dict[int, bytes]) -> set[int]:
    return {page for page, data in after.items() if before[page] != data}


def test_what_changed_is_what_is_marked(migrating: Migrating) -> None:
    """The guest itself writes nothing meanwhile, so every difference is the switch's."""
    a, b, log = migrating.a, migrating.b, migrating.log(offset=PAGE_LEN + 24)
    migrating.settle()
    log.start()
    before = migrating.memory()
    sent = frames(B, A, [60, 1514, 700, 61, 1000] * 8)
    a.send(sent)
    migrating.settle()
    after, marked = migrating.memory(), log.pages()
    assert changed(before, after) <= marked
    # A page may be marked for being written with what was there, but not much more than that.
    used = ring_pages(migrating, b.receiveqs[0]) | ring_pages(migrating, b.transmitqs[0])
    assert len(marked - changed(before, after) - used) <= len(sent)
    assert log.outside() == bytes(PAGE_LEN + 24)
    assert b.recv(len(sent)) == sent


def test_giving_back_what_was_sent_marks_the_used_ring(migrating: Migrating) -> None:
    b, log = migrating.b, migrating.log()
    migrating.settle()
    log.start()
    log.clear()
    b.send(frames(A, B, [60] * 30))
    migrating.settle()
    assert migrating.a.recv(30)
    pages = ring_pages(migrating, b.transmitqs[0])
    if b.memory.gpa_offset:
        # Behind an IOMMU the switch asks for kicks when more receive buffers come.
        pages |= ring_pages(migrating, b.receiveqs[0])
    first = b.transmitqs[0].layout
    written = first.desc_gpa if b.transmitqs[0].ring.packed else first.used_gpa
    assert migrating.number(written) in log.pages()
    assert log.pages() <= pages


def test_logging_comes_and_goes_under_load(migrating: Migrating) -> None:
    """No frame is lost or changed, and a page that is cleared in time is marked again."""
    a, b, log = migrating.a, migrating.b, migrating.log()
    b.auto_post = True
    b.poll_frames(0)
    sent = frames(B, A, [60, 1514, 700] * 5)
    back = frames(A, B, [60, 1514, 700] * 5)
    for _ in range(20):
        a.send(sent)
        log.start()
        b.send(back)
        assert b.recv(len(sent)) == sent
        assert a.recv(len(back)) == back
        migrating.settle()
        log.clear()
        a.send(sent)
        assert b.recv(len(sent)) == sent
        assert ring_pages(migrating, b.receiveqs[0]) & log.pages()
        a.send(sent)
        log.stop()
        assert b.recv(len(sent)) == sent
        migrating.settle()
        log.clear()
        a.send(sent)
        assert b.recv(len(sent)) == sent
        migrating.settle()
        assert log.pages() == set()
    assert migrating.wire.drops("a") == {}
    assert migrating.wire.drops("b") == {}


def test_another_log_takes_the_place_of_the_first(migrating: Migrating) -> None:
    """QEMU sends a larger one when memory is plugged during a migration."""
    a, b = migrating.a, migrating.b
    first, second = migrating.log(), migrating.log()
    first.start()
    migrating.settle()
    b.frontend.set_log_base(second.fd, second.size)
    first.clear()
    a.send(frames(B, A, [60] * 10))
    migrating.settle()
    assert first.pages() == set()
    assert ring_pages(migrating, b.receiveqs[0]) & second.pages()
    assert len(b.recv(10)) == 10


def test_a_log_that_is_too_short(migrating: Migrating) -> None:
    """What lies beyond it is not logged, and nothing else happens."""
    a, b = migrating.a, migrating.b
    log = migrating.log(size=1)
    log.start()
    sent = frames(B, A, [1514] * 20)
    a.send(sent)
    assert b.recv(20) == sent
    migrating.settle()
    assert log.pages() <= set(range(8))


def test_used_rings_logged_at_the_end_of_the_world(migrating: Migrating) -> None:
    a, b, log = migrating.a, migrating.b, migrating.log()
    log.start()
    for queue in b.queues():
        for gpa in ((1 << 64) - 1, (1 << 64) - 8, 1 << 63, log.size * 8 * PAGE_LEN - 4):
            address = b.vring_addr(queue)._replace(flags=1, log_gpa=gpa)
            b.frontend.set_vring_addr(address)
            sent = frames(B, A, [200] * 3)
            a.send(sent)
            b.send(frames(A, B, [200] * 3))
            assert b.recv(3) == sent
            assert len(a.recv(3)) == 3
    migrating.settle()


def test_a_log_that_is_cut_off_under_us(migrating: Migrating) -> None:
    a, b, log = migrating.a, migrating.b, migrating.log()
    log.start()
    os.ftruncate(log.fd, 0)
    sent = frames(B, A, [200] * 10)
    a.send(sent)
    assert b.recv(10) == sent
    assert migrating.wire.info("b")["state"] == "ready"


def test_a_buffer_across_regions_is_marked_on_both_sides(wire: Wire) -> None:
    regions = [LOW, Region(LOW.size, 1 << 20, 0x7E00_0000_0000, file=1)]
    a, b = wire.guest("a", 1), wire.guest("b", 2, regions=regions)
    b.auto_post = False
    teach(a, b)
    log = DirtyLog(b)
    try:
        b.stop_rings()
        b.build_rings()
        b.start_rings()
        raw = b.receiveqs[0].raw
        # The rings are fresh: everything that was posted is taken first, then the odd one.
        at = LOW.size - 700
        raw.offer(RawDesc(at, 4096, DESC_F_WRITE), first=raw.layout.size - 1)
        posted = raw.avail_idx
        log.start()
        sent = frame(B, A, 1514)
        for _ in range(posted):
            a.send([sent])
        a.drain()
        assert b.memory.read(at + 12, len(sent)) == sent
        assert {at // PAGE_LEN, LOW.size // PAGE_LEN} <= log.pages()
    finally:
        log.close()
