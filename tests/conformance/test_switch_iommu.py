"""Guests behind a virtual IOMMU: ring and buffer addresses are I/O virtual (ACCESS_PLATFORM)."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import pytest

from tests.conformance.scattering import move, pages_of
from tests.support.formats import FORMATS
from tests.support.frames import frame, frames, mac
from tests.support.running import Wire, posted, teach, translated
from vswitch.lab.guest import DEFAULT_FEATURES, BackendRefusedError, Region, SoftwareGuest
from vswitch.lab.guest.iommu import READ, WRITE
from vswitch.lab.guest.memory import PAGE_LEN
from vswitch.lab.guest.raw import RawDesc
from vswitch.vhost_user.protocol import Feature, IotlbEntry, IotlbType, ProtocolFeature

A, B = mac(1), mac(2)
UVA = 0x7F00_0000_0000
LEN = 1 << 23
WIDE = [Region(0, LEN, UVA)]
"""Far more than a guest's rings and buffers take: the second half is nobody's."""
UNUSED = LEN // 2
HIGH = 1 << 32
TWO_FILES = [Region(0, LEN, UVA), Region(HIGH, LEN, UVA + HIGH, PAGE_LEN, file=1)]


def guest(wire: Wire, name: str, n: int, **options: object) -> SoftwareGuest:
    options.setdefault("regions", WIDE)
    return wire.guest(name, n, iommu=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", FORMATS)
def test_frames_cross(wire: Wire, format: str) -> None:
    """Both behind an IOMMU, chains and indirect tables that cross pages, several regions."""
    wire.extra_features = FORMATS[format]
    a = guest(wire, "a", 1, regions=4, tx_cuts=(0, 700), slot_offset=40, max_frame_len=9000)
    b = guest(wire, "b", 2, regions=4, rx_cuts=(0, 900), slot_offset=40, max_frame_len=9000)
    translated(a, b)
    teach(a, b)
    for source, target, to, by in ((a, b, B, A), (b, a, A, B)):
        sent = frames(to, by, itertools.chain(range(60, 1500, 7), range(1500, 9000, 500)))
        source.send(sent)
        assert target.recv(len(sent)) == sent
    assert wire.drops("a") == wire.drops("b") == {}
    # Everything was asked for once.
    for one in (a, b):
        pages = [miss.iova // PAGE_LEN for miss in one.iommu.misses]
        assert max(map(pages.count, pages)) <= 2, "once for reading and once for writing"


def test_with_and_without(wire: Wire) -> None:
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    for source, target, to, by in ((a, b, B, A), (b, a, A, B)):
        sent = frames(to, by, [1000] * 600)
        for at in range(0, 600, 100):
            source.send(sent[at : at + 100])
            assert target.recv(100) == sent[at : at + 100]
    assert wire.drops("a") == wire.drops("b") == {}


def test_a_transmitq_waits_for_its_translation(wire: Wire) -> None:
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    sent = frames(B, A, [1400] * 100)
    with a.iommu.hold():
        before = len(a.iommu.misses)
        a.iommu.invalidate()
        a.send(sent)
        # Other ports do not wait.
        b.send(frames(A, B, [60]))
        b.drain()
        assert b.recv(1, timeout=0) == []
        assert len(a.iommu.misses) == before
    assert b.recv(100) == sent
    assert wire.info("a")["state"] == "ready"
    # Its receiveq was nowhere meanwhile.
    assert wire.drops("b") == {"egress-down": 1}


def test_a_receiveq_without_translation_drops(wire: Wire) -> None:
    """Nobody waits for a receiver; as soon as it knows where, the switch delivers."""
    a, b = wire.guest("a", 1), guest(wire, "b", 2)
    translated(b)
    teach(a, b)
    ring = b.vring_addr(b.receiveqs[0])
    own = {at // PAGE_LEN for at in (ring.desc_uva, ring.used_uva, ring.avail_uva)}
    pages = {at - at % PAGE_LEN for at in posted(b) if at // PAGE_LEN not in own}
    with b.iommu.hold():
        since = len(b.iommu.misses)
        for page in pages:
            b.iommu.invalidate(page, PAGE_LEN)
        sent = frames(B, A, [500] * 10)
        a.send(sent)
        a.drain()
        # Some of its buffers may share a page with its rings.
        got = b.recv(10, timeout=0)
        assert got == sent[: len(got)]
        assert len(got) < 10
        assert wire.drops("b") == {"iotlb-miss": 10 - len(got)}
    b.iommu.wait_for_misses(pages, since)
    a.send(sent)
    assert b.recv(10) == sent
    assert wire.drops("b") == {"iotlb-miss": 10 - len(got)}


@pytest.mark.parametrize("format", ["split", "packed"])
def test_pages_move_under_traffic(wire: Wire, format: str) -> None:
    """Rings and buffers get other memory again and again; what is not delivered is counted."""
    wire.extra_features = FORMATS[format]
    a, b = guest(wire, "a", 1, queue_size=64), guest(wire, "b", 2, queue_size=64)
    translated(a, b)
    teach(a, b)
    chance = random.Random(1)
    free = {one: list(range(UNUSED, LEN, PAGE_LEN)) for one in (a, b)}
    used = {one: sorted({m.iova - m.iova % PAGE_LEN for m in one.iommu.misses}) for one in (a, b)}
    total = got = 0

    def taken() -> list[bytes]:
        a.drain()
        return b.recv(20, timeout=0)

    def one_arrives() -> bool:
        nonlocal total, got
        a.send([frame(B, A)])
        arrived = taken()
        total += 1
        got += len(arrived)
        return arrived == [frame(B, A)]

    for number in range(150):
        sent = frames(B, A, [chance.randrange(60, 1518) for _ in range(20)], tag=100 * number)
        a.send(sent)
        for one in (a, b):
            one.iommu.move(chance.choice(used[one]), free[one].pop())
        if number % 10 == 0:
            b.iommu.invalidate()
        arrived = taken()
        rest = iter(sent)
        assert all(one in rest for one in arrived), "in order and as they were sent"
        total += len(sent)
        got += len(arrived)
        wire.wait_until(one_arrives, "it is asked for what has moved, and goes on")
    lost = wire.drops("b").get("iotlb-miss", 0) + wire.drops("a").get("egress-down", 0)
    assert got + lost == total
    assert wire.info("a")["state"] == wire.info("b")["state"] == "ready"
    assert wire.drops("a").keys() <= {"egress-down"}
    assert wire.drops("b").keys() <= {"iotlb-miss"}


def test_buffers_are_asked_for_before_frames_come(wire: Wire) -> None:
    """The page of each receive buffer is forgotten when it was used, as a strict IOMMU has it."""
    a = wire.guest("a", 1)
    b = guest(wire, "b", 2, rx_queue_size=16, rx_buf_len=PAGE_LEN)
    b.auto_post = False
    translated(b)
    teach(a, b)
    for number in range(100):
        if b.receiveqs[0].ring.post():
            b.receiveqs[0].notify()
        since = len(b.iommu.misses)
        page = sorted(posted(b))[number % 16]
        b.iommu.invalidate(page, 1)
        b.iommu.wait_for_misses([page], since)
        sent = frame(B, A, 1000, tag=number)
        a.send([sent])
        assert b.recv(1) == [sent]
    assert wire.drops("b") == {}


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ((0x1000, 0, UVA, 3), "update: size is 0"),
        ((2**64 - PAGE_LEN, PAGE_LEN + 1, UVA, 3), "update: iova 0xfffffffffffff000 plus size"),
        ((0, 2**64 - PAGE_LEN, UVA, 3), "update: user address 0x7f0000000000 plus size"),
        ((0, PAGE_LEN, UVA - 1, 3), "in no region of the memory table"),
        ((0, PAGE_LEN + 1, UVA + LEN - PAGE_LEN, 3), "in no region of the memory table"),
        ((0, LEN + 1, UVA, 3), "in no region of the memory table"),
    ],
)
def test_updates_that_cannot_be(wire: Wire, entry: tuple[int, int, int, int], why: str) -> None:
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    with pytest.raises(BackendRefusedError, match="IOTLB_MSG"):
        a.frontend.iotlb_msg(IotlbEntry(*entry, IotlbType.UPDATE))
    wire.wait_log(f"port a: IOTLB_MSG: {why}" if why.startswith("update") else why)
    sent = frames(B, A, [60] * 20)
    a.send(sent)
    assert b.recv(20) == sent


@pytest.mark.parametrize(
    ("access", "type", "why"),
    [
        (4, IotlbType.UPDATE, "permissions 0x4 have unknown bits"),
        (3, 5, "type 5 is unknown"),
        (3, IotlbType.MISS, "type 1 is the backend's to send"),
    ],
)
def test_messages_that_cannot_be(wire: Wire, access: int, type: IotlbType, why: str) -> None:
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    a.frontend.send_raw(
        b"\x16\0\0\0\x01\0\0\0\x20\0\0\0"
        + b"\0" * 24 + bytes([access, type]) + b"\0" * 6
    )  # fmt: skip
    wire.wait_log(f"IOTLB_MSG: {why}")
    assert b.connected


def test_more_updates_than_an_iotlb_holds(wire: Wire) -> None:
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    for number in range(6000):
        place = UVA + (number * 3 % 2000) * PAGE_LEN
        a.frontend.iotlb_msg(
            IotlbEntry((1 << 40) + number * 8192, 4096, place, READ | WRITE, IotlbType.UPDATE)
        )
    # Its own mappings are long out, and asked for again.
    for source, target, to, by in ((a, b, B, A), (b, a, A, B)):
        sent = frames(to, by, [1000] * 50)

        def all_arrive(
            source: SoftwareGuest = source, target: SoftwareGuest = target, sent: list[bytes] = sent
        ) -> bool:
            source.send(sent)
            source.drain()
            return target.recv(50, timeout=0) == sent

        wire.wait_until(all_arrive, "all is where it was")


def test_writes_need_permission(wire: Wire) -> None:
    a, b, c = wire.guest("a", 1), guest(wire, "b", 2), wire.guest("c", 3)
    translated(b)
    teach(a, b, c)
    for page in {at - at % PAGE_LEN for at in posted(b)}:
        entry = b.iommu.entry(page)
        b.frontend.iotlb_msg(entry._replace(access=READ))
    a.send(frames(B, A, [500] * 3))
    wire.wait_state("b", "fault")
    assert "receiveq0: the IOMMU does not let the device have" in str(wire.info("b")["error"])
    assert wire.drops("b") == {"ring-fault": 3}
    sent = frames(mac(3), A, [60] * 10)
    a.send(sent)
    assert c.recv(10) == sent


def test_reads_need_permission(wire: Wire) -> None:
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    at = UNUSED + 100
    a.frontend.iotlb_msg(a.iommu.entry(at)._replace(access=WRITE))
    a.transmitqs[0].raw.offer(RawDesc(at, 100))
    a.transmitqs[0].kick()
    wire.wait_state("a", "fault")
    assert f"address {at:#x} this way (iommu-permission)" in str(wire.info("a")["error"])


@pytest.mark.parametrize("way", ["nothing there", "no permission"])
def test_what_the_frontend_refuses_is_a_fault(wire: Wire, way: str) -> None:
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    at = UNUSED + 100
    if way == "nothing there":
        at += LEN
    else:
        a.iommu.protect(at, WRITE)
    a.transmitqs[0].raw.offer(RawDesc(at, 100))
    a.transmitqs[0].kick()
    wire.wait_state("a", "fault")
    assert f"address {at:#x} this way" in str(wire.info("a")["error"])
    assert a.iommu.refused == 1
    # A reset forgives.
    a.iommu.access.clear()
    a.reboot()
    wire.wait_state("a", "ready")
    translated(a)
    sent = frames(B, A, [60] * 20)
    a.send(sent)
    assert b.recv(20) == sent


def test_a_receive_buffer_that_is_nowhere(wire: Wire) -> None:
    """It is asked for in advance, now and then, and is a fault when a frame gets there."""
    a, b = wire.guest("a", 1), guest(wire, "b", 2, rx_queue_size=16, indirect=False)
    translated(b)
    teach(a, b)
    b.auto_post = False
    raw = b.receiveqs[0].raw
    left = (raw.avail_idx - raw.used_idx) & 0xFFFF
    head = raw.read_avail(raw.avail_idx - 1)
    at = UNUSED + 100
    b.iommu.access[at - 100] = READ
    raw.write_desc(head, raw.read_desc(head)._replace(addr=at))
    b.iommu.invalidate(at, 1)
    b.iommu.wait_for_misses([at])
    sent = frames(B, A, [60] * left)
    a.send(sent[:-1])
    assert b.recv(left - 1) == sent[:-1]
    assert wire.info("b")["state"] == "ready"
    asked = b.iommu.refused

    def is_at_fault() -> bool:
        a.send(sent[-1:])
        return wire.info("b")["state"] == "fault"

    wire.wait_until(is_at_fault, "the buffer is needed")
    assert f"address {at:#x} this way" in str(wire.info("b")["error"])
    assert asked < 20, "not again and again"


def test_a_ring_that_is_nowhere(wire: Wire) -> None:
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    place = a.transmitqs[0].layout.used_gpa
    a.iommu.protect(place, READ)
    wire.wait_state("a", "fault")
    assert "transmitq0: the IOMMU has nothing for it at" in str(wire.info("a")["error"])
    a.iommu.protect(place, READ | WRITE)
    wire.wait_state("a", "ready")
    sent = frames(B, A, [60] * 20)
    a.send(sent)
    assert b.recv(20) == sent


def mapped(wire: Wire, one: SoftwareGuest) -> int:
    """How many mappings the switch has of a guest's memory file."""
    file = os.fstat(one.memory.fd(one.memory.regions[0]))
    name = [f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}", str(file.st_ino)]
    rows = Path(f"/proc/{wire.switch.process.pid}/maps").read_text().splitlines()
    return [row.split()[3:5] for row in rows].count(name)


