"""Hostile guests behind an IOMMU, made up by seed: the rings of `ringcases`, and a frontend that
maps their memory piece by piece, wrongly, elsewhere, not for long, or not at all.

An I/O virtual address is the guest-physical one of the same number where the frontend is honest.
"""

from __future__ import annotations

from random import Random
from typing import Any

from tests.fuzz import races, ringcases
from tests.fuzz.bed import PAGE, PLACES

LAST = (1 << 64) - 1
BOTH = 3
SPOTS = [
    *(place.gpa + at for place in PLACES for at in range(0, place.size, PAGE)),
    ringcases.DATA + ringcases.SLOT, ringcases.TABLES + 0x800, *ringcases.ADDRESSES,
]  # fmt: skip
USER_EDGES = [place.uva + at for place in PLACES for at in (0, place.size)]
SIZES = [1, 7, 15, 16, 17, 0x100, 0x3FF, 0x400, PAGE - 1, PAGE, PAGE + 1, 0x3000, 0x8000]
NO_SIZES = [0, 1 << 31, 1 << 32, 1 << 63, LAST - PAGE, LAST]
ANSWERS = [
    *["good"] * 8, "exact", "exact", "wide", "bytes", "moved", "read", "write", "none", "nothing",
    "refuse", "silent", "elsewhere",
]  # fmt: skip

Op = list[Any]


def _user(gpa: int) -> int:
    """Where the frontend has a guest-physical address, or some address that it has nowhere."""
    for place in PLACES:
        if place.gpa <= gpa < place.gpa + place.size:
            return place.uva + gpa - place.gpa
    return gpa


def _spot(rng: Random, own: list[int]) -> int:
    """An address where something may lie, some bytes beside it now and then."""
    at = rng.choice(own if rng.random() < 0.3 else SPOTS)
    if rng.random() < 0.3:
        at += rng.choice([-17, -16, -1, 1, 8, 16, 0x3F0, 0xFFF])
    return at & LAST


def _update(rng: Random, own: list[int]) -> Op:
    iova = _spot(rng, own)
    size = rng.choice(SIZES)
    uva = _user(iova)
    access = rng.choice([BOTH, BOTH, BOTH, 1, 2, 0])
    what = rng.random()
    if what < 0.25:
        # Other memory than before.
        uva = _user(_spot(rng, own))
    elif what < 0.35:
        uva = rng.choice(USER_EDGES) + rng.choice([-size, -1, 0, 1]) & LAST
    elif what < 0.45:
        size = rng.choice([*NO_SIZES, LAST - iova, LAST - iova + 1, LAST - iova + 2])
    elif what < 0.5:
        uva = rng.choice([0, 1 << 63, LAST, LAST - size + 1, LAST - size + 2]) & LAST
    return ["update", iova, size & LAST, uva, access]


def _invalidate(rng: Random, own: list[int]) -> Op:
    iova = _spot(rng, own)
    size = rng.choice([PAGE, PAGE, *SIZES, *NO_SIZES, LAST - iova, LAST - iova + 1])
    return ["invalidate", iova, size & LAST]


def _anything(rng: Random, own: list[int]) -> Op:
    what = rng.random()
    if what < 0.25:
        return _update(rng, own)
    if what < 0.45:
        return _invalidate(rng, own)
    if what < 0.75:
        return ["answer", rng.choice([1, 2, 8, 40]), rng.choice(ANSWERS)]
    if what < 0.9:
        return ["turn", rng.random() < 0.5]
    if what < 0.95:
        return ["kick", rng.randrange(2)]
    if what < 0.97:
        return ["second"]
    if what < 0.98:
        return ["unplug", rng.randrange(len(PLACES))]
    who, to = rng.choice(["left", "right"]), rng.choice(["hostile", "all"])
    return ["send", who, to, rng.choice([14, 60, 600, 1514])]


def make(seed: int) -> dict[str, Any]:
    """The case of a seed."""
    rng = Random(seed ^ 0x10)
    # Of every third case the frontend has the pages in another order than its driver.
    scattered = seed % 3 == 0
    case = ringcases.make(seed, across=rng.choice([0, 1]) if scattered else None)
    case["kind"] = "iommu"
    if scattered:
        case["scattered"] = True
    if rng.random() < 0.1:
        case["deaf"] = True
    ops: list[Op] = []
    own: list[int] = [ringcases.DATA, ringcases.TABLES, ringcases.RX_DATA]
    if rng.random() < (0.1 if scattered else 0.6):
        for place in PLACES:
            ops.append(["update", place.gpa, place.size, place.uva, rng.choice([BOTH, BOTH, 1, 2])])
    for op in case["ops"]:
        if op[0] == "journal":
            continue
        if op[0] == "start":
            op[2]["identity"] = 0
            own += [op[2]["desc"], op[2]["avail"], op[2]["used"]]
        ops.append(op)
        if op[0] == "start":
            for _ in range(rng.choice([0, 1, 2, 4])):
                ops.append(["answer", 40, rng.choice(ANSWERS)])
        elif op[0] != "write":
            for _ in range(rng.choice([0, 1, 2, 4])):
                ops.append(_anything(rng, own))
    if rng.random() < 0.003:
        first = min(_spot(rng, own), LAST >> 1)
        ops.append(["flood", first, 5000, rng.choice([1, 16, 512]), rng.choice([1, 2, 3])])
    for _ in range(rng.choice([0, 4, 12, 30])):
        ops.append(_anything(rng, own))
    case["ops"] = ops
    return case


def make_race(seed: int) -> dict[str, Any]:
    """The same with somebody who rewrites the guest's memory."""
    case = races.racing(make(seed), "iommu-races", seed)
    case["ops"] = [op for op in case["ops"] if op[0] != "flood"]
    return case
