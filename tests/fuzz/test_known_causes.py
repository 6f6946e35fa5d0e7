"""What others had to fix, one test a CVE: docs/security-cases.md says what each was about.

Rings are those of a hostile guest in Bed, messages go to a running switch in MessageBench; both
look afterwards whether the neighbours are well, no byte changed and no descriptor was left.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from tests.fuzz import messages
from tests.fuzz.bed import (
    BROADCAST,
    ETHERTYPE,
    HOSTILE_MAC,
    LOG_LEN,
    MACS,
    PLACES,
    Bed,
    RingSetup,
    setup_row,
)
from tests.fuzz.conversations import JOURNAL_LEN, UVA, Message, usual
from tests.fuzz.descriptors import FDS, MEMORY_LEN
from vswitch.lab.guest import Frontend
from vswitch.lab.guest.raw import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, PACKED_F_AVAIL
from vswitch.vhost_user.net import PROTOCOL_FEATURES
from vswitch.vhost_user.protocol import (
    VERSION,
    Feature,
    Inflight,
    LogArea,
    ProtocolFeature,
    Request,
    VringState,
    encode_inflight,
    encode_log,
    encode_mem_table,
    encode_u64,
    encode_vring_state,
)

DATA, TABLE = 0x2000, 0x5000
TX = RingSetup(desc=0, avail=0x800, used=0xA00)
RX = RingSetup(desc=0x1000, avail=0x1800, used=0x1A00)
FRAME = (MACS["right"] + HOSTILE_MAC + ETHERTYPE).ljust(60, b"\x77")
BORDER = PLACES[1].gpa
"""Where two regions touch that lie apart in the switch."""
END = PLACES[1].gpa + PLACES[1].size

Desc = tuple[int, int, int, int]
Op = list[Any]


@pytest.fixture
def bed() -> Iterator[Bed]:
    bed = Bed()
    yield bed
    bed.close()


@pytest.fixture(scope="module")
def bench() -> Iterator[messages.MessageBench]:
    bench = messages.MessageBench()
    yield bench
    bench.close()


def desc(*fields: int) -> str:
    return struct.pack("<QIHH", *fields).hex()


def ring(index: int, setup: RingSetup, descs: list[Desc], heads: int = 1) -> list[Op]:
    """Write descriptors 0, 1, ..., offer the first `heads` of them and start the ring."""
    ops: list[Op] = [["write", setup.desc + 16 * i, desc(*d)] for i, d in enumerate(descs)]
    ops += [["write", setup.avail + 4 + 2 * i, struct.pack("<H", i).hex()] for i in range(heads)]
    ops.append(["write", setup.avail + 2, struct.pack("<H", heads).hex()])
    ops.append(["start", index, setup_row(setup)])
    return ops


def transmit(bed: Bed, descs: list[Desc], *before: Op, setup: RingSetup = TX) -> list[bytes]:
    """Send one chain; returns what the right bystander got of it."""
    got: list[bytes] = []
    bed.drain = lambda: got.extend(bed.right.receive())  # type: ignore[method-assign]
    bed.run({"ops": [*before, *ring(1, setup, descs), ["turn", False], ["drain"]]})
    return got


def receive(
    bed: Bed,
    descs: list[Desc],
    *before: Op,
    length: int = 60,
    setup: RingSetup = RX,
    heads: int = 1,
) -> None:
    """Have the left bystander send a frame to the hostile guest."""
    ops = [*before, *ring(0, setup, descs, heads), ["send", "left", "all", length]]
    bed.run({"ops": ops})


def put(gpa: int, data: bytes) -> Op:
    return ["write", gpa, data.hex()]


def message(request: Request, payload: bytes = b"", *fds: str) -> Message:
    return [int(request), VERSION, payload.hex(), list(fds), None]


def said(bench: messages.MessageBench, *late: Message) -> str:
    """Say the usual up to the rings, then this; returns what the switch has against it."""
    start = [
        message(Request.SET_PROTOCOL_FEATURES, encode_u64(PROTOCOL_FEATURES)),
        message(Request.SET_OWNER),
        message(Request.SET_FEATURES, encode_u64(Feature.VERSION_1 | Feature.PROTOCOL_FEATURES)),
    ]
    bench.run({"ops": [*start, *late]})
    return str(bench.wire.info("bad")["error"])


# DPDK


def test_cve_2018_1059(bed: Bed) -> None:
    header = bytes(12)
    # Half in one region and half in the next, which is elsewhere in the switch.
    whole = header + FRAME
    assert transmit(
        bed, [(BORDER - 30, len(whole), 0, 0)],
        put(BORDER - 30, whole[:30]), put(BORDER, whole[30:]),
    ) == [FRAME]  # fmt: skip
    last = PLACES[3].gpa + PLACES[3].size
    top = (1 << 64) - 8
    for gpa, length in ((END - 71, 72), (END, 72), (last - 16, 72), (top, 72), (0, 1 << 31)):
        assert transmit(bed, [(gpa, length, 0, 0)]) == []
        assert bed.reached.pop("bad-address") == 1
        receive(bed, [(gpa, length, DESC_F_WRITE, 0)], length=1514)
        # 2 GiB from 0 are not there, but a frame's worth of them is.
        assert bed.reached.pop("bad-address", 0) == int(gpa != 0)


def test_cve_2019_14818(bench: messages.MessageBench) -> None:
    number = message(Request.SET_VRING_NUM, encode_vring_state(VringState(0, 256)))
    assert said(bench, *[number] * 500) == "None"
    for request in (Request.SET_VRING_NUM, Request.GET_FEATURES, Request.SET_OWNER):
        for kinds in (["memory"], ["event"] * 8, ["memory"] * 9):
            assert "file descriptors" in said(
                bench, message(request, bytes(8 * (request is Request.SET_VRING_NUM)), *kinds)
            )


def test_cve_2020_10722(bench: messages.MessageBench) -> None:
    for size, offset in (
        ((1 << 64) - 4096, 8192),
        (8192, (1 << 64) - 4096),
        (1 << 63, 1 << 63),
        (4096, MEMORY_LEN),
    ):
        log = message(Request.SET_LOG_BASE, encode_log(LogArea(size, offset)), "memory")
        assert "SET_LOG_BASE" in said(bench, log)


@pytest.mark.parametrize("vring", [0x10000, 0x10001, 1 << 31, (1 << 32) - 1, 256, 4])
def test_cve_2020_10723(bench: messages.MessageBench, vring: int) -> None:
    state = encode_vring_state(VringState(vring, 1))
    for request in (
        Request.SET_VRING_NUM,
        Request.SET_VRING_BASE,
        Request.SET_VRING_ENABLE,
        Request.GET_VRING_BASE,
    ):
        assert f"{request.name}: vring" in said(bench, message(request, state))
    addr = struct.pack("=IIQQQQ", vring, 0, 0, 0, 0, 0)
    assert "SET_VRING_ADDR: vring" in said(bench, message(Request.SET_VRING_ADDR, addr))


def test_cve_2020_10724(bench: messages.MessageBench) -> None:
    for request in (Request.CREATE_CRYPTO_SESSION, Request.CLOSE_CRYPTO_SESSION):
        assert "not supported" in said(bench, message(request, b"\xff" * 600))


def test_cve_2020_10725(bed: Bed) -> None:
    for gpa in (1 << 60, END, (1 << 64) - 1):
        row = struct.pack("<QIHH", gpa, 0, 0, PACKED_F_AVAIL)
        tx = RingSetup(packed=True, base=0x8000, desc=0, avail=0x800, used=0xA00)
        bed.run({"ops": [put(0, row), ["start", 1, setup_row(tx)], ["turn", False]]})
        assert bed.reached.pop("runt") == 1
        row = struct.pack("<QIHH", gpa, 0, 0, PACKED_F_AVAIL | DESC_F_WRITE)
        bed.run(
            {"ops": [put(0, row), ["start", 0, setup_row(tx)], ["send", "left", "hostile", 60]]}
        )
        bed.run({"ops": [put(0, row), ["start", 0, setup_row(tx)], ["send", "left", "all", 60]]})
        assert bed.reached.pop("empty-buffer") >= 1


def test_cve_2020_10726(bench: messages.MessageBench) -> None:
    ask = message(Request.GET_INFLIGHT_FD, encode_inflight(Inflight(0, 0, 2, 256)))
    assert said(bench, *[ask] * 200) == "None"


def test_cve_2020_14378(bed: Bed) -> None:
    """Nothing that is subtracted may pass zero and keep us busy for ever: empty pieces, in a ring
    and in a table."""
    loop = [(DATA, 0, DESC_F_NEXT, 0)]
    assert transmit(bed, loop) == []
    assert bed.reached.pop("chain-too-long") == 1
    rows = [put(TABLE + 16 * i, struct.pack("<QIHH", DATA, 0, DESC_F_NEXT, i)) for i in range(4)]
    assert transmit(bed, [(TABLE, 64, DESC_F_INDIRECT, 0)], *rows) == []
    assert bed.reached.pop("chain-too-long") == 1


@pytest.mark.parametrize("queues", [3, 257, 0xFFFF])
def test_cve_2021_3839(bench: messages.MessageBench, queues: int) -> None:
    told = encode_inflight(Inflight(JOURNAL_LEN, 0, queues, 0xFFFF))
    # The number is not used for anything: the file has room for every ring there can be.
    assert said(bench, message(Request.SET_INFLIGHT_FD, told, "journal")) == "None"


@pytest.mark.parametrize("request_", [Request.GET_INFLIGHT_FD, Request.SET_INFLIGHT_FD])
@pytest.mark.parametrize("n", [0, 1, 2, 8])
def test_cve_2022_0669(bench: messages.MessageBench, request_: Request, n: int) -> None:
    told = encode_inflight(Inflight(JOURNAL_LEN, 0, 2, 256))
    error = said(bench, message(request_, told, *["journal"] * n))
    right = n == (1 if request_ is Request.SET_INFLIGHT_FD else 0)
    assert ("file descriptors" in error) != right


def test_cve_2022_2132(bed: Bed) -> None:
    data = put(DATA, bytes(12) + FRAME)
    # The header in twelve pieces, and in three with empty ones between.
    ones = [(DATA + i, 1, DESC_F_NEXT, i + 1) for i in range(12)]
    assert transmit(bed, [*ones, (DATA + 12, 60, 0, 0)], data) == [FRAME]
    cuts = [(0, 5), (5, 0), (5, 6), (11, 0), (11, 1)]
    pieces = [(DATA + at, length, DESC_F_NEXT, i + 1) for i, (at, length) in enumerate(cuts)]
    assert transmit(bed, [*pieces, (DATA + 12, 60, 0, 0)], data) == [FRAME]
    # As long as the header, or shorter.
    for length in (0, 1, 11, 12):
        assert transmit(bed, [(DATA, length, 0, 0)], data) == []
        assert bed.reached.pop("runt") == 1


def vnet(flags: int, gso: int, size: int, start: int, offset: int) -> bytes:
    return struct.pack("<BBHHHHH", flags, gso, 0, size, start, offset, 0)


def offload(**changes: Any) -> RingSetup:
    return RingSetup(desc=0, avail=0x800, used=0xA00, offloads=0x7F, **changes)


@pytest.mark.parametrize("start", [0, 13, 59, 60, 61, 0x7FFF, 0xFFFF])
@pytest.mark.parametrize("offset", [0, 2, 0xFFFF])
def test_cve_2024_11614(bed: Bed, start: int, offset: int) -> None:
    data = put(DATA, vnet(1, 0, 0, start, offset) + FRAME)
    assert transmit(bed, [(DATA, 72, 0, 0)], data, setup=offload()) == []
    assert bed.reached["bad-csum"] == 1


@pytest.mark.parametrize("size", [0, 1, 7])
@pytest.mark.parametrize("gso", [1, 3, 4, 5, 2, 0x7F, 0x81, 0xFF])
def test_gso_size_of_nothing(bed: Bed, size: int, gso: int) -> None:
    """DPDK 7023f3e532: a gso_size of 0 was believed; here neither that nor 65,000 parts."""
    data = put(DATA, vnet(1, gso, size, 34, 16) + FRAME)
    pieces = [(DATA, 72, DESC_F_NEXT, 1), *[(DATA, 0x3000, DESC_F_NEXT, i + 2) for i in range(5)]]
    assert transmit(bed, [*pieces, (DATA, 100, 0, 0)], data, setup=offload()) == []
    assert bed.reached["bad-gso"] == 1


# Linux: vhost


def test_cve_2014_0055(bed: Bed) -> None:
    """An error in the middle of a frame's buffers: none of them is touched."""
    bad = [(DATA, 100, DESC_F_WRITE, 0), (1 << 50, 2000, DESC_F_WRITE, 0)]
    blank = put(DATA, b"\x99" * 100)
    receive(bed, bad, blank, length=1000, heads=2)
    assert bed.reached["bad-address"] == 1
    assert bed.map[PLACES[0].file_offset + DATA :][:100] == b"\x99" * 100
    (used,) = struct.unpack_from("<H", bed.map, PLACES[0].file_offset + RX.used + 2)
    assert used == 0


