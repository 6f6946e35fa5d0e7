"""A guest is copied as QEMU does it while frames come at full rate: the copy is exact."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.conformance.dirtylog import PAGE_LEN, DirtyLog
from tests.support.frames import frames, mac
from tests.support.ippackets import Packet
from tests.support.running import DEADLINE_S, Wire, loading, teach, used_on
from vswitch.lab.guest import DEFAULT_FEATURES, Region, SoftwareGuest
from vswitch.lab.guest.net_driver import AnyQueue
from vswitch.lab.guest.options import DEFAULT_PROTOCOL_FEATURES
from vswitch.lab.guest.packets import parse_mac
from vswitch.lab.load.load import Flow, Load
from vswitch.ports import offloads
from vswitch.vhost_user.protocol import Feature, ProtocolFeature

A, B, C = mac(1), mac(2), mac(3)
SIZES = [60, 61, 130, 700, 1514, 4100, 9014]
OFFLOADS = offloads.offered(True)
NO_FEATURE = Feature(0)
SEGMENTS = Feature.GUEST_TSO4
LARGE_LEN = 65553
REGIONS = [
    Region(0, 3 << 20, 0x7F00_0000_0000),
    Region(3 << 20, 5 << 20, 0x7E00_0000_0000, 5 * PAGE_LEN, file=1),
    Region(1 << 32, 8 << 20, 0x7D00_0000_0000, 7 << 20, file=1),
]
"""Two neighbours, and one beyond a hole."""

KINDS: dict[str, dict[str, object]] = {
    "split": {"indirect": False},
    "indirect": {"rx_cuts": (0, 500)},
    "no event_idx": {"features": DEFAULT_FEATURES & ~Feature.RING_EVENT_IDX},
    "not mergeable": {"features": DEFAULT_FEATURES & ~Feature.MRG_RXBUF, "indirect": False},
    "small buffers": {"slot_offset": 60, "rx_buf_len": 600, "rx_queue_size": 1024},
    "in pieces": {"rx_cuts": (0, 100, 700), "indirect": False, "rx_queue_size": 1024},
    "without offloads": {"indirect": False, "offloads": NO_FEATURE},
    "segmented": {"indirect": False, "offloads": OFFLOADS & ~SEGMENTS},
    "packed": {"indirect": False, "ring": Feature.RING_PACKED},
    "packed, in pieces": {
        "rx_cuts": (0, 100, 700), "indirect": False, "rx_queue_size": 1024,
        "ring": Feature.RING_PACKED,
    },
    "packed, indirect": {"rx_cuts": (0, 500), "ring": Feature.RING_PACKED},
    "packed, segmented": {"offloads": OFFLOADS & ~SEGMENTS, "ring": Feature.RING_PACKED},
}  # fmt: skip
WAYS = ["GET_VRING_BASE", "disabled first", "SET_STATUS"]


class Copy:
    """What has come to the other side of a migration so far."""

    def __init__(self, guest: SoftwareGuest) -> None:
        self._memory = guest.memory
        self._parts = [
            (region, bytearray(self._memory.read(region.gpa, region.size)))
            for region in self._memory.regions
        ]

    def take(self, pages: list[int]) -> int:
        """Copy these pages again; returns how many of them there are in memory."""
        return sum(self.take_range(page * PAGE_LEN, PAGE_LEN) for page in pages)

    def take_range(self, gpa: int, length: int) -> bool:
        for region, part in self._parts:
            at = gpa - region.gpa
            if 0 <= at < region.size:
                part[at : at + length] = self._memory.read(gpa, length)
                return True
        return False

    def lost(self) -> list[str]:
        """Places where the copy is not like the original."""
        found = []
        for region, part in self._parts:
            now = self._memory.read(region.gpa, region.size)
            if now != part:
                for at in range(0, region.size, PAGE_LEN):
                    page = slice(at, at + PAGE_LEN)
                    if now[page] != part[page]:
                        first = next(i for i in range(PAGE_LEN) if now[at + i] != part[at + i])
                        found.append(f"{region.gpa + at + first:#x}")
        return found


def by_the_driver(queue: AnyQueue) -> list[tuple[int, int]]:
    """What the driver writes in a ring, as (address, length)."""
    layout = queue.layout
    avail_len = 4 if queue.ring.packed else 6 + 2 * layout.size
    return [(layout.desc_gpa, 16 * layout.size), (layout.avail_gpa, avail_len)]


class Migrations:
    """Guest `b`, which is copied, and two that send to it all that the switch can take."""

    def __init__(
        self, wire: Wire, rng: random.Random, *, ring: Feature = NO_FEATURE, **options: Any
    ) -> None:
        self.rng = rng
        self.wire = wire
        bits = options.pop("offloads", OFFLOADS)
        options["features"] = options.get("features", DEFAULT_FEATURES) | bits | ring
        self.a = wire.guest("a", 1, max_frame_len=9014)
        self.b = wire.guest(
            "b", 2, regions=REGIONS, strict=False, required_features=ring,
            protocol_features=DEFAULT_PROTOCOL_FEATURES | ProtocolFeature.STATUS,
            **{"max_frame_len": 1518, **options},
        )  # fmt: skip
        self.c = wire.guest(
            "c", 3, max_frame_len=LARGE_LEN, queue_size=64, features=DEFAULT_FEATURES | OFFLOADS
        )
        teach(self.a, self.b, self.c)
        # Twice the length of a segment and a bit, up to what a mergeable buffer's chains hold.
        packets = [
            Packet(payload=bytes([n]) * n * 3001, src=parse_mac(C), dst=parse_mac(B))
            for n in (1, 5, 20)
        ]
        self.senders = Load(
            [
                Flow(self.a.transmitqs[0], None, frames(B, A, SIZES), verify=True),
                Flow(None, self.a.receiveqs[0], frames(A, B, [60])),
                Flow(
                    self.c.transmitqs[0], None, [packet.partial() for packet in packets],
                    verify=True, header=packets[0].header(1448).pack(),
                ),
            ]
        )  # fmt: skip
        # Of one kind: what its driver writes into its transmit buffers is there from the beginning.
        receiver = Flow(self.b.transmitqs[0], self.b.receiveqs[0], frames(A, B, [1000]))
        self.receiver = Load([receiver])
        with loading(self.senders):
            (filled,) = self.receiver.run(DEADLINE_S, frames=1024)
        assert filled.sent >= 1024
        self.log = DirtyLog(self.b)
        self.marked = self.fetched = 0

    def busy(self) -> None:
        """The guest runs until the end, and its own writes are its hypervisor's to notice."""
        with loading(self.senders):
            with loading(self.receiver):
                self.log.start()
                copy = Copy(self.b)
                self._fetch_while_used(self.b.receiveqs, 300, copy)
            self._fetch_while_used(self.a.transmitqs, 300, copy)
            self._stop()
            self._fetch(copy)
            for queue in self.b.queues():
                for place in by_the_driver(queue):
                    copy.take_range(*place)
            assert copy.lost() == []
        self._go_on()

    def quiet(self) -> None:
        """The guest does nothing, so all that changes is the switch's doing."""
        with loading(self.senders), loading(self.receiver):
            used_on(self.b.receiveqs, 50)
        self.log.start()
        copy = Copy(self.b)
        with loading(self.senders):
            self._fetch_while_used(self.a.transmitqs, 300, copy)
            self._stop()
            self._fetch(copy)
            assert copy.lost() == []
        self._go_on()

    def _fetch_while_used(self, queues: Sequence[AnyQueue], most: int, copy: Copy) -> None:
        """Again and again, until the switch has used up to so many more buffers."""
        left = self.rng.randrange(50, most)
        while left > 0:
            self._fetch(copy)
            used_on(queues, min(left, 50))
            left -= 50

    def _fetch(self, copy: Copy) -> None:
        self.marked += copy.take(self.log.fetch())
        self.fetched += 1

    def _stop(self) -> None:
        """QEMU 7.2 sets status 0 first, others disable the rings or just ask where they are."""
        way = self.rng.choice(WAYS)
        if way == "SET_STATUS":
            self.b.frontend.set_status(0)
        if way == "disabled first":
            self.b.stop_rings()
            return
        for queue in self.b.queues():
            queue.base = self.b.frontend.get_vring_base(queue.index)

    def _go_on(self) -> None:
        self.log.clear()
        self.b.frontend.set_features(self.b.features)
        self.b.start_rings()


