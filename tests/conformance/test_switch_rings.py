"""Frames cross the switch whole and in order, whatever rings the two guests have."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from tests.support.formats import ALL_COMBINATIONS, FORMATS, name_of
from tests.support.frames import frames
from tests.support.running import Wire, silent, teach
from vswitch.lab.guest import DEFAULT_FEATURES, Region, SoftwareGuest
from vswitch.lab.guest.memory import PAGE_LEN
from vswitch.lab.guest.packets import format_mac
from vswitch.lab.load.load import Flow, Load
from vswitch.vhost_user.protocol import MAX_FDS, Feature

LENGTHS = [60, 61, 64, 127, 128, 300, 1513, 1514, 1518]
AT_ONCE = 16


def one_way(
    sender: SoftwareGuest, receiver: SoftwareGuest, lengths: list[int], at_once: int = AT_ONCE
) -> None:
    sent = frames(format_mac(receiver.mac), format_mac(sender.mac), lengths)
    for i in range(0, len(sent), at_once):
        batch = sent[i : i + at_once]
        sender.send(batch)
        got = receiver.recv(len(batch))
        assert [len(f) for f in got] == [len(f) for f in batch]
        assert got == batch
    sender.drain()


def in_order(*guests: SoftwareGuest) -> bool:
    """Whether every chain was named when it was used, as this switch does with IN_ORDER, too.

    So the guest has verified the order of each.
    """
    return not any(queue.ring.skipped for guest in guests for queue in guest.queues())


def exchange(
    a: SoftwareGuest, b: SoftwareGuest, lengths: list[int], at_once: int = AT_ONCE
) -> None:
    """Frames both ways, compared byte by byte."""
    one_way(a, b, lengths, at_once)
    one_way(b, a, lengths, at_once)


@pytest.mark.parametrize("features", ALL_COMBINATIONS, ids=name_of)
def test_feature_matrix(wire: Wire, features: Feature) -> None:
    """Each combination with itself and with a guest that has everything."""
    wanted = features | Feature.PROTOCOL_FEATURES
    options: dict[str, Any] = {"features": wanted, "required_features": wanted, "rx_guard_len": 8}
    a = wire.guest("a", 1, **options)
    b = wire.guest("b", 2, **options)
    c = wire.guest("c", 3, rx_guard_len=8)
    assert a.features == b.features == wanted
    teach(a, b, c)
    exchange(a, b, LENGTHS * 4)
    exchange(b, c, LENGTHS * 4)
    assert silent(a)
    for name, sent, received in (("a", 37, 38), ("b", 73, 74), ("c", 37, 38)):
        stats = wire.stats(name)
        assert (stats["ingress_frames"], stats["egress_frames"]) == (sent, received)
        assert stats["drops"] == {}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("regions", [1, 5, 8])
@pytest.mark.parametrize(
    ("tx_cuts", "rx_cuts", "indirect"),
    [
        ((), (), True),
        ((0,), (0,), False),
        ((0, 1, 14, 59), (0, 700), False),
        ((-5, 6, 12, 13, 30), (-1, 100), True),
        (tuple(range(0, 60, 4)), tuple(range(10, 200, 20)), True),
        (tuple(range(-11, 20)), tuple(range(-9, 18)), False),
    ],
)
def test_shapes_of_chains_and_memory(
    wire: Wire,
    regions: int,
    tx_cuts: tuple[int, ...],
    rx_cuts: tuple[int, ...],
    indirect: bool,
    format: str,
) -> None:
    features = DEFAULT_FEATURES | FORMATS[format]
    options: dict[str, Any] = {
        "tx_cuts": tx_cuts, "rx_cuts": rx_cuts, "indirect": indirect, "regions": regions,
        "rx_guard_len": 5, "slot_offset": 3,
    }  # fmt: skip
    a = wire.guest("a", 1, **options, features=features)
    b = wire.guest("b", 2, **options, features=features & ~Feature.MRG_RXBUF)
    teach(a, b)
    exchange(a, b, LENGTHS * 3, at_once=4)
    assert in_order(a, b)
    assert len(wire.info("a")["memory"]) == regions
    assert wire.drops("a") == wire.drops("b") == {}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("indirect", [True, False])
def test_buffers_across_borders_of_regions(wire: Wire, format: str, indirect: bool) -> None:
    """Borders in the middle of buffers and of indirect tables, elsewhere in each round.

    What touches in guest-physical space lies apart in the switch.
    """
    chance = random.Random(3)
    options: dict[str, Any] = {
        "features": DEFAULT_FEATURES | FORMATS[format], "indirect": indirect, "queue_size": 64,
        "slot_offset": 5, "rx_guard_len": 8, "tx_cuts": (100,), "rx_cuts": (700,),
    }  # fmt: skip
    a, b = wire.guest("a", 1, **options), wire.guest("b", 2, **options)
    teach(a, b)
    for _ in range(8):
        for name, guest in (("a", a), ("b", b)):
            guest.stop_rings()
            guest.memory.regions = shattered(guest, chance)
            guest.start_rings()
            assert len(wire.info(name)["memory"]) == MAX_FDS
        exchange(a, b, LENGTHS * 15, at_once=8)
    assert in_order(a, b)
    assert wire.drops("a") == wire.drops("b") == {}


def shattered(guest: SoftwareGuest, chance: random.Random) -> list[Region]:
    """The guest's memory as eight regions, with borders wherever no ring lies."""
    size = max(region.gpa + region.size for region in guest.memory.regions)
    rings = [
        (gpa, gpa + length)
        for queue in guest.queues()
        for gpa, length in (
            (queue.layout.desc_gpa, 16 * queue.layout.size),
            (queue.layout.avail_gpa, 6 + 2 * queue.layout.size),
            (queue.layout.used_gpa, 6 + 8 * queue.layout.size),
        )
    ]
    pages = [
        page
        for page in range(PAGE_LEN, size, PAGE_LEN)
        if not any(start < page < end for start, end in rings)
    ]
    borders = [0, *sorted(chance.sample(pages, MAX_FDS - 1)), size]
    return [
        Region(start, end - start, 0x7F00_0000_0000 - (n << 32), start)
        for n, (start, end) in enumerate(itertools.pairwise(borders))
    ]


