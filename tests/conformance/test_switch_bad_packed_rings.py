"""Drivers that break the rules of packed rings; see test_switch_bad_rings.py for split ones."""

from __future__ import annotations

import pytest

from tests.conformance.test_switch_bad_rings import (
    BEYOND,
    END,
    RECEIVE_TABLES,
    SIZE,
    A,
    B,
    C,
    Deed,
    check_others,
    data,
    trio,
)
from tests.support.frames import BROADCAST, frame, frames
from tests.support.running import Wire, silent
from vswitch.lab.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.lab.guest.raw import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    PACKED_F_AVAIL,
    PACKED_F_USED,
    RawDesc,
    RawPackedDesc,
)
from vswitch.vhost_user.protocol import Feature

FEATURES = DEFAULT_FEATURES | Feature.RING_PACKED


def chain(*descs: RawDesc) -> Deed:
    """Offer descriptors as a chain on the transmitq; an `addr` of 0 stands for good memory."""

    def deed(guest: SoftwareGuest) -> None:
        where = data(guest)
        raw = guest.transmitqs[0].raw_packed()
        raw.offer(*(d._replace(addr=d.addr or where) for d in descs))

    return deed


def endless(length: int) -> Deed:
    """NEXT in every entry of the ring, the last of which is followed by the first."""

    def deed(guest: SoftwareGuest) -> None:
        where = data(guest)
        raw = guest.transmitqs[0].raw_packed()
        raw.put(*[RawPackedDesc(where, length, i, DESC_F_NEXT) for i in range(SIZE)])

    return deed


def table(*descs: RawDesc, flags: int = DESC_F_INDIRECT, table_len: int | None = None) -> Deed:
    """Descriptors in an indirect table, just as they are; `table_len` is what the ring says."""

    def deed(guest: SoftwareGuest) -> None:
        raw, where = guest.transmitqs[0].raw_packed(), data(guest)
        gpa = guest.memory.allocate(16 * len(descs) + 16)
        for i, desc in enumerate(descs):
            raw.write_desc_at(
                gpa + 16 * i, RawPackedDesc(desc.addr or where, desc.len, 0, desc.flags)
            )
        length = 16 * len(descs) if table_len is None else table_len
        raw.put(RawPackedDesc(gpa, length, 0, flags), RawPackedDesc(where, 64, 0, 0))

    return deed


TRANSMIT: dict[str, tuple[str, Deed]] = {
    "beyond memory": ("bad-address", chain(RawDesc(1 << 40, 72))),
    "just beyond memory": ("bad-address", chain(RawDesc(END, 72))),
    "runs out of memory": ("bad-address", chain(RawDesc(END - 71, 72))),
    "across a hole": ("bad-address", chain(RawDesc(END - 8, BEYOND - END + 16))),
    "before the end of a hole": ("bad-address", chain(RawDesc(BEYOND - 1, 72))),
    "beyond the last region": ("bad-address", chain(RawDesc(BEYOND + 4096 - 71, 72))),
    "wraps past 2^64": ("bad-address", chain(RawDesc((1 << 64) - 8, 72))),
    "wraps to the beginning": ("bad-address", chain(RawDesc((1 << 64) - 72, 80))),
    "4 GiB": ("bad-address", chain(RawDesc(0, 0xFFFF_FFFF))),
    "second piece": ("bad-address", chain(RawDesc(0, 72), RawDesc(1 << 40, 72))),
    "longer than the ring": ("chain-too-long", endless(1)),
    "longer than the ring, of nothing": ("chain-too-long", endless(0)),
    "1024 in a table": ("chain-too-long", table(*[RawDesc(0, 1)] * 1024)),
    "writable": ("bad-direction", chain(RawDesc(0, 72, DESC_F_WRITE))),
    "second writable": ("bad-direction", chain(RawDesc(0, 72), RawDesc(0, 72, DESC_F_WRITE))),
    "writable in a table": ("bad-direction", table(RawDesc(0, 72, DESC_F_WRITE))),
    "second writable in a table": (
        "bad-direction",
        table(RawDesc(0, 72), RawDesc(0, 72, DESC_F_WRITE)),
    ),
    "table in a chain": (
        "indirect-nested",
        table(RawDesc(0, 72), flags=DESC_F_INDIRECT | DESC_F_NEXT),
    ),
    "empty table": ("indirect-length", table(RawDesc(0, 72), table_len=0)),
    "odd table": ("indirect-length", table(RawDesc(0, 72), table_len=24)),
    "table of 32769": ("indirect-length", table(RawDesc(0, 72), table_len=16 * 32769)),
    "huge table": ("indirect-length", table(RawDesc(0, 72), table_len=0xFFFF_FFF0)),
    "table beyond memory": ("bad-address", chain(RawDesc(END, 16, DESC_F_INDIRECT))),
    "table runs out of memory": ("bad-address", chain(RawDesc(END - 8, 16, DESC_F_INDIRECT))),
    "table in a hole": ("bad-address", chain(RawDesc(BEYOND - 16, 16, DESC_F_INDIRECT))),
    "table wraps past 2^64": ("bad-address", chain(RawDesc((1 << 64) - 8, 16, DESC_F_INDIRECT))),
}


