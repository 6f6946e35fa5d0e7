"""Virtio features by name: which there are, what rests on what, what a frontend cannot use.

Names are those of docs/compatibility.md. `vswitch.ports.features` has the bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

Frontend = Literal["uml", "crosvm", "cloud-hypervisor"]
FRONTENDS: tuple[str, ...] = get_args(Frontend)
"""Frontends that need to be told from others, which take from an offer what they can use."""

OF_OFFLOADS = (
    "CSUM", "GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_UFO", "HOST_TSO4",
    "HOST_TSO6", "HOST_ECN", "HOST_UFO", "GUEST_USO4", "GUEST_USO6", "HOST_USO",
)  # fmt: skip
"""Offered where `offloads` says so."""
OFFERED = (
    *OF_OFFLOADS, "MTU", "MRG_RXBUF", "STATUS", "CTRL_VQ", "CTRL_RX", "CTRL_VLAN", "CTRL_RX_EXTRA",
    "GUEST_ANNOUNCE", "MQ", "CTRL_MAC_ADDR", "LOG_ALL", "ANY_LAYOUT", "RING_INDIRECT_DESC",
    "RING_EVENT_IDX", "PROTOCOL_FEATURES", "VERSION_1", "ACCESS_PLATFORM", "RING_PACKED",
    "IN_ORDER",
)  # fmt: skip
NEVER_OFFERED = (
    "CTRL_GUEST_OFFLOADS", "MAC", "GSO", "NOTIFY_ON_EMPTY", "ORDER_PLATFORM", "NOTIFICATION_DATA",
    "RING_RESET", "HASH_REPORT", "GUEST_HDRLEN", "RSS",
)  # fmt: skip

_TSO_TO_GUESTS = ("GUEST_TSO4", "GUEST_TSO6")
_TSO_TO_HOST = ("HOST_TSO4", "HOST_TSO6")
_RESTS_ON: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_TSO_TO_GUESTS, "GUEST_UFO", "GUEST_USO4", "GUEST_USO6"), ("GUEST_CSUM",)),
    **dict.fromkeys((*_TSO_TO_HOST, "HOST_UFO", "HOST_USO"), ("CSUM",)),
    "GUEST_ECN": _TSO_TO_GUESTS,
    "HOST_ECN": _TSO_TO_HOST,
    **dict.fromkeys(
        ("CTRL_RX", "CTRL_VLAN", "CTRL_RX_EXTRA", "GUEST_ANNOUNCE", "MQ", "CTRL_MAC_ADDR"),
        ("CTRL_VQ",),
    ),
    **dict.fromkeys(("ACCESS_PLATFORM", "RING_PACKED", "IN_ORDER"), ("VERSION_1",)),
}
"""Of each feature one of those must be there (VIRTIO 1.2, 5.1.3.1).

The last ones came with or after VIRTIO 1.0."""

_TOLD_IN_CONFIG = ("MTU", "STATUS")
"""A frontend without a configuration space of its own, which is not the switch's, reads zeros for
those: a link that is down."""
WITHHELD: dict[str, tuple[str, ...]] = {
    # Linux's virtio_uml has its driver take the whole offer, and hands over every queue. It has no
    # IOTLB (its probe fails with -ENOMEM), and its packed rings begin at 0, not at 0x8000.
    "uml": (*_TOLD_IN_CONFIG, "CTRL_VQ", "ACCESS_PLATFORM", "RING_PACKED"),
    # Takes the backend for the whole device, control queue included.
    "crosvm": (*_TOLD_IN_CONFIG, "CTRL_VQ"),
    # Has a control queue and a configuration space of its own.
    "cloud-hypervisor": (),
}
"""What is not offered to a frontend."""


def withheld(frontend: str | None, words: Iterable[str]) -> frozenset[str]:
    """Features that are not offered: the frontend's, those of `features`, and what rests on them.

    A word is a name, to be offered all the same, or one behind a `-`, not to be.
    """
    words = list(words)
    gone = set(WITHHELD[frontend]) if frontend else set()
    gone -= set(words)
    gone |= {word[1:] for word in words if word.startswith("-")}
    while more := {
        name for name, needs in _RESTS_ON.items() if name not in gone and gone.issuperset(needs)
    }:
        gone |= more
    return frozenset(gone)


def missing(name: str, gone: Iterable[str]) -> str | None:
    """What a feature rests on that is not offered."""
    return next((need for need in _RESTS_ON.get(name, ()) if need in set(gone)), None)
