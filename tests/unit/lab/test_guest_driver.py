"""The software guest holds the device to its rules: here the device is the test itself."""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.native.null_backend import NullBackend
from vswitch.lab.guest import DEFAULT_FEATURES, DeviceError, GuestError, SoftwareGuest
from vswitch.lab.guest.memory import GuestMemory, plain_layout, scattered_layout
from vswitch.lab.guest.options import by_subject
from vswitch.lab.guest.packets import parse_mac
from vswitch.lab.guest.raw import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, RawRing
from vswitch.lab.guest.shapes import cut
from vswitch.lab.load.load import Flow, Load
from vswitch.vhost_user.protocol import Feature

A = "52:54:00:00:00:01"
B = "52:54:00:00:00:02"


def offline(**options: Any) -> SoftwareGuest:
    features = options.pop("features", DEFAULT_FEATURES)
    guest = SoftwareGuest(A, **by_subject(**{"queue_size": 8, "indirect": False, **options}))
    guest.build_offline(features)
    return guest


@pytest.fixture
def guest() -> Iterator[SoftwareGuest]:
    with offline() as guest:
        yield guest


def use(ring: RawRing, *elems: tuple[int, int]) -> None:
    """Act as the device: give chains back."""
    idx = ring.used_idx
    for i, (head, length) in enumerate(elems):
        ring.write_used(idx + i, head, length)
    ring.used_idx = idx + len(elems)


def deliver(guest: SoftwareGuest, *parts: bytes, num_buffers: int | None = None) -> None:
    """Act as the device: put a frame, header not included, into the next posted buffers."""
    ring = guest.receiveqs[0].raw
    idx = ring.used_idx
    count = len(parts) if num_buffers is None else num_buffers
    header = bytes(10) + struct.pack("<H", count)
    for i, part in enumerate(parts):
        head = ring.read_avail(idx + i)
        data = header + part if i == 0 else part
        guest.memory.write(ring.read_desc(head).addr, data)
        ring.write_used(idx + i, head, len(data))
    ring.used_idx = idx + len(parts)


# Receiving.


def test_frames_and_merged_frames(guest: SoftwareGuest) -> None:
    deliver(guest, b"a" * 60)
    deliver(guest, b"b" * 2036, b"c" * 2048, b"d" * 5)
    assert guest.recv(3, timeout=0.0) == [b"a" * 60, b"b" * 2036 + b"c" * 2048 + b"d" * 5]
    assert guest.receiveqs[0].ring.outstanding == 8


@pytest.mark.parametrize(
    ("elems", "reason"),
    [
        ([(8, 72)], "used id 8 is outside of a ring of size 8"),
        ([(0xFFFF_FFFF, 72)], "used id 4294967295 is outside"),
        ([(0, 72), (0, 72)], "used id 0 is not outstanding"),
        ([(n % 8, 72) for n in range(9)], "used.idx is 9 after 0, with 8 chains outstanding"),
        ([(0, 2049)], "used length 2049 is more than the 2048 bytes posted"),
        ([(0, 11)], "used length 11 is less than the 12 bytes it must have"),
    ],
)
def test_bad_used_elements(guest: SoftwareGuest, elems: list[tuple[int, int]], reason: str) -> None:
    guest.auto_post = False
    ring = guest.receiveqs[0].raw
    for i in range(8):
        guest.memory.write(ring.read_desc(i).addr + 10, b"\x01\x00")
    use(ring, *elems)
    with pytest.raises(DeviceError, match=reason):
        guest.receiveqs[0].ring.recv(10)


def test_used_index_that_goes_back(guest: SoftwareGuest) -> None:
    guest.receiveqs[0].raw.used_idx = -1
    with pytest.raises(DeviceError, match=r"used\.idx is 65535 after 0"):
        guest.poll_frames(1)


@pytest.mark.parametrize(
    ("num_buffers", "reason"),
    [(0, "num_buffers is 0"), (2, "num_buffers is 2, but only 1 of them were used together")],
)
def test_bad_num_buffers(guest: SoftwareGuest, num_buffers: int, reason: str) -> None:
    deliver(guest, b"x" * 60, num_buffers=num_buffers)
    with pytest.raises(DeviceError, match=reason):
        guest.poll_frames(1)


def test_num_buffers_without_mergeable_buffers() -> None:
    for strict in (True, False):
        with offline(features=Feature.VERSION_1, strict=strict) as guest:
            deliver(guest, b"x" * 60, num_buffers=0)
            if strict:
                with pytest.raises(DeviceError, match="num_buffers is 0 without mergeable"):
                    guest.poll_frames(1)
            else:
                assert guest.poll_frames(1) == [b"x" * 60]