def migrate_for(
    start: Callable[..., Wire], seconds: float, kind: str, workers: int, seed: int
) -> None:
    rng = random.Random(seed)
    made = Migrations(start(workers=workers), rng, **KINDS[kind])  # type: ignore[arg-type]
    try:
        # Long enough for two rounds, however slow the machine is, and more of them on a fast one.
        rounds, end = 0, time.monotonic() + seconds
        while rounds < 2 or time.monotonic() < end:
            made.busy()
            made.quiet()
            rounds += 1
        delivered = made.wire.stats("b")["egress_frames"]
        print(
            f"{kind}, {workers} workers: {2 * rounds} migrations, {delivered} frames, "
            f"{made.marked} pages in {made.fetched} looks"
        )
        assert made.marked > 50 * rounds
        assert delivered > 50 * rounds
    finally:
        made.log.close()


@pytest.mark.parametrize(("number", "kind"), list(enumerate(KINDS)))
def test_no_page_is_lost(start: Callable[..., Wire], number: int, kind: str) -> None:
    migrate_for(start, 0.3, kind, 1 + number % 2, number)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_no_page_is_lost_in_a_long_time(
    start: Callable[..., Wire], kind: str, workers: int
) -> None:
    migrate_for(start, 5.0, kind, workers, 2)
