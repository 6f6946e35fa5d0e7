"""A quick share of `make fuzz`: hostile guests behind an IOMMU, and what the bed would notice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fuzz import iommucases
from tests.fuzz.bed import PLACES, Violation, run_cases
from tests.fuzz.iommu import BOTH, COVER, IommuBed
from tests.fuzz.iommuraces import RacingIommuBed
from tests.fuzz.mappings import Mappings, merged, minus
from vswitch.fastpath.main.iotlb import ACCESS_READ, ACCESS_WRITE
from vswitch.ports.iotlb import PortIotlb
from vswitch.ports.ring import GuestRing

CASES = 600
RACES = 40


@pytest.fixture
def bed() -> Iterator[IommuBed]:
    bed = IommuBed()
    yield bed
    # After a violation stopping may show the same.
    with contextlib.suppress(Violation):
        bed.close()


def test_hostile_guests_behind_an_iommu(bed: IommuBed) -> None:
    run_cases(bed, iommucases.make, CASES, "iommu")
    assert {
        "iotlb-miss", "iommu-permission", "egress-down", "invalidated", "update refused",
        "unplugged", "iotlb-miss at a ring", "logged", "split", "packed", "flooded",
        "scattered",
    } <= bed.reached.keys()  # fmt: skip


def test_hostile_guests_behind_an_iommu_in_a_race() -> None:
    bed = RacingIommuBed()
    run_cases(bed, iommucases.make_race, RACES, "iommu-races")
    bed.close()
    assert {"iotlb-miss at a ring", "invalidated", "ring-fault"} <= bed.reached.keys()


def test_the_same_seed_makes_the_same_case() -> None:
    assert [iommucases.make(seed) for seed in range(20)] == [iommucases.make(s) for s in range(20)]


# What the bed would notice.


def run_until_noticed(bed: IommuBed) -> None:
    for seed in range(CASES):
        bed.run(iommucases.make(seed))


def test_an_invalidation_that_does_nothing_is_noticed(
    bed: IommuBed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forget_it(*_: Any) -> None:
        pass

    monkeypatch.setattr(PortIotlb, "invalidate", forget_it)
    with pytest.raises(Violation):
        run_until_noticed(bed)


def test_an_invalidation_that_forgets_buffers_only_is_noticed(
    bed: IommuBed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GuestRing, "suspend", lambda *_: None)
    with pytest.raises(Violation, match="runs where nothing is mapped any more"):
        run_until_noticed(bed)


@pytest.mark.parametrize(
    ("allowed", "noticed"),
    [(ACCESS_READ, "read from memory"), (ACCESS_WRITE, "not mapped for writing")],
)
def test_permissions_that_do_not_count_are_noticed(
    bed: IommuBed, monkeypatch: pytest.MonkeyPatch, allowed: int, noticed: str
) -> None:
    update = PortIotlb.update

    def generous(self: PortIotlb, iova: int, size: int, uva: int, access: int) -> None:
        update(self, iova, size, uva, access | allowed)

    monkeypatch.setattr(PortIotlb, "update", generous)
    with pytest.raises(Violation, match=noticed):
        run_until_noticed(bed)


def test_questions_that_are_not_asked_are_noticed(
    bed: IommuBed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PortIotlb, "scan", lambda *_: None)
    with pytest.raises(Violation, match="nobody was asked"):
        run_until_noticed(bed)


def test_a_frame_from_covered_memory_is_noticed(bed: IommuBed) -> None:
    bed.left.send(bed.right.mac + bed.left.mac + COVER * 8)
    bed.turn()
    with pytest.raises(Violation, match="a frame was read"):
        bed.check()


def test_ranges() -> None:
    assert merged([(5, 7), (0, 2), (2, 4), (6, 9)]) == [(0, 4), (5, 9)]
    assert minus([(0, 10), (20, 30)], [(2, 4), (8, 22), (29, 40)]) == [(0, 2), (4, 8), (22, 29)]


def test_the_model_of_mappings() -> None:
    some = Mappings([], list(PLACES))
    assert some.updated(0, 0, some.places[0].uva, BOTH) is None
    assert some.updated((1 << 64) - 1, 2, some.places[0].uva, BOTH) is None
    assert some.updated(0, some.places[0].size + 1, some.places[0].uva, BOTH) is None
    some = some.updated(100, 50, some.places[0].uva, BOTH)  # type: ignore[assignment]
    at = some.places[0].file_offset
    assert some.open_for(1) == [(at, at + 50)]
    assert some.invalidated(110, 5).open_for(1) == [(at, at + 10), (at + 15, at + 50)]
    assert some.invalidated(149, (1 << 64) - 1).open_for(2) == [(at, at + 49)]
    assert some.invalidated(110, 0).open_for(1) == []