@pytest.mark.parametrize("room", [1, 11, 12, 13, 71])
def test_cve_2014_0077(bed: Bed, room: int) -> None:
    """A frame longer than a buffer, and no mergeable ones: it is dropped, not cut or written on.

    A buffer in which not even the header has room is a fault.
    """
    setup = RingSetup(desc=0x1000, avail=0x1800, used=0x1A00, mergeable=False)
    around = put(DATA, b"\x99" * 200)
    receive(bed, [(DATA, room, DESC_F_WRITE, 0)], around, setup=setup)
    assert bed.reached["buffer-small" if room >= 12 else "short-buffer"] == 1
    assert bed.map[PLACES[0].file_offset + DATA :][:200] == b"\x99" * 200


def test_cve_2018_1118(bed: Bed, bench: messages.MessageBench) -> None:
    """Nothing goes out that nobody put there: headers, and the padding of replies."""
    receive(bed, [(DATA, 2000, DESC_F_WRITE, 0)], put(DATA, b"\x99" * 200))
    got = bed.map[PLACES[0].file_offset + DATA :][:200]
    assert got[:12] == bytes(10) + b"\x01\x00"
    assert got[12:72] == (BROADCAST + MACS["left"] + ETHERTYPE).ljust(60, b"\x11")
    assert got[72:] == b"\x99" * 128
    with Frontend.connect(bench.socket) as frontend:
        frontend.negotiate(
            Feature.VERSION_1 | Feature.PROTOCOL_FEATURES, ProtocolFeature.INFLIGHT_SHMFD
        )
        asked = encode_inflight(Inflight(0, 0, 2, 256))
        reply = frontend.request(Request.GET_INFLIGHT_FD, asked)
    assert reply == encode_inflight(Inflight(JOURNAL_LEN, 0, 2, 256))
    assert reply[20:] == bytes(4)
    bench.check()


