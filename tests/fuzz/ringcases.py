"""Hostile guests, made up by seed: valid rings first, then some lies about them.

A case is plain data (what `Bed.run` takes), so that it can be written to a file, cut down and run
again. Fields are struck where they hurt: at the edges of regions, rings and integers.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from tests.fuzz.bed import BROADCAST, HOSTILE_MAC, MACS, PLACES, RingSetup, setup_row
from vswitch import ethertypes
from vswitch.lab.guest.raw import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    PACKED_F_AVAIL,
    PACKED_F_USED,
)

DATA = 0x2000
"""Where the frames lie; below are the rings that were not put elsewhere."""
SLOTS = 8
SLOT = 0x400
TABLES = 0x5000
RX_DATA = 0x6000

END0, END1 = PLACES[0].size, PLACES[1].gpa + PLACES[1].size
EDGES = [edge for p in PLACES for edge in (p.gpa, p.gpa + p.size)]
ADDRESSES = [
    *(edge + delta & (1 << 64) - 1 for edge in EDGES for delta in (-17, -16, -13, -8, -1, 0, 1)),
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 72,
    (1 << 64) - 1,
    0x10000,
]
LENGTHS = [0, 1, 9, 10, 11, 12, 13, 14, 25, 26, 27, 60, 600, 4096, 65535, 1 << 31, (1 << 32) - 1]
U16 = [0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]

JOURNAL_IDENTITY = 77

FRAMES = 4096
"""Different frames, each made once."""

_DESC = struct.Struct("<QIHH")

Op = list[Any]


@functools.cache
def _frame(number: int) -> str:
    """virtio_net_hdr and frame of some kind as hex digits; the frame is 600 bytes long."""
    rng = Random(number)
    dst = rng.choice([MACS["left"], MACS["right"], BROADCAST, HOSTILE_MAC, b"\x01\x00\x5e\0\0\1"])
    src = rng.choice([HOSTILE_MAC] * 8 + [MACS["left"], bytes(6), BROADCAST, rng.randbytes(6)])
    tags = rng.choice([b""] * 4 + [b"\x81\x00\x00\x05", b"\x88\xa8\x00\x01\x81\x00\x0f\xff"])
    flags = gso = size = start = offset = 0
    kind = rng.choice(["plain", "tcp4", "tcp6", "udp4", "udp6", "ufo"])
    l3 = 14 + len(tags)
    body = b""
    if kind != "plain":
        flags, size = 1, rng.choice([1, 7, 8, 100, 536, 1400, 0xFFFF])
        v6 = kind.endswith("6")
        proto = 6 if kind.startswith("tcp") else 17
        extra = rng.choice([b"", b"", bytes(8)]) if v6 else b""
        options = rng.choice([0, 0, 4, 40])
        if v6:
            ip = struct.pack(">IHBB", 0x60000000, 500, 0 if extra else proto, 64) + bytes(32)
            ip += bytes([proto]) + extra[1:] if extra else b""
        else:
            ihl = 5 + options // 4
            ip = struct.pack(">BBHHHBBH", 0x40 | ihl, 0, 560, 7, 0, 64, proto, 0) + bytes(8)
            ip += bytes(options)
        start = l3 + len(ip)
        offset = 16 if proto == 6 else 6
        words = rng.choice([5, 5, 8, 15])
        l4 = bytes(12) + bytes([words << 4, 0x18]) + bytes(46) if proto == 6 else bytes(8)
        body = ip + l4
        gso = {"tcp4": 1, "tcp6": 4, "udp4": 5, "udp6": 5, "ufo": 3}[kind] | rng.choice(
            [0] * 5 + [0x80]
        )
        if rng.random() < 0.2:
            gso = 0
    addressed = ethertypes.IPV6 if kind.endswith("6") else ethertypes.IPV4
    ethertype = ethertypes.wire(ethertypes.EXPERIMENT if kind == "plain" else addressed)
    frame = bytearray((dst + src + tags + ethertype + body).ljust(600, b"\x42"))
    fields = [flags, gso, 0, size, start, offset]
    # Lies about the header.
    while rng.random() < 0.3:
        which = rng.randrange(6)
        fields[which] = rng.choice([*U16, len(frame), len(frame) - 1, start - 1, start + 1])
    if rng.random() < 0.2 and body:
        at = rng.randrange(l3, min(l3 + len(body), 600))
        frame[at] = rng.choice([0, 1, 4, 0x0F, 0x40, 0x4F, 0x60, 0xFF])
    numbers = [fields[0] & 0xFF, fields[1] & 0xFF, *(field & 0xFFFF for field in fields[2:])]
    header = struct.pack("<BBHHHHH", *numbers, 0)
    return (header + frame).hex()


def _pieces(rng: Random, transmit: bool, header: int) -> list[tuple[int, int, int]]:
    """Good buffers of one chain: (address, length, flags)."""
    write = 0 if transmit else DESC_F_WRITE
    base = (DATA if transmit else RX_DATA) + SLOT * rng.randrange(SLOTS)
    if not transmit:
        if rng.random() < 0.03:
            return [(base, 0, write)] * rng.choice([1, 3])
        room = rng.choice([SLOT, SLOT, 2048, 80, 13, header])
        cuts = rng.choice([[], [], [header], [5], [header, header + 3, 700]])
    else:
        room = header + rng.choice([60, 600, 600, 13, 14, 0, 300])
        cuts = rng.choice([[], [], [header], [3, 7], [header, header + 14], list(range(1, 9))])
    edges = [0, *(c for c in cuts if 0 < c < room), room]
    found = [(base + a, b - a, write) for a, b in itertools.pairwise(edges)]
    if transmit and rng.random() < 0.15:
        # A long one, from the same bytes again and again.
        found += [(base + header + 100, 400, write)] * rng.choice([3, 40, 160])
    if rng.random() < 0.05:
        found.insert(rng.randrange(len(found) + 1), (base, 0, write))
    if rng.random() < 0.05:
        # Across the border of two regions that touch.
        found[-1] = (END0 - 30, 100, write)
    return found


def _lie(rng: Random, desc: list[int], size: int) -> None:
    """Change one field of [address, length, flags, next]."""
    field = rng.choice([0, 0, 1, 1, 2, 3])
    if field == 0:
        desc[0] = rng.choice(ADDRESSES)
    elif field == 1:
        desc[1] = rng.choice(LENGTHS)
    elif field == 2:
        desc[2] ^= rng.choice([1, 2, 4, 5, 6, 7, 0x8, 0x80, 0x8000, 0x8080])
    else:
        desc[3] = rng.choice([*U16, size, size - 1, size + 1])


def _layout(rng: Random, setup: RingSetup, high: int) -> None:
    """Put the parts of a ring somewhere: apart, at the ends of regions, on top of each other."""
    size = setup.size
    lens = [16 * size, 4, 4] if setup.packed else [16 * size, 6 + 2 * size, 6 + 8 * size]
    setup.desc, setup.avail, setup.used = high, high + 0x800, high + 0xA80
    if size > 64:
        setup.desc, setup.avail, setup.used = 0x0000, 0x1000, 0x1400
    for name, length, align in zip(("desc", "avail", "used"), lens, (16, 4, 4), strict=True):
        if rng.random() < 0.15:
            place = rng.choice(PLACES)
            if place.size >= length:
                setattr(setup, name, place.gpa + (place.size - length) // align * align)
    if rng.random() < 0.05:
        victim = rng.choice(["desc", "avail", "used"])
        setattr(setup, victim, rng.choice([setup.desc, setup.avail, setup.used, DATA, TABLES]))
    if rng.random() < 0.03:
        victim = rng.choice(["desc", "avail", "used"])
        setattr(setup, victim, rng.choice(ADDRESSES))


def _setup(rng: Random, transmit: bool, packed: bool) -> RingSetup:
    setup = RingSetup(packed=packed)
    if packed:
        setup.size = rng.choice([1, 2, 3, 7, 16, 33, 64])
        setup.base = rng.choice([0x8000, 0x8000, 0, setup.size - 1, 0x8000 | setup.size - 1])
    else:
        setup.size = rng.choice([1, 2, 4, 16, 64, 64, 128])
    setup.event_idx = rng.random() < 0.7
    setup.indirect = rng.random() < 0.85
    setup.mergeable = rng.random() < 0.7
    setup.modern = rng.random() < 0.8
    setup.offloads = rng.choice([0x7F, 0x7F, 0x01, 0x07, 0])
    setup.enabled = rng.random() < 0.97
    _layout(rng, setup, 0 if transmit else 0x1000)
    return setup


def _across(setup: RingSetup) -> None:
    """Put each part of a ring across the border of two pages, and one across that of regions."""
    setup.desc, setup.avail, setup.used = 0x3F00, 0x4FF0, 0x7F80
    if setup.size > 64:
        setup.used = 0x7F00


def _split(rng: Random, setup: RingSetup, transmit: bool, header: int, lies: int) -> list[Op]:
    """Descriptors, tables and the avail ring."""
    ops: list[Op] = []
    size = setup.size
    first = rng.choice([0, 0, 0, 0xFFFF, 0x8000 - 1])
    free = list(range(size))
    if rng.random() < 0.5:
        rng.shuffle(free)
    descs: dict[int, list[int]] = {}
    table_rows: list[tuple[int, list[int]]] = []
    heads: list[int] = []
    table = TABLES if transmit else TABLES + 0x800
    for _ in range(rng.choice([1, 2, 5, 20, 64, 70])):
        pieces = _pieces(rng, transmit, header)
        wanted_table = setup.indirect and (rng.random() < 0.3 or len(pieces) > 12)
        if wanted_table:
            pieces = pieces[:60]
            if table + 16 * len(pieces) > TABLES + 0x1000:
                table = TABLES
            for i, (addr, length, flags) in enumerate(pieces):
                more = DESC_F_NEXT if i + 1 < len(pieces) else 0
                table_rows.append((table + 16 * i, [addr, length, flags | more, i + 1]))
            pieces = [(table, 16 * len(pieces), DESC_F_INDIRECT)]
            table += 16 * len(pieces)
        if len(free) < len(pieces):
            break
        mine = [free.pop(0) for _ in pieces]
        for i, (addr, length, flags) in enumerate(pieces):
            more = i + 1 < len(mine)
            link = mine[i + 1] if more else 0
            descs[mine[i]] = [addr, length, flags | (DESC_F_NEXT if more else 0), link]
        heads.append(mine[0])
    for _ in range(lies):
        rows = [*descs.values(), *(row for _, row in table_rows)]
        if rows and rng.random() < 0.85:
            _lie(rng, rng.choice(rows), size)
        elif heads:
            heads[rng.randrange(len(heads))] = rng.choice([*U16, size, size - 1])
    for index, row in descs.items():
        ops.append(["write", setup.desc + 16 * index, _desc(row)])
    for gpa, row in table_rows:
        ops.append(["write", gpa, _desc(row)])
    for i, head in enumerate(heads):
        where = setup.avail + 4 + 2 * ((first + i) % size)
        ops.append(["write", where, struct.pack("<H", head & 0xFFFF).hex()])
    idx = first + len(heads)
    if lies and rng.random() < 0.15:
        idx += rng.choice([size, size + 1, 0x8000, -1, -len(heads) - 1, 1])
    flags = rng.choice([0, 0, 1, 0xFFFF])
    ops.append(["write", setup.used + 2, struct.pack("<H", first & 0xFFFF).hex()])
    ops.append(["write", setup.avail, struct.pack("<HH", flags, idx & 0xFFFF).hex()])
    event = first + rng.choice([0, 1, 5, 0x8000])
    ops.append(["write", setup.avail + 4 + 2 * size, struct.pack("<H", event & 0xFFFF).hex()])
    return ops


def _packed(rng: Random, setup: RingSetup, transmit: bool, header: int, lies: int) -> list[Op]:
    ops: list[Op] = []
    size = setup.size
    at, wrap = setup.base & 0x7FFF, setup.base >> 15
    if at >= size:
        at = 0
    rows: list[tuple[int, list[int]]] = []
    table = TABLES if transmit else TABLES + 0x800
    left = size
    ident = 0
    tables: list[tuple[int, list[int]]] = []
    while left:
        pieces = _pieces(rng, transmit, header)
        ident = rng.choice([ident + 1, ident, rng.choice(U16)])
        if setup.indirect and (rng.random() < 0.3 or len(pieces) > 12):
            pieces = pieces[:60]
            if table + 16 * len(pieces) > TABLES + 0x1000:
                table = TABLES
            for i, (addr, length, flags) in enumerate(pieces):
                # An indirect entry has its id before its flags, as every packed one.
                tables.append((table + 16 * i, [addr, length, 0, flags]))
            pieces = [(table, 16 * len(pieces), DESC_F_INDIRECT)]
            table += 16 * len(pieces)
        pieces = pieces[:left]
        for i, (addr, length, flags) in enumerate(pieces):
            available = PACKED_F_AVAIL if wrap else PACKED_F_USED
            more = DESC_F_NEXT if i + 1 < len(pieces) else 0
            rows.append((at, [addr, length, ident & 0xFFFF, flags | more | available]))
            at += 1
            left -= 1
            if at == size:
                at, wrap = 0, wrap ^ 1
        if rng.random() < 0.1:
            break
    for _ in range(lies):
        row = rng.choice(tables if tables and rng.random() < 0.3 else rows)[1]
        row[2], row[3] = row[3], row[2]
        _lie(rng, row, size)
        row[2], row[3] = row[3], row[2]
    for index, row in rows:
        ops.append(["write", setup.desc + 16 * index, _desc(row)])
    for gpa, row in tables:
        ops.append(["write", gpa, _desc(row)])
    event = struct.pack("<HH", rng.choice(U16), rng.choice([0, 1, 2, 3, 0xFFFF]))
    ops.append(["write", setup.avail, event.hex()])
    return ops


def _desc(row: list[int]) -> str:
    addr, length, third, fourth = row
    return _DESC.pack(
        addr & (1 << 64) - 1, length & 0xFFFFFFFF, third & 0xFFFF, fourth & 0xFFFF
    ).hex()


def _journal(rng: Random, setup: RingSetup) -> str:
    """Notes about a ring as a frontend that kept them may hand them back (JournalC, ring.pxd)."""
    number = [0, 1, 2, 63, 64, 65, setup.size, setup.size - 1, 1023, 1024, 1025, 0x8000, 0xFFFF]
    raw = struct.pack("<QIH", JOURNAL_IDENTITY, rng.choice(number) << 16 | rng.choice(number),
                      rng.choice([0, 1, 2, 0xFFFF]))  # fmt: skip
    raw += struct.pack("<H", rng.choice([0, 0x8000, setup.base & 0xFFFF, *number]) & 0xFFFF)
    for _ in range(2):
        chains = rng.choice([0, 0, 1, 2, 5, 70])
        claimed = chains if rng.random() < 0.7 else rng.choice(number)
        batch = struct.pack(
            "<HHBBH", claimed & 0xFFFF, rng.choice([0, 0, *number]) & 0xFFFF,
            rng.choice([0, 1, 255]), rng.choice([0, 1]), rng.choice([0xFFFF, 0, *number]) & 0xFFFF,
        )  # fmt: skip
        for i in range(chains):
            count = rng.choice([1, 1, 1, 2, *number]) & 0xFFFF
            batch += struct.pack("<HHI", i, count, rng.choice(LENGTHS))
        raw += batch.ljust(8 + 8 * 1024, b"\0")
    return raw.rstrip(b"\0").hex()


def make(seed: int, across: int | None = None) -> dict[str, Any]:
    """The case of a seed; `across` is a ring whose parts are to lie across borders of pages."""
    rng = Random(seed)
    case: dict[str, Any] = {"kind": "rings", "seed": seed}
    if rng.random() < 0.05:
        case["max_len"] = rng.choice([78, 500, 1518])
    if rng.random() < 0.05:
        case["egress_max_len"] = rng.choice([78, 500, 1518])
    if rng.random() < 0.03:
        case["link_down"] = True
    if rng.random() < 0.04:
        case["left_up"] = False
        case["right_up"] = rng.random() < 0.5
    if seed % 16 == 0:
        case["storm"] = True
    ops: list[Op] = []
    packed = rng.random() < 0.45
    lies = rng.choice([0, 0, 1, 1, 2, 4])
    for slot in range(SLOTS):
        ops.append(["write", DATA + SLOT * slot, _frame(rng.randrange(FRAMES))])
    builders: list[Callable[[], list[Op]]] = []
    setups = {}
    for index in (0, 1):
        setup = setups[index] = _setup(rng, bool(index), packed)
        if index == across:
            _across(setup)
        header_len = 12 if setup.modern or setup.mergeable else 10
        build = _packed if packed else _split
        mine = lies if rng.random() < 0.7 else 0
        builders.append(partial(build, rng, setup, bool(index), header_len, mine))
    for index in (0, 1):
        ops += builders[index]()
        if rng.random() < 0.15:
            setups[index].identity = JOURNAL_IDENTITY
            ops.append(["journal", index, _journal(rng, setups[index])])
        if "link_down" in case:
            setups[index].enabled = False  # as a port does with its rings then
        ops.append(["start", index, setup_row(setups[index])])
    if rng.random() < 0.2:
        ops.append(["log", rng.choice([None, setups[0].used, *ADDRESSES])])
    for _ in range(rng.choice([1, 2, 3])):
        what = rng.random()
        if what < 0.5:
            ops.append(["turn", rng.random() < 0.5])
        if what < 0.8:
            who, to = rng.choice(["left", "right"]), rng.choice(["hostile", "all"])
            ops.append(["send", who, to, rng.choice([14, 60, 600, 1514, 3000])])
        if rng.random() < 0.3:
            ops.append(["drain"])
        if rng.random() < 0.3:
            # Memory changes under the ring.
            setup = setups[rng.randrange(2)]
            where = rng.choice([setup.desc, setup.avail, setup.used, DATA, TABLES])
            where += rng.randrange(0, 256, 2)
            ops.append(["write", where, struct.pack("<H", rng.choice(U16)).hex()])
        if rng.random() < 0.05:
            ops.append(["unplug", rng.randrange(len(PLACES))])
        if rng.random() < 0.05:
            ops.append(["stop", rng.randrange(2)])
    ops.append(["turn", rng.random() < 0.5])
    case["ops"] = ops
    return case