def test_guard_bytes() -> None:
    """A write past the reported length, into the buffer or beyond it."""
    for offset in (72, 2047, 2048, 2055):
        with offline(rx_guard_len=8) as guest:
            deliver(guest, b"x" * 60)
            raw = guest.receiveqs[0].raw
            guest.memory.write(raw.read_desc(raw.read_used(0)[0]).addr + offset, b"!")
            with pytest.raises(DeviceError, match=f"wrote at byte {offset} of piece 0"):
                guest.poll_frames(1)


# Sending.


def test_chains_as_the_device_sees_them() -> None:
    frame = bytes(range(100))
    for cuts, indirect, lens in (
        ((), False, [112]),
        ((0,), False, [12, 100]),
        ((-2, 0, 14), False, [10, 2, 14, 86]),
        ((0, 50), True, [12, 50, 50]),
        ((0, 100, 200), True, [12, 100]),
    ):
        with offline(tx_cuts=cuts, indirect=indirect) as guest:
            assert guest.transmitqs[0].ring.send([frame]) == 1
            raw = guest.transmitqs[0].raw
            desc = raw.read_desc(raw.read_avail(0))
            table = raw.layout.desc_gpa
            if indirect:
                assert desc.flags == DESC_F_INDIRECT
                assert desc.len == 16 * len(lens)
                table = desc.addr
            chain = [raw.read_desc_at(table + 16 * i) for i in range(len(lens))]
            assert [d.len for d in chain] == lens
            assert [bool(d.flags & DESC_F_NEXT) for d in chain] == [True] * (len(lens) - 1) + [
                False
            ]
            assert not any(d.flags & DESC_F_WRITE for d in chain)
            assert b"".join(guest.memory.read(d.addr, d.len) for d in chain) == bytes(12) + frame


def test_transmitq_fills_up_and_drains(guest: SoftwareGuest) -> None:
    queue = guest.transmitqs[0]
    assert queue.ring.send([b"x" * 60] * 20) == 8
    assert queue.ring.send([b"x" * 60]) == 0
    use(queue.raw, (3, 0), (0, 12345))
    assert queue.ring.reap() == 2
    assert queue.ring.send([b"y" * 60] * 20) == 2
    assert queue.ring.avail_idx == queue.raw.avail_idx == 10
    use(queue.raw, (3, 0), (3, 0))
    with pytest.raises(DeviceError, match="used id 3 is not outstanding"):
        queue.ring.reap()


def test_frames_that_do_not_fit(guest: SoftwareGuest) -> None:
    with pytest.raises(ValueError, match="a frame of 1519 bytes, slots hold 1518"):
        guest.transmitqs[0].ring.send([bytes(1519)])


@pytest.mark.parametrize("event_idx", [True, False])
def test_when_the_device_is_notified(event_idx: bool) -> None:
    features = DEFAULT_FEATURES if event_idx else DEFAULT_FEATURES & ~Feature.RING_EVENT_IDX
    with offline(features=features) as guest:
        queue = guest.transmitqs[0]
        gpa = queue.layout.used_gpa
        event = gpa + 4 + 8 * queue.layout.size
        queue.ring.send([bytes(60)])
        assert queue.ring.take_kick()
        assert not queue.ring.take_kick()
        # The device wants to hear of the third.
        guest.memory.mapping.store_u16(event if event_idx else gpa, 2 if event_idx else 1)
        queue.ring.send([bytes(60)])
        assert not queue.ring.take_kick()
        guest.memory.mapping.store_u16(gpa, 0)
        queue.ring.send([bytes(60)])
        assert queue.ring.take_kick()


# Shapes and memory.


def test_cut() -> None:
    assert cut(100, 12, ()) == [100]
    assert cut(100, 12, (0,)) == [12, 88]
    assert cut(100, 12, (0, -12, -13, 88, 89, 0)) == [12, 88]
    assert cut(100, 10, (-9, 1, 50)) == [1, 10, 49, 40]


def test_scattered_layout_is_nasty() -> None:
    regions = scattered_layout(8, 1 << 20, 1 << 16)
    assert len(regions) == 8
    by_gpa = sorted(regions, key=lambda r: r.gpa)
    assert [r.uva for r in by_gpa] == sorted((r.uva for r in regions), reverse=True)
    touching = [x.gpa + x.size == y.gpa for x, y in itertools.pairwise(by_gpa)]
    assert True in touching
    assert False in touching
    with GuestMemory(regions) as memory:
        for region in regions:
            memory.write(region.gpa + region.size - 4, b"last")
        for region in regions:
            assert memory.read(region.gpa + region.size - 4, 4) == b"last"
            assert memory.uva(region.gpa + 1) == region.uva + 1
        # From one region into the next, as a CPU sees it.
        memory.write(by_gpa[0].gpa + by_gpa[0].size - 2, b"over")
        assert memory.read(by_gpa[1].gpa, 2) == b"er"