def test_cve_2019_3900(bed: Bed) -> None:
    """A ring that never runs dry gives way after a burst."""
    setup = RingSetup(size=128, desc=0, avail=0x1000, used=0x1400)
    rows = [(DATA, 72, 0, 0)] * 128
    bed.blank()
    for op in ring(1, setup, rows, heads=128)[:-1]:
        bed.write(op[1], bytes.fromhex(op[2]))
    bed.write(DATA, bytes(12) + FRAME)
    assert bed.start(1, setup)
    frame = bed.right.mac + bed.left.mac + ETHERTYPE + bytes(46)
    bed.left.send(frame)
    assert bed.worker.turn() == 64 + 1
    assert frame in bed.right.receive() or bed.engine.stats(bed.right.port)["drops"]["no-buffer"]
    assert bed.left.given_back() == 1
    bed.stop()
    bed.check()


@pytest.mark.parametrize("count", [1, 64, 1023])
def test_cve_2019_14835(bed: Bed, count: int) -> None:
    """Logging what is written takes no place that a guest's chains could overflow."""
    table = PLACES[0].size - 16 * count
    # All empty but the last, which is enough for the frame.
    rows = [
        put(table + 16 * i, struct.pack("<QIHH", DATA, 0, DESC_F_WRITE | DESC_F_NEXT, i + 1))
        for i in range(count - 1)
    ]
    rows.append(put(table + 16 * (count - 1), struct.pack("<QIHH", DATA, 2000, DESC_F_WRITE, 0)))
    ops = [*rows, *ring(0, RX, [(table, 16 * count, DESC_F_INDIRECT, 0)])]
    bed.run({"ops": [*ops, ["log", 0], ["send", "left", "all", 600]]})
    log = bed.log_map[64 : 64 + LOG_LEN]
    assert log[0] & 1 << (DATA >> 12)


