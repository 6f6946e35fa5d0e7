"""A guest whose driver breaks the rules loses its own port, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.frames import BROADCAST, frame, frames, mac
from tests.support.running import Wire, exchanging, silent, teach
from vswitch.lab.guest import DEFAULT_FEATURES, BufferOptions, SoftwareGuest
from vswitch.lab.guest.frontend import Frontend
from vswitch.lab.guest.memory import Region
from vswitch.lab.guest.raw import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, RawDesc
from vswitch.vhost_user.protocol import Feature

A, B, C = mac(1), mac(2), mac(3)
SIZE = 256
END = 1 << 26
"""End of the guest memory below, and of everything in it."""
BEYOND = END + (1 << 20)
"""Where memory begins again, after a hole; one page."""
MEMORY = [Region(0, END, 0x7F00_0000_0000), Region(BEYOND, 4096, 0x7E00_0000_0000)]

Deed = Callable[[SoftwareGuest], None]


def data(guest: SoftwareGuest) -> int:
    """A kilobyte of memory that holds a frame from A to B after a header of zeros."""
    where = guest.memory.allocate(1024)
    guest.memory.write(where, bytes(12) + frame(B, A))
    return where


def chain(*descs: RawDesc) -> Deed:
    """Offer descriptors as a chain on the transmitq; an `addr` of 0 stands for good memory."""

    def deed(guest: SoftwareGuest) -> None:
        where = data(guest)
        guest.transmitqs[0].raw.offer(*(d._replace(addr=d.addr or where) for d in descs))

    return deed


def exact(*descs: RawDesc) -> Deed:
    """Descriptors 0, 1, ... just as they are, and the first one offered."""

    def deed(guest: SoftwareGuest) -> None:
        raw, where = guest.transmitqs[0].raw, data(guest)
        for i, desc in enumerate(descs):
            raw.write_desc(i, desc._replace(addr=desc.addr or where))
        idx = raw.avail_idx
        raw.write_avail(idx, 0)
        raw.avail_idx = idx + 1

    return deed


def table(*descs: RawDesc, flags: int = DESC_F_INDIRECT, table_len: int | None = None) -> Deed:
    """Descriptors in an indirect table, just as they are; `table_len` is what the ring says."""

    def deed(guest: SoftwareGuest) -> None:
        raw, where = guest.transmitqs[0].raw, data(guest)
        gpa = guest.memory.allocate(16 * len(descs) + 16)
        for i, desc in enumerate(descs):
            raw.write_desc_at(gpa + 16 * i, desc._replace(addr=desc.addr or where))
        length = 16 * len(descs) if table_len is None else table_len
        raw.write_desc(1, RawDesc(where, 64))
        raw.offer(RawDesc(gpa, length, flags, 1))

    return deed


def head(number: int) -> Deed:
    def deed(guest: SoftwareGuest) -> None:
        raw = guest.transmitqs[0].raw
        raw.write_avail(raw.avail_idx, number)
        raw.avail_idx += 1

    return deed


def jump(by: int) -> Deed:
    def deed(guest: SoftwareGuest) -> None:
        guest.transmitqs[0].raw.avail_idx += by

    return deed


def links(n: int) -> list[RawDesc]:
    """`n` descriptors of one byte, each with the next."""
    return [RawDesc(0, 1, DESC_F_NEXT, i + 1) for i in range(n - 1)] + [RawDesc(0, 1)]


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
    "loop of one": ("chain-too-long", exact(RawDesc(0, 8, DESC_F_NEXT, 0))),
    "loop of two": (
        "chain-too-long",
        exact(RawDesc(0, 8, DESC_F_NEXT, 1), RawDesc(0, 8, DESC_F_NEXT, 0)),
    ),
    "loop of nothing": ("chain-too-long", exact(RawDesc(0, 0, DESC_F_NEXT, 0))),
    "loop through the head": (
        "chain-too-long",
        exact(RawDesc(0, 8, DESC_F_NEXT, 2), RawDesc(0, 8), RawDesc(0, 8, DESC_F_NEXT, 0)),
    ),
    "loop of two in a table": (
        "chain-too-long",
        table(RawDesc(0, 1, DESC_F_NEXT, 1), RawDesc(0, 1, DESC_F_NEXT, 0)),
    ),
    "loop in a table": ("chain-too-long", table(RawDesc(0, 1, DESC_F_NEXT, 0))),
    "1024 in a table": ("chain-too-long", table(*links(1024))),
    "next beyond ring": ("bad-next", exact(RawDesc(0, 8, DESC_F_NEXT, SIZE))),
    "next 65535": ("bad-next", exact(RawDesc(0, 8, DESC_F_NEXT, 0xFFFF))),
    "next beyond table": ("bad-next", table(RawDesc(0, 8, DESC_F_NEXT, 1))),
    "next 65535 in a table": ("bad-next", table(RawDesc(0, 8, DESC_F_NEXT, 0xFFFF))),
    "head beyond ring": ("bad-head", head(SIZE)),
    "head 65535": ("bad-head", head(0xFFFF)),
    "index one too far": ("avail-index", jump(SIZE + 1)),
    "index back": ("avail-index", jump(-1)),
    "index half around": ("avail-index", jump(0x8000)),
    "writable": ("bad-direction", chain(RawDesc(0, 72, DESC_F_WRITE))),
    "second writable": ("bad-direction", chain(RawDesc(0, 72), RawDesc(0, 72, DESC_F_WRITE))),
    "writable in a table": ("bad-direction", table(RawDesc(0, 72, DESC_F_WRITE))),
    "second writable in a table": (
        "bad-direction",
        table(RawDesc(0, 72, DESC_F_NEXT, 1), RawDesc(0, 72, DESC_F_WRITE)),
    ),
    "table in a table, at its end": (
        "indirect-nested",
        table(RawDesc(0, 72, DESC_F_NEXT, 1), RawDesc(0, 16, DESC_F_INDIRECT)),
    ),
    "table in a table": ("indirect-nested", table(RawDesc(0, 16, DESC_F_INDIRECT))),
    "table in a chain": (
        "indirect-nested",
        table(RawDesc(0, 72), flags=DESC_F_INDIRECT | DESC_F_NEXT),
    ),
    "empty table": ("indirect-length", table(RawDesc(0, 72), table_len=0)),
    "odd table": ("indirect-length", table(RawDesc(0, 72), table_len=24)),
    "table of 32769": ("indirect-length", table(RawDesc(0, 72), table_len=16 * 32769)),
    "huge table": ("indirect-length", table(RawDesc(0, 72), table_len=0xFFFF_FFF0)),
    "table beyond memory": ("bad-address", chain(RawDesc(END, 16, DESC_F_INDIRECT))),
    "table runs out of memory": (
        "bad-address",
        chain(RawDesc(END - 8, 16, DESC_F_INDIRECT)),
    ),
    "table in a hole": ("bad-address", chain(RawDesc(BEYOND - 16, 16, DESC_F_INDIRECT))),
    "table wraps past 2^64": ("bad-address", chain(RawDesc((1 << 64) - 8, 16, DESC_F_INDIRECT))),
}


def trio(wire: Wire, **options: Any) -> tuple[SoftwareGuest, SoftwareGuest, SoftwareGuest]:
    """Guest a with the memory above, and two that only want to be left alone."""
    a = wire.guest("a", 1, queue_size=SIZE, regions=MEMORY, **options)
    b, c = wire.guest("b", 2), wire.guest("c", 3)
    teach(a, b, c)
    return a, b, c


def check_others(wire: Wire, b: SoftwareGuest, c: SoftwareGuest) -> None:
    """Two guests exchange frames as if nothing had happened."""
    for sender, receiver, dst, src in ((b, c, C, B), (c, b, B, C)):
        sent = frames(dst, src, [60, 300, 1514] * 10)
        sender.send(sent)
        assert receiver.recv(len(sent)) == sent
        sender.drain()
    assert wire.drops("b") == wire.drops("c") == {}
    assert wire.info("b")["state"] == wire.info("c")["state"] == "ready"


@pytest.mark.parametrize("name", TRANSMIT)
def test_transmitq(wire: Wire, name: str) -> None:
    fault, deed = TRANSMIT[name]
    a, b, c = trio(wire)
    queue = a.transmitqs[0]
    deed(a)
    queue.kick()
    wire.wait_state("a", "fault")
    error = wire.info("a")["error"] or ""
    assert error.startswith("transmitq0: ")
    assert error.endswith(f"({fault})")
    wire.wait_until(queue.take_error, "the frontend hears of it (SET_VRING_ERR)")
    assert wire.info("a")["rings"][1]["fault"]
    check_others(wire, b, c)
    assert silent(b, c)
    # A guest that boots anew has a port again.
    a.connect(a.frontend.path)
    assert wire.info("a")["state"] == "ready"
    assert wire.info("a")["error"] is None
    a.send([frame(BROADCAST, A, tag=3)])
    assert b.recv(1) == c.recv(1) == [frame(BROADCAST, A, tag=3)]


def test_good_frames_before_a_bad_one(wire: Wire) -> None:
    """They arrive, although all came in one burst."""
    a, b, c = trio(wire)
    raw, where = a.transmitqs[0].raw, data(a)
    idx = raw.avail_idx
    raw.write_desc(0, RawDesc(where, 72))
    raw.write_desc(1, RawDesc(1 << 40, 72))
    for i, number in enumerate((0, 0, 1, 0)):
        raw.write_avail(idx + i, number)
    raw.avail_idx = idx + 4
    a.transmitqs[0].kick()
    wire.wait_state("a", "fault")
    assert b.recv(2) == [frame(B, A)] * 2
    assert raw.used_idx == idx + 2
    check_others(wire, b, c)
    assert silent(b)


def test_indirect_without_negotiation(wire: Wire) -> None:
    a, b, c = trio(wire, features=DEFAULT_FEATURES & ~Feature.RING_INDIRECT_DESC)
    table(RawDesc(0, 72))(a)
    a.transmitqs[0].kick()
    wire.wait_state("a", "fault")
    assert "indirect-unoffered" in str(wire.info("a")["error"])
    check_others(wire, b, c)


def test_what_looks_bad_and_is_allowed(wire: Wire) -> None:
    """The longest chains, empty pieces, and a frame of many gigabytes, which is merely oversize."""
    a, b, c = trio(wire)
    raw, queue = a.transmitqs[0].raw, a.transmitqs[0]
    where = data(a)
    # A chain over the whole ring: 72 pieces of a byte, the others empty.
    for i in range(SIZE):
        flags = DESC_F_NEXT if i + 1 < SIZE else 0
        raw.write_desc(i, RawDesc(where + min(i, 71), int(i < 72), flags, (i + 1) % SIZE))
    raw.write_avail(raw.avail_idx, 0)
    raw.avail_idx += 1
    queue.kick()
    assert b.recv(1) == [frame(B, A)]
    # 1023 in a table.
    gpa = a.memory.allocate(16 * 1023)
    for i in range(1023):
        flags = DESC_F_NEXT if i + 1 < 1023 else 0
        desc = RawDesc(where + min(i, 71), int(i < 72), flags, i + 1)
        raw.write_desc_at(gpa + 16 * i, desc)
    raw.offer(RawDesc(gpa, 16 * 1023, DESC_F_INDIRECT))
    queue.kick()
    assert b.recv(1) == [frame(B, A)]
    # A table at an odd address, pointed to by a descriptor with flags that mean nothing there; what
    # it points to ends with the last byte of a region.
    for desc in (RawDesc(BEYOND + 4096 - 72, 72), RawDesc(END - 72, 72), RawDesc(BEYOND, 72)):
        a.memory.write(desc.addr, bytes(12) + frame(B, A))
        raw.write_desc_at(gpa + 3, desc)
        raw.offer(RawDesc(gpa + 3, 16, DESC_F_INDIRECT | DESC_F_WRITE))
        queue.kick()
        assert b.recv(1) == [frame(B, A)]
    # 200 times the same 64 MiB.
    raw.offer(*[RawDesc(0, END)] * 200)
    queue.kick()
    wire.wait_until(lambda: wire.drops("a") == {"oversize": 1}, "an oversize frame is counted")
    assert wire.info("a")["state"] == "ready"
    check_others(wire, b, c)


# An `addr` of 0 stands for good memory, a `next` of 0 for the descriptor's own index.
RECEIVE: dict[str, tuple[str, RawDesc]] = {
    "beyond memory": ("bad-address", RawDesc(1 << 40, 2048, DESC_F_WRITE)),
    "runs out of memory": ("bad-address", RawDesc(END - 8, 2048, DESC_F_WRITE)),
    "just beyond memory": ("bad-address", RawDesc(END, 2048, DESC_F_WRITE)),
    "across a hole": ("bad-address", RawDesc(END - 8, BEYOND - END + 16, DESC_F_WRITE)),
    "wraps past 2^64": ("bad-address", RawDesc((1 << 64) - 8, 2048, DESC_F_WRITE)),
    "next 65535": ("bad-next", RawDesc(0, 8, DESC_F_WRITE | DESC_F_NEXT, 0xFFFF)),
    "table in a chain": ("indirect-nested", RawDesc(0, 16, DESC_F_INDIRECT | DESC_F_NEXT)),
    "odd table": ("indirect-length", RawDesc(0, 24, DESC_F_INDIRECT)),
    "table runs out of memory": ("bad-address", RawDesc(END - 8, 16, DESC_F_INDIRECT)),
    "read-only": ("bad-direction", RawDesc(0, 2048)),
    "empty": ("empty-buffer", RawDesc(0, 0, DESC_F_WRITE)),
    "a byte": ("short-buffer", RawDesc(0, 1, DESC_F_WRITE)),
    "a byte less than a header": ("short-buffer", RawDesc(0, 11, DESC_F_WRITE)),
    "loop of nothing": ("chain-too-long", RawDesc(0, 0, DESC_F_WRITE | DESC_F_NEXT)),
    "next beyond ring": ("bad-next", RawDesc(0, 8, DESC_F_WRITE | DESC_F_NEXT, SIZE)),
    "table beyond memory": ("bad-address", RawDesc(1 << 40, 16, DESC_F_INDIRECT)),
    "empty table": ("indirect-length", RawDesc(0, 0, DESC_F_INDIRECT)),
}


# What a table in the receiveq holds, and its length in the ring where that is another.
RECEIVE_TABLES: dict[str, tuple[str, list[RawDesc], int | None]] = {
    "read-only": ("bad-direction", [RawDesc(0, 2048)], None),
    "second read-only": (
        "bad-direction",
        [RawDesc(0, 8, DESC_F_WRITE | DESC_F_NEXT, 1), RawDesc(0, 2048)],
        None,
    ),
    "empty": ("empty-buffer", [RawDesc(0, 0, DESC_F_WRITE)], None),
    "a byte less than a header": (
        "short-buffer",
        [RawDesc(0, 5, DESC_F_WRITE | DESC_F_NEXT, 1), RawDesc(0, 6, DESC_F_WRITE)],
        None,
    ),
    "beyond memory": ("bad-address", [RawDesc(1 << 40, 2048, DESC_F_WRITE)], None),
    "in a hole": ("bad-address", [RawDesc(BEYOND - 1, 2048, DESC_F_WRITE)], None),
    "odd": ("indirect-length", [RawDesc(0, 2048, DESC_F_WRITE)], 24),
    "huge": ("indirect-length", [RawDesc(0, 2048, DESC_F_WRITE)], 0xFFFF_FFF0),
}
SPLIT_RECEIVE_TABLES = RECEIVE_TABLES | {
    "table": ("indirect-nested", [RawDesc(0, 16, DESC_F_INDIRECT)], None),
    "loop": ("chain-too-long", [RawDesc(0, 1, DESC_F_WRITE | DESC_F_NEXT, 0)], None),
    "next beyond": ("bad-next", [RawDesc(0, 1, DESC_F_WRITE | DESC_F_NEXT, 1)], None),
}


@pytest.mark.parametrize("name", SPLIT_RECEIVE_TABLES)
def test_receiveq_table(wire: Wire, name: str) -> None:
    fault, descs, table_len = SPLIT_RECEIVE_TABLES[name]
    a, b, c = trio(wire)
    where, gpa = a.memory.allocate(2048), a.memory.allocate(16 * len(descs))
    raw = a.receiveqs[0].raw
    for i, desc in enumerate(descs):
        raw.write_desc_at(gpa + 16 * i, desc._replace(addr=desc.addr or where))
    length = 16 * len(descs) if table_len is None else table_len
    for i in range(SIZE):
        raw.write_desc(i, RawDesc(gpa, length, DESC_F_INDIRECT))
    b.send([frame(A, B)] * 3)
    b.drain()
    wire.wait_state("a", "fault")
    assert str(wire.info("a")["error"]).endswith(f"({fault})")
    assert wire.drops("a") == {"ring-fault": 3}
    check_others(wire, b, c)


@pytest.mark.parametrize("number", [SIZE, 0xFFFF])
def test_receiveq_head(wire: Wire, number: int) -> None:
    a, b, c = trio(wire)
    for i in range(SIZE):
        a.receiveqs[0].raw.write_avail(i, number)
    b.send([frame(A, B)] * 3)
    b.drain()
    wire.wait_state("a", "fault")
    assert str(wire.info("a")["error"]).endswith("(bad-head)")
    assert wire.drops("a") == {"ring-fault": 3}
    check_others(wire, b, c)


class TwoFaced(SoftwareGuest):
    """A guest whose frontend connects to two ports, with the same memory and the same rings."""

    def connect_again(self, path: Path) -> Frontend:
        second = Frontend.connect(path, 5.0)
        second.negotiate(self.wanted.features, self.wanted.protocol_features, required=0)
        first, self._frontend = self._frontend, second
        try:
            self.start_rings()
        finally:
            self._frontend = first
        return second


def test_two_ports_with_one_memory(wire: Wire) -> None:
    """Both ports take from one transmitq and fill one receiveq: the confusion is that guest's."""
    a = wire.enter(TwoFaced(A, buffers=BufferOptions(queue_size=SIZE), regions=MEMORY))
    a.connect(wire.port("a"))
    b, c, d = wire.guest("b", 2), wire.guest("c", 3), wire.guest("d", 4)
    teach(a, b, c, d)
    second = a.connect_again(wire.port("a2"))
    try:
        wire.wait_state("a2", "ready")
        raw, where = a.transmitqs[0].raw, a.memory.allocate(1024)
        a.memory.write(where, bytes(12) + frame(mac(4), A))
        with exchanging(b, c):
            for _ in range(50):
                for _ in range(4):
                    raw.offer(RawDesc(where, 72))
                a.transmitqs[0].kick()
                d.send([frame(A, mac(4))] * 8)
                d.drain()
            got = d.recv(200)
            assert got == [frame(mac(4), A)] * 200
            # Each of them takes all that it sees: twice what was sent.
            for name in ("a", "a2"):
                wire.wait_until(
                    lambda name=name: wire.stats(name)["ingress_frames"] >= 200,  # type: ignore[misc]
                    f"port {name} takes all frames",
                )
                assert wire.info(name)["state"] == "ready"
    finally:
        second.close()
    wire.wait_state("a2", "listening")
    a.disconnect()


