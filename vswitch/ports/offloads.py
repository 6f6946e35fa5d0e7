"""Offloads by name: the virtio features they stand for, and the masks the fast path works with."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

from vswitch.config.keys import OFFLOADS, OffloadSetting
from vswitch.vhost_user.protocol import Feature

CSUM = 0x01
TSO4 = 0x02
TSO6 = 0x04
ECN = 0x08
UFO = 0x10
USO4 = 0x20
USO6 = 0x40


class _Offload(NamedTuple):
    """`host`: the guest leaves it to the switch. `guest`: the switch may leave it to the guest.

    `mask` has the bits of OFFLOAD_* in fastpath/shared/virtio.pxd, which are those of TUN_F_*.
    """

    name: str
    host: Feature
    guest: Feature
    mask: int


_TABLE = (
    _Offload("csum", Feature.CSUM, Feature.GUEST_CSUM, CSUM),
    _Offload("tso4", Feature.HOST_TSO4, Feature.GUEST_TSO4, TSO4),
    _Offload("tso6", Feature.HOST_TSO6, Feature.GUEST_TSO6, TSO6),
    _Offload("ecn", Feature.HOST_ECN, Feature.GUEST_ECN, ECN),
    _Offload("ufo", Feature.HOST_UFO, Feature.GUEST_UFO, UFO),
    # One bit for a guest that sends, two for one that receives (VIRTIO 1.2, 5.1.3).
    _Offload("uso", Feature.HOST_USO, Feature(0), USO4 | USO6),
    _Offload("uso", Feature(0), Feature.GUEST_USO4, USO4),
    _Offload("uso", Feature(0), Feature.GUEST_USO6, USO6),
)
assert {row.name for row in _TABLE} == set(OFFLOADS)


def names(setting: OffloadSetting) -> tuple[str, ...]:
    """The offloads that a port's or uplink's `offloads` leaves on."""
    if isinstance(setting, bool):
        return OFFLOADS if setting else ()
    return tuple(setting)


def offered(setting: OffloadSetting) -> Feature:
    """The features to offer a guest."""
    features = Feature(0)
    for row in _TABLE:
        if row.name in names(setting):
            features |= row.host | row.guest
    return features


def mask(setting: OffloadSetting) -> int:
    """What to ask a TAP for (TUNSETOFFLOAD)."""
    return _union(row.mask for row in _TABLE if row.name in names(setting))


def asked_for(features: Feature) -> int:
    """What a guest with these features may leave to the switch in frames that it sends."""
    return _union(row.mask for row in _TABLE if row.host & features)


def taken(features: Feature) -> int:
    """What a guest with these features takes over in frames that it receives."""
    return _union(row.mask for row in _TABLE if row.guest & features)


def _union(masks: Iterable[int]) -> int:
    return functools.reduce(operator.or_, masks, 0)
