"""The four kinds of virtqueue, as feature bits, and combinations of features to go with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from vswitch.vhost_user.protocol import Feature

FORMATS = {
    "split": Feature(0),
    "split-in-order": Feature.IN_ORDER,
    "packed": Feature.RING_PACKED,
    "packed-in-order": Feature.RING_PACKED | Feature.IN_ORDER,
}
FORMAT_BITS = Feature.RING_PACKED | Feature.IN_ORDER

BITS = [
    Feature.VERSION_1,
    Feature.MRG_RXBUF,
    Feature.RING_EVENT_IDX,
    Feature.RING_INDIRECT_DESC,
]


def combinations(bits: Iterable[Feature]) -> list[Feature]:
    """Every choice out of `bits`, none and all included."""
    chosen = list(bits)
    return [
        Feature(sum(choice))
        for n in range(len(chosen) + 1)
        for choice in itertools.combinations(chosen, n)
    ]


ALL_COMBINATIONS = [
    *combinations(BITS),
    *(
        choice | bits | Feature.VERSION_1
        for bits in FORMATS.values()
        if bits
        for choice in combinations(BITS[1:])
    ),
]
"""Split rings with every feature on and off, and the others, which only VERSION_1 devices have."""


def name_of(features: Feature) -> str:
    named = [*BITS, Feature.RING_PACKED, Feature.IN_ORDER]
    return "+".join(bit.name or "" for bit in named if bit in features) or "LEGACY"
