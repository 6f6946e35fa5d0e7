"""Virtio features that a port offers, and what its frontend means by them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

from vswitch.config import feature_names
from vswitch.config.settings import PortSettings
from vswitch.ports import offloads
from vswitch.vhost_user.protocol import Feature

FEATURES = (
    Feature.VERSION_1
    | Feature.RING_INDIRECT_DESC
    | Feature.RING_EVENT_IDX
    | Feature.RING_PACKED
    | Feature.IN_ORDER
    | Feature.ANY_LAYOUT
    | Feature.MRG_RXBUF
    | Feature.MTU
    | Feature.STATUS
    | Feature.CTRL_VQ
    | Feature.CTRL_RX
    | Feature.CTRL_VLAN
    | Feature.CTRL_RX_EXTRA
    | Feature.CTRL_MAC_ADDR
    | Feature.GUEST_ANNOUNCE
    | Feature.MQ
    | Feature.ACCESS_PLATFORM
)
"""What a port offers besides offloads. CTRL_*, STATUS, ANNOUNCE and MQ are the frontend's to
implement; to offer them says that nothing here stands in their way. CTRL_GUEST_OFFLOADS does not
belong to them: a guest changes its offloads by it, and no message tells a backend."""

_PROTOCOL = Feature.PROTOCOL_FEATURES | Feature.LOG_ALL
"""vhost-user's own, which every port offers."""

COUNT_VIRTQUEUES = frozenset({"crosvm", "cloud-hypervisor"})
"""Frontends that take the answer to GET_QUEUE_NUM for a number of virtqueues, not of pairs."""

TRANSLATE_NOTHING = frozenset(feature_names.FRONTENDS)
"""Frontends whose addresses are guest-physical with ACCESS_PLATFORM as well: they pass it on, for
guests whose memory is protected. crosvm has a BACKEND_REQ channel all the same."""


def _bits(names: Iterable[str]) -> Feature:
    return functools.reduce(operator.or_, (Feature[name] for name in names), Feature(0))


assert _bits(feature_names.OFFERED) == FEATURES | offloads.offered(True) | _PROTOCOL
assert {f.name for f in Feature} == {*feature_names.OFFERED, *feature_names.NEVER_OFFERED}


def withheld(settings: PortSettings) -> Feature:
    """What the switch has and the port does not offer, because of `frontend` or `features`."""
    return _bits(feature_names.withheld(settings.frontend, settings.features)) & (
        FEATURES | offloads.offered(settings.offloads) | _PROTOCOL
    )


def offered(settings: PortSettings) -> Feature:
    """What the port offers, without vhost-user's own features."""
    return (FEATURES | offloads.offered(settings.offloads)) & ~withheld(settings)