@pytest.mark.parametrize(
    ("format", "part"),
    [("split", 0), ("split", 1), ("split", 2), ("packed", 0)],
    ids=["descriptors", "avail", "used", "packed"],
)
def test_a_ring_whose_pages_are_scattered(wire: Wire, format: str, part: int) -> None:
    """One part of each ring is in one piece for the driver only, and moves while frames cross."""
    wire.extra_features = FORMATS[format]
    length = 4 * LEN
    regions = [Region(0, length, UVA)]
    a = guest(wire, "a", 1, regions=regions, queue_size=2048, rx_queue_size=1024)
    b = wire.guest("b", 2)
    translated(a)
    teach(a, b)
    assert mapped(wire, a) == 1
    pages = [page for queue in a.queues() for page in pages_of(queue)[part]]
    assert len(pages) >= 3
    free = list(range(move(a, pages[::-1], length // 2), length, 2 * PAGE_LEN))
    for source, target, to, by in ((a, b, B, A), (b, a, A, B)):
        for number in range(32):  # all of the ring, and around
            sent = frames(to, by, [60] * 100, tag=number)
            source.send(sent)
            assert target.recv(100) == sent
    assert mapped(wire, a) >= 1 + len(pages)
    chance = random.Random(part)
    total = got = 0
    before = wire.drops("b").get("egress-down", 0)
    for number in range(60):
        there = frames(B, A, [chance.randrange(60, 1518) for _ in range(10)], tag=number)
        back = frames(A, B, [chance.randrange(60, 1518) for _ in range(10)], tag=number)
        a.send(there)
        b.send(back)
        a.iommu.move(chance.choice(pages), free.pop())
        # Its transmitq waits, its receiveq is nowhere for a moment.
        assert b.recv(10) == there
        b.drain()
        arrived = a.recv(10, timeout=0)
        rest = iter(back)
        assert all(one in rest for one in arrived), "in order and as they were sent"
        total, got = total + 10, got + len(arrived)
    lost = wire.drops("b").get("egress-down", 0) - before + wire.drops("a").get("iotlb-miss", 0)
    assert got + lost == total
    assert wire.info("a")["state"] == "ready"
    a.stop_rings()
    assert mapped(wire, a) == 1


def test_a_ring_in_two_regions(wire: Wire) -> None:
    """Its pages come from files of two regions, in turns."""
    a, b = guest(wire, "a", 1, regions=TWO_FILES, queue_size=1024), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    spare = [UNUSED, HIGH + UNUSED]
    for queue in a.queues():
        for number, page in enumerate(pages_of(queue)[0]):
            spare[number % 2] = move(a, [page], spare[number % 2])
    for source, target, to, by in ((a, b, B, A), (b, a, A, B)):
        for number in range(32):
            sent = frames(to, by, [60] * 100, tag=number)
            source.send(sent)
            assert target.recv(100) == sent


def test_a_ring_in_pieces_that_are_no_pages(wire: Wire) -> None:
    """They cannot be mapped side by side, and the port says so; elsewhere it goes on."""
    a, b = guest(wire, "a", 1, queue_size=512, rx_queue_size=256), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    at = a.transmitqs[0].layout.desc_gpa
    with a.iommu.hold():
        a.iommu.invalidate()
        for piece, place in ((0, at), (1024, UNUSED)):
            uva = UVA + place
            a.frontend.iotlb_msg(IotlbEntry(at + piece, 1024, uva, READ | WRITE, IotlbType.UPDATE))
        rest = IotlbEntry(at + 2048, UNUSED, UVA + at + 2048, READ | WRITE, IotlbType.UPDATE)
        a.frontend.iotlb_msg(rest)
        wire.wait_state("a", "fault")
        error = str(wire.info("a")["error"])
    assert "is in 3 pieces of memory, which cannot be mapped side by side" in error
    assert "does not begin a page of 4096 bytes" in error
    a.iommu.invalidate()
    wire.wait_state("a", "ready")
    sent = frames(B, A, [60] * 20)
    a.send(sent)
    assert b.recv(20) == sent


def test_a_ring_that_never_was_anywhere(wire: Wire) -> None:
    """That the other one starts does not hide it."""
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    translated(a)
    place = a.receiveqs[0].layout.used_gpa
    a.iommu.access[place - place % PAGE_LEN] = READ
    for _ in range(2):
        a.reboot()
        wire.wait_until(lambda: any(r["started"] for r in wire.info("a")["rings"]), "one starts")
        wire.wait_state("a", "fault")
        assert "receiveq0: the IOMMU has nothing for it at" in str(wire.info("a")["error"])
        sent = frames(B, A, [60] * 20)
        a.send(sent)
        assert b.recv(20) == sent
        assert wire.info("a")["state"] == "fault"
    a.iommu.access.clear()
    a.reboot()
    wire.wait_state("a", "ready")


def test_a_ring_in_a_place_where_it_cannot_run(wire: Wire) -> None:
    """It stays stopped, whatever becomes of the memory, until it is somewhere else."""
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    [row], [fd] = a.memory.table()
    more = row._replace(gpa=1 << 40, uva=1 << 40, size=PAGE_LEN, mmap_offset=0)
    with a.iommu.hold():
        a.iommu.invalidate()
        a.frontend.iotlb_msg(IotlbEntry(0, UNUSED, UVA + 8, READ | WRITE, IotlbType.UPDATE))
        wire.wait_state("a", "fault")
        assert "is not aligned to 16 bytes" in str(wire.info("a")["error"])
        a.frontend.add_mem_reg(more, fd)
        a.iommu.invalidate(UNUSED, PAGE_LEN)
        a.frontend.rem_mem_reg(more)
        assert wire.info("a")["state"] == "fault"
    a.iommu.invalidate()
    wire.wait_state("a", "ready")
    sent = frames(B, A, [60] * 20)
    a.send(sent)
    assert b.recv(20) == sent


def test_a_ring_that_moves_while_memory_comes(wire: Wire) -> None:
    """It is put back in the midst of the memory's change, where it is now."""
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    [row], [fd] = a.memory.table()
    more = row._replace(gpa=1 << 40, uva=1 << 40, size=PAGE_LEN, mmap_offset=0)
    with a.iommu.hold():
        entry = IotlbEntry(0, UNUSED, UVA + UNUSED, READ | WRITE, IotlbType.UPDATE)
        a.frontend.iotlb_msg(entry)
        a.frontend.add_mem_reg(more, fd)
        a.frontend.iotlb_msg(entry._replace(uva=UVA))
        a.frontend.rem_mem_reg(more)
    sent = frames(B, A, [60] * 20)
    a.send(sent)
    assert b.recv(20) == sent
    assert wire.info("a")["connects"] == 1


def test_memory_comes_and_goes(wire: Wire) -> None:
    """The region with the rings is replaced by its halves, as QEMU does."""
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    [row], [fd] = a.memory.table()
    half = LEN // 2
    waiting = frames(B, A, [60] * 20)
    with a.iommu.hold():
        a.frontend.rem_mem_reg(row)
        a.send(waiting)
        a.frontend.add_mem_reg(row._replace(size=half), fd)
        a.frontend.add_mem_reg(
            row._replace(gpa=row.gpa + half, uva=row.uva + half, size=half, mmap_offset=half), fd
        )
    assert b.recv(20) == waiting
    wire.wait_state("a", "ready")


def test_stopping_while_a_translation_is_missing(wire: Wire) -> None:
    a, b = guest(wire, "a", 1), wire.guest("b", 2)
    translated(a)
    teach(a, b)
    with a.iommu.hold():
        a.iommu.invalidate()
        a.send(frames(B, A, [60] * 20))
        a.stop_rings()
        assert not any(ring["started"] for ring in wire.info("a")["rings"])
        assert [q.base & 0xFFFF for q in a.transmitqs] == [a.transmitqs[0].raw.used_idx]
    a.start_rings()
    assert len(b.recv(20)) == 20


def test_access_platform_without_a_channel_translates_nothing(wire: Wire) -> None:
    """Some frontends pass the bit on for guests with confidential memory."""
    a = wire.guest("a", 1, features=DEFAULT_FEATURES | Feature.ACCESS_PLATFORM)
    b = wire.guest("b", 2)
    assert Feature.ACCESS_PLATFORM in a.features
    assert ProtocolFeature.BACKEND_REQ not in a.frontend.protocol_features
    teach(a, b)
    sent = frames(B, A, [60] * 20)
    a.send(sent)
    assert b.recv(20) == sent
    with pytest.raises(BackendRefusedError, match="IOTLB_MSG"):
        a.frontend.iotlb_msg(IotlbEntry(0, PAGE_LEN, UVA, 3, IotlbType.UPDATE))
    wire.wait_log("ACCESS_PLATFORM and BACKEND_REQ were not both negotiated")