def test_every_short_length(wire: Wire) -> None:
    """14 to 59 bytes: shorter than Ethernet's minimum, yet guests send them and are to get them."""
    a = wire.guest("a", 1, rx_guard_len=8)
    b = wire.guest("b", 2, rx_guard_len=8, features=Feature.PROTOCOL_FEATURES)
    teach(a, b)
    exchange(a, b, list(range(14, 70)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rx_buf_len", [None, 128, 1526, 9040, 65562])
def test_lengths_up_to_jumbo(wire: Wire, rx_buf_len: int | None, format: str) -> None:
    """Mergeable buffers of many sizes on one side, whole frames in one buffer on the other."""
    features = DEFAULT_FEATURES | FORMATS[format]
    a = wire.guest(
        "a", 1, max_frame_len=9018, rx_buf_len=rx_buf_len, rx_guard_len=8, features=features
    )
    b = wire.guest(
        "b", 2, max_frame_len=9018, rx_guard_len=8, features=DEFAULT_FEATURES & ~Feature.MRG_RXBUF
    )
    teach(a, b)
    lengths = [60, 115, 116, 117, 1513, 1514, 1515, 2035, 2036, 2037, 4084, 8999, 9017, 9018]
    exchange(a, b, lengths * 2, at_once=2)
    exchange(a, b, list(range(60, 9018, 97)), at_once=2)
    assert in_order(a, b)


@pytest.mark.parametrize("format", ["split", "packed"])
def test_longest_frames(wire: Wire, format: str) -> None:
    options: dict[str, Any] = {
        "max_frame_len": 65553, "queue_size": 64, "features": DEFAULT_FEATURES | FORMATS[format],
    }  # fmt: skip
    a = wire.guest("a", 1, **options)
    b = wire.guest("b", 2, **options, rx_buf_len=4096)
    teach(a, b)
    exchange(a, b, [65535, 65553, 32768], at_once=1)


@pytest.mark.parametrize("features", ALL_COMBINATIONS, ids=name_of)
def test_indices_wrap(wire: Wire, features: Feature) -> None:
    """Chains of pieces in five regions, the free-running indices around 16 bits."""
    wanted = features | Feature.PROTOCOL_FEATURES
    options: dict[str, Any] = {
        "features": wanted, "required_features": wanted, "queue_size": 64, "regions": 5,
        "tx_cuts": (0, 14, 40), "rx_cuts": (0, 700), "rx_guard_len": 8,
    }  # fmt: skip
    a = wire.guest("a", 1, **options, first_idx=65500)
    b = wire.guest("b", 2, **options, first_idx=65471)
    teach(a, b)
    exchange(a, b, LENGTHS * 20, at_once=8)
    for guest in (a, b):
        for queue in guest.queues():
            assert queue.ring.used_idx < 1000
    assert in_order(a, b)
    assert wire.drops("a") == wire.drops("b") == {}


@pytest.mark.parametrize("format", FORMATS)
def test_indices_wrap_under_load(wire: Wire, format: str) -> None:
    """Around 16 bits, both ways at once, every frame compared."""
    features = DEFAULT_FEATURES | FORMATS[format]
    a = wire.guest("a", 1, polling=True, features=features)
    b = wire.guest("b", 2, features=features & ~Feature.RING_EVENT_IDX)
    teach(a, b)
    flows = [
        Flow(
            sender.transmitqs[0],
            receiver.receiveqs[0],
            frames(format_mac(receiver.mac), format_mac(sender.mac), [60, 128, 1514]),
            window=100,
            verify=True,
            write_off_s=60.0,
        )
        for sender, receiver in ((a, b), (b, a))
    ]
    for result in Load(flows).run(60.0, frames=70_000, settle_s=60.0, quiet_s=30.0):
        assert (result.sent, result.received) == (70_000, 70_000)
        assert (result.lost, result.misordered, result.corrupt, result.written_off) == (0,) * 4
    for name in ("a", "b"):
        stats = wire.stats(name)
        assert stats["ingress_frames"] == stats["egress_frames"] == 70_001
        assert stats["drops"] == {}
    exchange(a, b, LENGTHS)


@pytest.mark.parametrize(("tx_size", "rx_size"), [(2, 2), (4, 1024), (1024, 8), (32768, 256)])
def test_sizes_of_rings(wire: Wire, tx_size: int, rx_size: int) -> None:
    small: dict[str, Any] = {"queue_size": tx_size, "rx_queue_size": rx_size, "max_frame_len": 300}
    a = wire.guest("a", 1, **small, rx_buf_len=312)
    b = wire.guest("b", 2, **small, features=DEFAULT_FEATURES & ~Feature.RING_INDIRECT_DESC,
                   rx_buf_len=312)  # fmt: skip
    teach(a, b)
    exchange(a, b, list(range(60, 301)), at_once=min(rx_size, 16))


@pytest.mark.parametrize(("tx_size", "rx_size"), [(2, 3), (3, 1000), (1000, 7), (32767, 255)])
@pytest.mark.parametrize("name", ["packed", "packed-in-order"])
def test_packed_rings_of_any_size(wire: Wire, tx_size: int, rx_size: int, name: str) -> None:
    small: dict[str, Any] = {
        "queue_size": tx_size, "rx_queue_size": rx_size, "max_frame_len": 300, "rx_buf_len": 312,
        "features": DEFAULT_FEATURES | FORMATS[name], "rx_guard_len": 8,
    }  # fmt: skip
    a = wire.guest("a", 1, **small)
    b = wire.guest("b", 2, **small, tx_cuts=(0,), indirect=False, first_idx=tx_size + rx_size - 1)
    teach(a, b)
    exchange(a, b, list(range(60, 301)), at_once=min(rx_size, 16))
    assert in_order(a, b)


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_formats_among_each_other(wire: Wire, first: str, second: str) -> None:
    a = wire.guest("a", 1, features=DEFAULT_FEATURES | FORMATS[first], rx_guard_len=8)
    b = wire.guest("b", 2, features=DEFAULT_FEATURES | FORMATS[second], rx_guard_len=8)
    teach(a, b)
    exchange(a, b, LENGTHS * 8)
    assert wire.drops("a") == wire.drops("b") == {}


def test_overload_is_counted_exactly(wire: Wire) -> None:
    """What was sent was received or dropped by name, and nothing else."""
    a = wire.guest("a", 1, polling=True)
    b = wire.guest("b", 2, polling=True, rx_queue_size=16)
    teach(a, b)
    frame = frames(format_mac(b.mac), format_mac(a.mac), [60])
    flow = Flow(a.transmitqs[0], b.receiveqs[0], frame)
    (result,) = Load([flow]).run(60.0, frames=200_000, settle_s=2.0)
    assert result.sent == 200_000
    a.drain()
    rest = len(b.recv(256, timeout=0.0))
    stats = wire.stats("b")
    assert wire.stats("a")["ingress_frames"] == 200_001
    assert stats["egress_frames"] == result.received + rest + 1
    assert set(stats["drops"]) <= {"no-buffer"}
    assert result.received + rest + stats["drops"].get("no-buffer", 0) == 200_000


def test_several_queue_pairs(wire: Wire) -> None:
    """A guest with four pairs and one with a single pair; each flow stays in one receiveq."""
    a = wire.guest("a", 1, queues=4)
    b = wire.guest("b", 2)
    teach(a, b)
    for queue in range(4):
        sent = frames(format_mac(b.mac), format_mac(a.mac), LENGTHS, tag=queue)
        a.send(sent, queue=queue)
        assert b.recv(len(sent)) == sent
    used = set()
    for host in range(32):
        # The hash of a frame that is not IP is that of its addresses.
        source = f"52:54:00:aa:00:{host:02x}"
        sent = frames(format_mac(a.mac), source, [60, 61, 62])
        before = [queue.ring.frames for queue in a.receiveqs]
        b.send(sent)
        assert a.recv(3) == sent
        gained = [q.ring.frames - n for q, n in zip(a.receiveqs, before, strict=True)]
        assert sorted(gained) == [0, 0, 0, 3]
        used.add(gained.index(3))
    assert used == {0, 1, 2, 3}


def test_few_notifications(wire: Wire) -> None:
    """A guest that polls is not notified; one that sleeps hears of a burst with few calls."""
    a = wire.guest("a", 1)
    b = wire.guest("b", 2, polling=True)
    teach(a, b)
    before = wire.stats("b")["calls"]
    one_way(a, b, LENGTHS * 20)
    assert wire.stats("b")["calls"] - before <= 2
    assert wire.stats("a")["kicks"] > 0
