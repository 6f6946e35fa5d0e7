"""A quick share of `make fuzz`, the same every time: hostile rings, step by step and in a race."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz import races, ringcases
from tests.fuzz.bed import PATTERN, PLACES, Bed, Violation, run_cases
from vswitch.fastpath.shared.words import DROP_REASONS, RING_FAULTS

CASES = 3000
RACES = 150
NOT_FROM_RINGS = {
    "tap-busy", "tap-down", "tap-error", "iotlb-miss", "page-missing",
    # More of them than these guests have memory for; tests/unit/fastpath/test_turns.py.
    "buffer-pieces",
}  # fmt: skip
NOT_WITHOUT_IOMMU = {"iommu-permission"}


@pytest.fixture
def bed() -> Iterator[Bed]:
    bed = Bed()
    yield bed
    bed.close()


def test_hostile_rings(bed: Bed) -> None:
    """And the cases are hostile in every way there is a name for: else they prove little."""
    run_cases(bed, ringcases.make, CASES, "rings")
    faults = {name for name, _ in RING_FAULTS if name} - NOT_WITHOUT_IOMMU
    drops = {name for name, _ in DROP_REASONS} - NOT_FROM_RINGS
    assert faults | drops | {"split", "packed", "logged"} <= bed.reached.keys()


def test_hostile_rings_in_a_race() -> None:
    bed = races.RacingBed()
    run_cases(bed, races.make, RACES, "races")
    bed.close()
    assert {"bad-address", "avail-index", "ring-fault"} <= bed.reached.keys()


def test_the_same_seed_makes_the_same_case() -> None:
    assert [ringcases.make(seed) for seed in range(50)] == [ringcases.make(s) for s in range(50)]
    assert ringcases.make(1) != ringcases.make(2)


# What the bed would notice.


def test_a_write_around_a_region_is_noticed(bed: Bed) -> None:
    bed.check()
    for at in (
        PLACES[0].file_offset - 1,
        PLACES[1].file_offset + PLACES[1].size,
        PLACES[3].file_offset + PLACES[3].size,
    ):
        bed.map[at] ^= 1
        with pytest.raises(Violation, match="a byte was written"):
            bed.check()
        bed.map[at] = PATTERN


def test_a_bit_outside_the_log_is_noticed(bed: Bed) -> None:
    bed.log_map[0] = 1
    with pytest.raises(Violation, match="outside the dirty log"):
        bed.check()


@pytest.mark.parametrize("at", [0, 0x402, 0x1000, 0x1400, 0x2000, 0x3FFF, 0x4000 + 2047])
def test_a_byte_in_a_bystanders_memory_is_noticed(bed: Bed, at: int) -> None:
    bed.left.map[at] ^= 0x40
    with pytest.raises(Violation, match="left"):
        bed.check()


def test_a_frame_nobody_sent_is_noticed(bed: Bed) -> None:
    frame = bed.right.mac + bed.left.mac + bytes(46)
    bed.left.send(frame)
    bed.turn()
    bed.left.send(frame)
    with pytest.raises(Violation, match="right got 2 frames"):
        check_one(bed)


def check_one(bed: Bed) -> None:
    """As Bed.check, with a frame of ours still under way."""
    bed.turn()
    got = bed.right.receive()
    if len(got) != 1:
        raise Violation(f"right got {len(got)} frames")


def test_a_bystander_who_hears_nothing_is_noticed(bed: Bed) -> None:
    bed.right.rings[0].enabled = False
    bed.settle()
    with pytest.raises(Violation, match="right got 0 frames"):
        bed.check()
