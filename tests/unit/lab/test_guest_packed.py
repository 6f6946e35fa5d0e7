"""Packed and in-order rings of the software guest; the test is the device."""

from __future__ import annotations

import struct
import threading
from typing import Any

import pytest

from benchmarks.native.null_backend import NullBackend
from vswitch.lab.guest import DEFAULT_FEATURES, DeviceError, GuestError, SoftwareGuest
from vswitch.lab.guest.driver import TransmitQueue
from vswitch.lab.guest.options import by_subject
from vswitch.lab.guest.queues import GuestQueue
from vswitch.lab.guest.raw import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    EVENT_FLAGS_DESC,
    EVENT_FLAGS_DISABLE,
    EVENT_FLAGS_ENABLE,
    PACKED_F_AVAIL,
    PACKED_F_USED,
    RawPackedDesc,
    RawPackedRing,
)
from vswitch.lab.load.load import Flow, Load
from vswitch.vhost_user.protocol import Feature

A = "52:54:00:00:00:01"
PACKED = DEFAULT_FEATURES | Feature.RING_PACKED
WRAP = 0x8000


def offline(**options: Any) -> SoftwareGuest:
    features = options.pop("features", PACKED)
    guest = SoftwareGuest(A, **by_subject(**{"queue_size": 8, "indirect": False, **options}))
    guest.build_offline(features)
    return guest


def flags_of(desc: RawPackedDesc) -> tuple[bool, bool, int]:
    """AVAIL, USED, and the rest of the flags."""
    rest = desc.flags & ~(PACKED_F_AVAIL | PACKED_F_USED)
    return bool(desc.flags & PACKED_F_AVAIL), bool(desc.flags & PACKED_F_USED), rest


class Device:
    """Takes chains of a packed ring and uses them as it is told, right or wrong."""

    def __init__(self, raw: RawPackedRing, position: int = WRAP) -> None:
        self.raw = raw
        self.avail = position
        self.used = position

    def take(self) -> tuple[int, list[RawPackedDesc]]:
        """Buffer id and descriptors of the next chain."""
        chain = []
        while True:
            desc = self.raw.read_desc(self.avail & (WRAP - 1))
            avail, used, rest = flags_of(desc)
            assert avail == bool(self.avail & WRAP) != used
            self.avail = self.raw.after(self.avail, 1)
            chain.append(desc)
            if not rest & DESC_F_NEXT:
                return desc.id, chain

    def use(self, id: int, length: int = 0, entries: int = 1) -> None:
        self.raw.write_used(self.used, id, length)
        self.used = self.raw.after(self.used, entries)


def test_chains_as_the_device_sees_them() -> None:
    """Through the end of the ring, where the bits change their meaning."""
    frame = bytes(range(100))
    for first_idx in (0, 6, 8 + 6, 0xFFFF):
        with offline(tx_cuts=(-2, 0, 14), first_idx=first_idx) as guest:
            queue = guest.transmitqs[0]
            position = first_idx % 8 | (0 if first_idx // 8 % 2 else WRAP)
            assert queue.base == position | position << 16
            device = Device(queue.raw_packed(), position)
            assert queue.ring.send([frame, frame, frame]) == 2
            for _ in range(2):
                _, chain = device.take()
                assert [d.len for d in chain] == [10, 2, 14, 86]
                assert [flags_of(d)[2] for d in chain] == [DESC_F_NEXT] * 3 + [0]
                assert len({d.id for d in chain}) == 2
                data = b"".join(guest.memory.read(d.addr, d.len) for d in chain)
                assert data == bytes(12) + frame


def test_indirect_tables() -> None:
    with offline(tx_cuts=(0, 50), indirect=True) as guest:
        guest.transmitqs[0].ring.send([bytes(100)])
        _, (desc,) = Device(guest.transmitqs[0].raw_packed()).take()
        assert (flags_of(desc)[2], desc.len) == (DESC_F_INDIRECT, 48)
        table = guest.memory.read(desc.addr, 48)
        entries = [struct.unpack_from("<QIHH", table, 16 * i) for i in range(3)]
        assert [(length, id, flags) for _, length, id, flags in entries] == [
            (12, 0, 0), (50, 0, 0), (50, 0, 0),
        ]  # fmt: skip


def test_used_in_any_order_around_the_ring() -> None:
    with offline(queue_size=7) as guest:
        queue = guest.transmitqs[0].ring
        device = Device(guest.transmitqs[0].raw_packed())
        for turn in range(20):
            assert queue.send([bytes([turn]) * 60] * 10) == 7
            ids = [device.take()[0] for _ in range(7)]
            assert sorted(ids) == list(range(7))
            for i in (3, 0, 6, 1, 5, 2, 4):
                device.use(ids[i])
            assert queue.reap() == 7
            assert queue.outstanding == 0
        assert queue.avail_idx == queue.used_idx == 140
        assert queue.used_position == queue.avail_position == device.used


def test_frames_and_merged_frames() -> None:
    with offline(rx_cuts=(0,)) as guest:
        device = Device(guest.receiveqs[0].raw_packed())
        for parts in ([b"a" * 60], [b"b" * 2036, b"c" * 2048]):
            header = bytes(10) + struct.pack("<H", len(parts))
            for i, part in enumerate(parts):
                id, chain = device.take()
                assert [d.len for d in chain] == [12, 2036]
                assert all(d.flags & DESC_F_WRITE for d in chain)
                data = part if i else header + part
                guest.memory.write(chain[0].addr, data[:12])
                guest.memory.write(chain[1].addr, data[12:])
                device.use(id, len(data), 2)
        assert guest.recv(3, timeout=0.0) == [b"a" * 60, b"b" * 2036 + b"c" * 2048]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([8], "used id 8 is outside of a ring of size 8"),
        ([0xFFFF], "used id 65535 is outside"),
        ([0, 0], "used id 0 is not outstanding"),
        ([0, 7], "used id 7 is not outstanding"),
    ],
)
@pytest.mark.parametrize("in_order", [False, True])
def test_bad_ids(ids: list[int], reason: str, in_order: bool) -> None:
    features = PACKED | Feature.IN_ORDER if in_order else PACKED
    with offline(features=features) as guest:
        queue = guest.transmitqs[0]
        device = Device(queue.raw_packed())
        queue.ring.send([bytes(60)] * 3)
        for id in ids:
            device.use(id)
        with pytest.raises(DeviceError, match=reason):
            queue.ring.reap()