def test_cve_2020_10942(bench: messages.MessageBench) -> None:
    """A descriptor is looked at before it is used, whatever its kind: files are files, and what is
    signalled is an eventfd."""
    for kind in FDS.keys() - {"memory"}:
        table = encode_mem_table([])[:4].replace(b"\0", b"\1", 1) + bytes(4)
        row = struct.pack("=QQQQ", 0, MEMORY_LEN, UVA, 0)
        error = said(bench, message(Request.SET_MEM_TABLE, table + row, kind))
        assert error.startswith("SET_MEM_TABLE") or kind == "journal", (kind, error)
        if not kind.startswith("event"):
            for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
                error = said(bench, message(request, encode_u64(0), kind))
                assert error.startswith(request.name), (kind, error)


def test_cve_2023_1838(bench: messages.MessageBench) -> None:
    """Descriptors that are replaced while rings run, and closed by their sender at once."""
    honest = usual(Random(3))
    late = [
        message(request, encode_u64(vring), "event")
        for request in (Request.SET_VRING_CALL, Request.SET_VRING_KICK, Request.SET_VRING_ERR)
        for vring in (0, 1)
    ]
    bench.run({"ops": [*honest, *late * 30]})


# QEMU


@pytest.mark.parametrize("vring", [4, 255, 1 << 31, (1 << 32) - 1])
def test_cve_2011_2512(bench: messages.MessageBench, vring: int) -> None:
    error = said(bench, message(Request.VRING_KICK, encode_vring_state(VringState(vring, 0))))
    assert "VRING_KICK: vring" in error