def test_used_ring_on_top_of_data(wire: Wire) -> None:
    """A guest may have its own frames and rings overwritten; the switch minds neither."""
    a, b, c = trio(wire)
    layout, raw = a.transmitqs[0].layout, a.transmitqs[0].raw
    # What it sends lies in the used ring, its receive buffers in its receiveq's descriptors.
    raw.offer(RawDesc(layout.used_gpa, 1024))
    a.transmitqs[0].kick()
    for i in range(SIZE):
        a.receiveqs[0].raw.write_desc(
            i, RawDesc(a.receiveqs[0].layout.desc_gpa, 16 * SIZE, DESC_F_WRITE)
        )
    for _ in range(4):
        b.send([frame(A, B)] * 64)
        b.drain()
        check_others(wire, b, c)


@pytest.mark.parametrize("name", RECEIVE)
def test_receiveq(wire: Wire, name: str) -> None:
    fault, desc = RECEIVE[name]
    a, b, c = trio(wire)
    queue = a.receiveqs[0]
    where = a.memory.allocate(2048)
    for i in range(SIZE):
        queue.raw.write_desc(i, desc._replace(addr=desc.addr or where, next=desc.next or i))
    # To everyone: the others get theirs although it fails for one.
    sent = frames(BROADCAST, B, [60, 1514, 300])
    b.send(sent)
    assert c.recv(3) == sent
    b.drain()
    wire.wait_state("a", "fault")
    error = wire.info("a")["error"] or ""
    assert error.startswith("receiveq0: ")
    assert error.endswith(f"({fault})")
    assert wire.drops("a") == {"ring-fault": 3}
    check_others(wire, b, c)


@pytest.mark.parametrize(("by", "fault"), [(SIZE + 1, "avail-index"), (-300, "avail-index")])
def test_receiveq_index(wire: Wire, by: int, fault: str) -> None:
    a, b, c = trio(wire)
    a.receiveqs[0].raw.avail_idx += by
    # What it had offered before may still be used up; the index is looked at after that.
    b.send([frame(A, B)] * 300)
    b.drain()
    wire.wait_state("a", "fault")
    assert str(wire.info("a")["error"]).endswith(f"({fault})")
    check_others(wire, b, c)


def test_neighbours_under_load(wire: Wire) -> None:
    """Two guests under full load, compared byte by byte, while a third does all of the above."""
    a, b, c = trio(wire)
    path = a.frontend.path
    with exchanging(b, c):
        for _, deed in TRANSMIT.values():
            deed(a)
            a.transmitqs[0].kick()
            wire.wait_state("a", "fault")
            a.connect(path)
    assert wire.drops("b") == wire.drops("c") == {}