def test_used_and_nothing_outstanding() -> None:
    with offline() as guest:
        queue = guest.transmitqs[0]
        device = Device(queue.raw_packed())
        queue.ring.send([bytes(60)])
        device.use(0)
        device.use(0)
        with pytest.raises(DeviceError, match=r"entry 1 is used \(id 0\), and nothing is outst"):
            queue.ring.reap()


def test_length_without_the_write_flag_is_none() -> None:
    with offline() as guest:
        queue = guest.receiveqs[0]
        raw = queue.raw_packed()
        raw.write_desc(0, RawPackedDesc(0, 72, 0, raw.used(WRAP)))
        with pytest.raises(DeviceError, match="used length 0 is less than the 12 bytes"):
            guest.poll_frames(1)


@pytest.mark.parametrize("event_idx", [True, False])
def test_when_the_device_is_notified(event_idx: bool) -> None:
    features = PACKED if event_idx else PACKED & ~Feature.RING_EVENT_IDX
    for first_idx in (0, 5, 8 + 5, 0xFFFE):
        with offline(features=features, first_idx=first_idx) as guest:
            queue = guest.transmitqs[0]
            raw = queue.raw_packed()
            start = raw.position

            def send(queue: GuestQueue[TransmitQueue] = queue) -> bool:
                assert queue.ring.send([bytes(60)]) == 1
                return queue.ring.take_kick()

            assert send()
            assert not queue.ring.take_kick()
            raw.device_event = (0, EVENT_FLAGS_DISABLE)
            assert not send()
            # The device wants to hear of the fourth; without EVENT_IDX that is a plain wish.
            raw.device_event = (raw.after(start, 3), EVENT_FLAGS_DESC)
            assert send() is not event_idx
            assert send()
            assert send() is not event_idx
            raw.device_event = (raw.after(start, 6), EVENT_FLAGS_DESC)
            assert queue.ring.send([bytes(60)] * 3) == 3
            assert queue.ring.take_kick()
            raw.device_event = (0, EVENT_FLAGS_ENABLE)
            assert not queue.ring.take_kick()


@pytest.mark.parametrize("event_idx", [True, False])
def test_what_the_driver_asks_for(event_idx: bool) -> None:
    features = PACKED if event_idx else PACKED & ~Feature.RING_EVENT_IDX
    with offline(features=features, first_idx=8 + 7) as guest:
        queue = guest.transmitqs[0]
        raw = queue.raw_packed()
        assert raw.driver_event[1] == EVENT_FLAGS_DISABLE
        assert not queue.ring.calls_on()
        if event_idx:
            assert raw.driver_event == (7, EVENT_FLAGS_DESC)
        else:
            assert raw.driver_event[1] == EVENT_FLAGS_ENABLE
        queue.ring.send([bytes(60)] * 2)
        device = Device(raw, 7)
        device.use(device.take()[0])
        assert queue.ring.calls_on()
        assert queue.ring.reap() == 1
        assert not queue.ring.calls_on()
        assert not event_idx or raw.driver_event == (WRAP, EVENT_FLAGS_DESC)
        queue.ring.calls_off()
        assert raw.driver_event[1] == EVENT_FLAGS_DISABLE


def test_batches_in_order() -> None:
    """The device names the last chain and skips those before it (2.8.9)."""
    with offline(features=PACKED | Feature.IN_ORDER, tx_cuts=(0,), queue_size=9) as guest:
        queue = guest.transmitqs[0].ring
        device = Device(guest.transmitqs[0].raw_packed())
        for _ in range(5):
            assert queue.send([bytes(60)] * 9) == 4
            ids = [device.take()[0] for _ in range(4)]
            device.use(ids[2], entries=6)
            assert queue.reap() == 3
            device.use(ids[3], entries=2)
            assert queue.reap() == 1
        assert queue.skipped == 10
        assert queue.used_position == device.used