def check_fault(wire: Wire, queue: str, fault: str) -> None:
    wire.wait_state("a", "fault")
    error = wire.info("a")["error"] or ""
    assert error.startswith(f"{queue}: ")
    assert error.endswith(f"({fault})")


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("name", TRANSMIT)
def test_transmitq(wire: Wire, name: str, in_order: bool) -> None:
    fault, deed = TRANSMIT[name]
    # Once where all fits before the end of the ring, once across it.
    features = FEATURES | Feature.IN_ORDER if in_order else FEATURES
    a, b, c = trio(wire, features=features, first_idx=SIZE - 2 if in_order else 0)
    queue = a.transmitqs[0]
    deed(a)
    queue.kick()
    check_fault(wire, "transmitq0", fault)
    wire.wait_until(queue.take_error, "the frontend hears of it (SET_VRING_ERR)")
    check_others(wire, b, c)
    assert silent(b, c)
    # A guest that boots anew has a port again. In good order: its ring begins at a made-up place,
    # which only GET_VRING_BASE can tell from the middle of the old one.
    a.disconnect()
    a.connect(a.path)
    assert wire.info("a")["state"] == "ready"
    a.send([frame(BROADCAST, A, tag=3)])
    assert b.recv(1) == c.recv(1) == [frame(BROADCAST, A, tag=3)]


def test_indirect_without_negotiation(wire: Wire) -> None:
    a, b, c = trio(wire, features=FEATURES & ~Feature.RING_INDIRECT_DESC)
    table(RawDesc(0, 72))(a)
    a.transmitqs[0].kick()
    check_fault(wire, "transmitq0", "indirect-unoffered")
    check_others(wire, b, c)


def test_good_frames_before_a_bad_one(wire: Wire) -> None:
    """They arrive, although all came in one burst."""
    a, b, c = trio(wire, features=FEATURES)
    raw, where = a.transmitqs[0].raw_packed(), data(a)
    start = raw.position
    raw.put(*[RawPackedDesc(gpa, 72, 5, 0) for gpa in (where, where, 1 << 40, where)])
    a.transmitqs[0].kick()
    check_fault(wire, "transmitq0", "bad-address")
    assert b.recv(2) == [frame(B, A)] * 2
    assert [raw.is_used(raw.after(start, i)) for i in range(4)] == [True, True, False, False]
    check_others(wire, b, c)
    assert silent(b)


def test_what_looks_bad_and_is_allowed(wire: Wire) -> None:
    """Odd ids, the longest chains, flags that tables do not have, entries of no round."""
    a, b, c = trio(wire, features=FEATURES)
    queue = a.transmitqs[0]
    raw, where = queue.raw_packed(), data(a)

    def sent(start: int, id: int) -> None:
        queue.kick()
        assert b.recv(1) == [frame(B, A)]
        wire.wait_until(lambda: raw.is_used(start), "the chain is used")
        assert raw.read_desc(start & 0x7FFF).id == id

    # The id is the driver's own business.
    start = raw.position
    raw.offer(RawDesc(where, 72), id=0xFFFF)
    sent(start, 0xFFFF)
    # A chain over the whole ring, through its end: 72 pieces of a byte, the others empty. The id is
    # that of its last entry.
    start = raw.position
    raw.put(
        *[
            RawPackedDesc(where + min(i, 71), int(i < 72), i, DESC_F_NEXT if i + 1 < SIZE else 0)
            for i in range(SIZE)
        ]
    )
    sent(start, SIZE - 1)
    # 1023 in a table, whose NEXT and INDIRECT are to be ignored (2.8.7).
    gpa = a.memory.allocate(16 * 1023)
    for i in range(1023):
        desc = RawPackedDesc(where + min(i, 71), int(i < 72), 9, DESC_F_NEXT | DESC_F_INDIRECT)
        raw.write_desc_at(gpa + 16 * i, desc)
    start = raw.position
    raw.offer(RawDesc(gpa, 16 * 1023, DESC_F_INDIRECT), id=7)
    sent(start, 7)
    # Entries that are not available: of the round before, used, of the next round.
    at = raw.position & 0x7FFF
    for flags in (raw.available(raw.position ^ 0x8000), raw.used(raw.position), 0):
        raw.write_desc(at, RawPackedDesc(where, 72, 1, flags))
        queue.kick()
        check_others(wire, b, c)
    assert silent(b)
    start = raw.position
    raw.offer(RawDesc(where, 72), id=1)
    sent(start, 1)
    assert wire.info("a")["state"] == "ready"