def test_memory_ends() -> None:
    with GuestMemory(plain_layout(8192)) as memory:
        for gpa, length in ((8192, 1), (8191, 2), (1 << 63, 1), (0, 1 << 62)):
            with pytest.raises(GuestError, match="guest memory has nothing at"):
                memory.read(gpa, length)
        memory.allocate(8000)
        with pytest.raises(GuestError, match="has 200 bytes left"):
            memory.allocate(200)
        memory.reset()
        memory.allocate(8192)


# Load.


def test_null_backend() -> None:
    """The generator alone: both loops at once, and the queues are usable after it."""
    options = {"queue_size": 256, "features": DEFAULT_FEATURES}
    with offline(**options) as a, offline(**options) as b:
        null = NullBackend(a.transmitqs[0], b.receiveqs[0], 60)
        thread = threading.Thread(target=null.run)
        thread.start()
        try:
            load = Load([Flow(a.transmitqs[0], b.receiveqs[0], [bytes(60)])])
            for _ in range(3):
                (result,) = load.run(60.0, frames=100_000, settle_s=60.0, quiet_s=30.0)
                assert (result.sent, result.received) == (100_000, 100_000)
                assert result.received_bytes == 6_000_000
                assert result.frames_per_s > 0
            load = Load([Flow(a.transmitqs[0], b.receiveqs[0], [bytes(60)], window=1)])
            (result,) = load.run(60.0, frames=1000, settle_s=60.0, quiet_s=30.0)
            assert (result.sent, result.received) == (1000, 1000)
        finally:
            null.stop()
            thread.join()
        assert null.forwarded == 301_000
        a.transmitqs[0].ring.reap()
        assert a.transmitqs[0].ring.outstanding == 0
        assert a.transmitqs[0].ring.free_slot_count == 256


def test_load_sees_what_is_wrong() -> None:
    """Lost, corrupt and doubled frames; the test delivers what was "sent" as it likes."""
    template = parse_mac(B) + parse_mac(A) + bytes(46)
    with offline() as a, offline() as b:
        sender = Flow(a.transmitqs[0], None, [template], verify=True)
        (sent,) = Load([sender]).run(5.0, frames=5)
        assert sent.sent == 5
        raw = a.transmitqs[0].raw
        out = []
        for i in range(5):
            desc = raw.read_desc(raw.read_avail(i))
            out.append(a.memory.read(desc.addr, desc.len)[12:])
        assert [int.from_bytes(f[-8:], "little") for f in out] == [0, 1, 2, 3, 4]
        receiver = Flow(None, b.receiveqs[0], [template], verify=True)
        damaged = out[2][:20] + b"!" + out[2][21:]
        for frame in (out[0], damaged, out[1], out[4], out[3], out[4][:-1]):
            deliver(b, frame)
        (result,) = Load([receiver]).run(0.05)
        assert result.received == 6
        # 2 never came whole; 3 came when 4 had been there.
        assert (result.corrupt, result.lost, result.misordered) == (2, 2, 1)


def test_load_after_other_frames() -> None:
    """Slots whose frames the device gives back during the run carry the flow's frames, too."""
    with offline() as a, offline() as b:
        queue = a.transmitqs[0]
        assert queue.ring.send([b"other" * 20] * 3, header=b"\xff" * 12) == 3
        load = Load([Flow(queue, b.receiveqs[0], [b"flow" * 20])])
        assert load.run(5.0, frames=5)[0].sent == 5
        use(queue.raw, *[(queue.raw.read_avail(i), 0) for i in range(8)])
        assert load.run(5.0, frames=8)[0].sent == 8
        for i in range(8, 16):
            desc = queue.raw.read_desc(queue.raw.read_avail(i))
            assert a.memory.read(desc.addr, desc.len) == bytes(12) + b"flow" * 20


def test_load_reports_a_broken_device() -> None:
    with offline() as a, offline() as b:
        use(b.receiveqs[0].raw, (9, 72))
        flow = Flow(a.transmitqs[0], b.receiveqs[0], [bytes(60)])
        with pytest.raises(DeviceError, match="receiveq 0: used id 9 is outside"):
            Load([flow]).run(1.0)
    with offline() as a, offline() as b:
        use(a.transmitqs[0].raw, (1, 0), (1, 0))
        flow = Flow(a.transmitqs[0], b.receiveqs[0], [bytes(60)])
        with pytest.raises(DeviceError, match="transmitq 0: used"):
            Load([flow]).run(1.0)


def test_load_writes_off_a_stuck_window() -> None:
    for seconds in (0.1, 0.8, 6.4, 25.6):
        with offline() as a, offline() as b:
            flow = Flow(a.transmitqs[0], b.receiveqs[0], [bytes(60)], window=4, write_off_s=0.01)
            (result,) = Load([flow]).run(seconds)
        # It gives up what it sent before, then again: longer where it does not get the processor.
        if result.written_off >= 8:
            break
    # The ring has eight places, and nobody takes anything out.
    assert result.sent == 8
    assert result.written_off >= 8