@pytest.mark.parametrize("ahead", [65, 1000, 0x8000, 0xFFFF])
def test_cve_2016_5403(bed: Bed, ahead: int) -> None:
    ops = ring(1, TX, [(DATA, 72, 0, 0)])
    idx = put(TX.avail + 2, struct.pack("<H", ahead))
    bed.run({"ops": [*ops, idx, ["turn", False]]})
    assert bed.reached["avail-index"] == 1


def test_cve_2016_6490(bed: Bed) -> None:
    """Buffers of no length: a frame is too short, and a receive buffer without room is a fault."""
    for gpa in (DATA, 1 << 60):
        assert transmit(bed, [(gpa, 0, 0, 0)]) == []
        assert bed.reached.pop("runt") == 1
        receive(bed, [(gpa, 0, DESC_F_WRITE, 0)])
        assert bed.reached.pop("empty-buffer") == 1


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_cve_2016_7422(bed: Bed, length: int) -> None:
    for gpa in (DATA, 0, END - 1):
        assert transmit(bed, [(gpa, length, 0, 0)]) == []
        assert bed.reached.pop("bad-address") == 1


def test_cve_2021_3748(bed: Bed) -> None:
    """num_buffers is part of the one copy: it is there when the first buffer is given back."""
    rows = [(DATA + 0x200 * i, 0x200, DESC_F_WRITE, 0) for i in range(4)]
    receive(bed, rows, length=1514, heads=4)
    at = PLACES[0].file_offset
    assert struct.unpack_from("<H", bed.map, at + DATA + 10) == (3,)
    used = struct.unpack_from("<HHIIIIII", bed.map, at + RX.used)
    assert used[1:] == (3, 0, 0x200, 1, 0x200, 2, 12 + 1514 - 0x400)


@pytest.mark.parametrize("feature", [Feature.HASH_REPORT, Feature.RSS, Feature.RING_RESET])
def test_cve_2023_6693(bench: messages.MessageBench, feature: Feature) -> None:
    """What would change the header's length, or choose queues by a guest's table."""
    features = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES | Feature.MRG_RXBUF | feature
    error = said(bench, message(Request.SET_FEATURES, encode_u64(features)))
    assert error.startswith("SET_FEATURES")


# rust-vmm


def test_cve_2023_41051(bed: Bed) -> None:
    """A piece that is shorter than was asked for is never taken for the whole: here an entry of an
    indirect table across the border of two regions, and one across the end of memory."""
    data = put(DATA, bytes(12) + FRAME)
    entry = struct.pack("<QIHH", DATA, 72, 0, 0)
    for inside in (1, 8, 15):
        table = BORDER - inside
        assert transmit(
            bed, [(table, 16, DESC_F_INDIRECT, 0)], data,
            put(table, entry[:inside]), put(BORDER, entry[inside:]),
        ) == [FRAME]  # fmt: skip
        assert transmit(bed, [(END - inside, 16, DESC_F_INDIRECT, 0)], data) == []
        assert bed.reached.pop("bad-address") == 1


@pytest.mark.parametrize("count", [2, 8, 9, 0xFFFFFFFF])
def test_cve_2023_50711(bench: messages.MessageBench, count: int) -> None:
    """A count beside an array is held against what came: regions of a message."""
    row = struct.pack("=QQQQ", 0, MEMORY_LEN, UVA, 0)
    table = struct.pack("=II", count, 0) + row
    error = said(bench, message(Request.SET_MEM_TABLE, table, "memory"))
    assert f"SET_MEM_TABLE: {count} regions" in error