RECEIVE: dict[str, tuple[str, RawDesc]] = {
    "beyond memory": ("bad-address", RawDesc(1 << 40, 2048, DESC_F_WRITE)),
    "runs out of memory": ("bad-address", RawDesc(END - 8, 2048, DESC_F_WRITE)),
    "just beyond memory": ("bad-address", RawDesc(END, 2048, DESC_F_WRITE)),
    "across a hole": ("bad-address", RawDesc(END - 8, BEYOND - END + 16, DESC_F_WRITE)),
    "wraps past 2^64": ("bad-address", RawDesc((1 << 64) - 8, 2048, DESC_F_WRITE)),
    "table in a chain": ("indirect-nested", RawDesc(0, 16, DESC_F_INDIRECT | DESC_F_NEXT)),
    "odd table": ("indirect-length", RawDesc(0, 24, DESC_F_INDIRECT)),
    "table runs out of memory": ("bad-address", RawDesc(END - 8, 16, DESC_F_INDIRECT)),
    "read-only": ("bad-direction", RawDesc(0, 2048)),
    "empty": ("empty-buffer", RawDesc(0, 0, DESC_F_WRITE)),
    "a byte": ("short-buffer", RawDesc(0, 1, DESC_F_WRITE)),
    "a byte less than a header": ("short-buffer", RawDesc(0, 11, DESC_F_WRITE)),
    "longer than the ring": ("chain-too-long", RawDesc(0, 0, DESC_F_WRITE | DESC_F_NEXT)),
    "table beyond memory": ("bad-address", RawDesc(1 << 40, 16, DESC_F_INDIRECT)),
    "empty table": ("indirect-length", RawDesc(0, 0, DESC_F_INDIRECT)),
}


@pytest.mark.parametrize("name", RECEIVE_TABLES)
def test_receiveq_table(wire: Wire, name: str) -> None:
    fault, descs, table_len = RECEIVE_TABLES[name]
    a, b, c = trio(wire, features=FEATURES)
    where, gpa = a.memory.allocate(2048), a.memory.allocate(16 * len(descs))
    raw = a.receiveqs[0].raw_packed()
    for i, desc in enumerate(descs):
        # One entry follows the other; NEXT means nothing here (2.8.7).
        raw.write_desc_at(gpa + 16 * i, RawPackedDesc(desc.addr or where, desc.len, 0, desc.flags))
    length = 16 * len(descs) if table_len is None else table_len
    for i in range(SIZE):
        old = raw.read_desc(i)
        flags = DESC_F_INDIRECT | old.flags & (PACKED_F_AVAIL | PACKED_F_USED)
        raw.write_desc(i, RawPackedDesc(gpa, length, old.id, flags))
    b.send([frame(A, B)] * 3)
    b.drain()
    check_fault(wire, "receiveq0", fault)
    assert wire.drops("a") == {"ring-fault": 3}
    check_others(wire, b, c)


@pytest.mark.parametrize("name", RECEIVE)
def test_receiveq(wire: Wire, name: str) -> None:
    fault, desc = RECEIVE[name]
    a, b, c = trio(wire, features=FEATURES)
    raw = a.receiveqs[0].raw_packed()
    where = a.memory.allocate(2048)
    for i in range(SIZE):
        old = raw.read_desc(i)
        flags = desc.flags | old.flags & (PACKED_F_AVAIL | PACKED_F_USED)
        raw.write_desc(i, RawPackedDesc(desc.addr or where, desc.len, old.id, flags))
    # To everyone: the others get theirs although it fails for one.
    sent = frames(BROADCAST, B, [60, 1514, 300])
    b.send(sent)
    assert c.recv(3) == sent
    b.drain()
    check_fault(wire, "receiveq0", fault)
    assert wire.drops("a") == {"ring-fault": 3}
    check_others(wire, b, c)


def test_wild_event_suppression(wire: Wire) -> None:
    """Offsets outside of the ring and reserved flags cost a call too many or too few, no more."""
    a, b, c = trio(wire, features=FEATURES)
    mapping, gpa = a.memory.mapping, a.receiveqs[0].layout.avail_gpa
    for offset, flags in ((0x7FFF, 2), (0xFFFF, 2), (SIZE, 2), (0, 3), (0x1234, 0xFFFF)):
        mapping.store_u16(gpa, offset)
        mapping.store_u16(gpa + 2, flags)
        c.send([frame(A, C)] * 3)
        c.drain()
    assert a.poll_frames(15) == [frame(A, C)] * 15
    check_others(wire, b, c)