def test_batches_in_order_of_a_split_ring() -> None:
    """The element is written where the batch begins, and the index skips (2.7.9)."""
    features = DEFAULT_FEATURES | Feature.IN_ORDER
    with offline(features=features, tx_cuts=(0,), first_idx=0xFFFE) as guest:
        queue = guest.transmitqs[0]
        for turn in range(5):
            assert queue.ring.send([bytes(60)] * 9) == 4
            idx = queue.raw.used_idx
            heads = [queue.raw.read_avail(idx + i) for i in range(4)]
            assert heads == [(6 + 8 * turn + 2 * i) % 8 for i in range(4)]
            queue.raw.write_used(idx, heads[2], 0)
            queue.raw.write_used(idx + 3, heads[3], 0)
            queue.raw.used_idx = idx + 4
            assert queue.ring.reap() == 4
        assert queue.ring.skipped == 10


@pytest.mark.parametrize("packed", [True, False])
def test_skipped_receive_buffers_are_full(packed: bool) -> None:
    """What was not named counts as written to its end."""
    features = (PACKED if packed else DEFAULT_FEATURES) | Feature.IN_ORDER
    with offline(features=features, rx_buf_len=100) as guest:
        queue = guest.receiveqs[0]
        if packed:
            device = Device(queue.raw_packed().__class__(guest.memory, queue.layout))
            chains = [device.take() for _ in range(2)]
            places = [chain[0].addr for _, chain in chains]
        else:
            places = [queue.raw.read_desc(queue.raw.read_avail(i)).addr for i in range(2)]
        guest.memory.write(places[0], bytes(10) + b"\x02\x00" + b"x" * 88)
        guest.memory.write(places[1], b"y" * 7)
        if packed:
            device.use(chains[1][0], 7, 2)
        else:
            queue.raw.write_used(0, queue.raw.read_avail(1), 7)
            queue.raw.used_idx = 2
        assert guest.recv(1, timeout=0.0) == [b"x" * 88 + b"y" * 7]


def test_out_of_order_in_a_split_ring() -> None:
    with offline(features=DEFAULT_FEATURES | Feature.IN_ORDER) as guest:
        queue = guest.transmitqs[0]
        queue.ring.send([bytes(60)] * 3)
        queue.raw.write_used(0, 1, 0)
        queue.raw.used_idx = 1
        with pytest.raises(DeviceError, match="used id 1 is not the next one"):
            queue.ring.reap()


def test_sizes_of_rings() -> None:
    for size in (2, 3, 1000, 32767, 32768):
        with offline(queue_size=size, rx_queue_size=2, first_idx=size - 1) as guest:
            queue = guest.transmitqs[0].ring
            assert queue.send([bytes(60)] * 3) == min(size, 3)
    for size in (1, 32769):
        with pytest.raises(ValueError, match=f"size {size} is no number from 2 to 32768"):
            offline(queue_size=size, rx_queue_size=2)
    with pytest.raises(ValueError, match="size 100 is no power of two"):
        offline(features=DEFAULT_FEATURES, queue_size=100)


def test_the_raw_ring_is_that_of_its_format() -> None:
    with (
        offline() as packed,
        offline(features=DEFAULT_FEATURES) as split,
    ):
        with pytest.raises(GuestError, match="is a packed ring"):
            _ = packed.transmitqs[0].raw
        with pytest.raises(GuestError, match="is a split ring"):
            split.transmitqs[0].raw_packed()


@pytest.mark.parametrize("rx_packed", [True, False])
@pytest.mark.parametrize("cuts", [(), (0,)])
def test_null_backend(rx_packed: bool, cuts: tuple[int, ...]) -> None:
    """Packed to either format, around rings of odd sizes, in plain buffers and in chains."""
    receive = PACKED if rx_packed else DEFAULT_FEATURES
    with (
        offline(queue_size=100, tx_cuts=cuts, features=PACKED | Feature.IN_ORDER) as a,
        offline(queue_size=128, rx_cuts=cuts, features=receive) as b,
    ):
        null = NullBackend(a.transmitqs[0], b.receiveqs[0], 60)
        thread = threading.Thread(target=null.run)
        thread.start()
        try:
            load = Load([Flow(a.transmitqs[0], b.receiveqs[0], [bytes(60)])])
            for _ in range(2):
                (result,) = load.run(60.0, frames=50_000, settle_s=60.0, quiet_s=30.0)
                assert (result.sent, result.received) == (50_000, 50_000)
        finally:
            null.stop()
            thread.join()
        a.transmitqs[0].ring.reap()
        assert a.transmitqs[0].ring.outstanding == 0


def test_load_reports_a_broken_device() -> None:
    with offline() as a, offline() as b:
        Device(b.receiveqs[0].raw_packed()).use(9, 72)
        flow = Flow(a.transmitqs[0], b.receiveqs[0], [bytes(60)])
        with pytest.raises(DeviceError, match="receiveq 0: used id 9 is outside"):
            Load([flow]).run(1.0)
