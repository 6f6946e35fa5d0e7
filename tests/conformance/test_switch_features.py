"""What a port offers, and to whom: `features` and `frontend` of its settings."""

from __future__ import annotations

import pytest

from tests.support.formats import FORMATS
from tests.support.frames import frames, mac
from tests.support.running import Wire, teach
from vswitch.lab.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.lab.guest.frontend import Frontend
from vswitch.lab.guest.options import DEFAULT_PROTOCOL_FEATURES, Wanted
from vswitch.vhost_user.protocol import Feature, ProtocolFeature

A, B = mac(1), mac(2)
CONTROL = (
    Feature.CTRL_VQ
    | Feature.CTRL_RX
    | Feature.CTRL_VLAN
    | Feature.CTRL_RX_EXTRA
    | Feature.CTRL_MAC_ADDR
    | Feature.GUEST_ANNOUNCE
    | Feature.MQ
)
CONFIG = Feature.MTU | Feature.STATUS


def offer(wire: Wire, name: str, **options: object) -> Feature:
    with Frontend.connect(wire.port(name, **options)) as frontend:
        return frontend.get_features()


def test_every_feature_can_be_withheld(wire: Wire) -> None:
    whole = offer(wire, "whole")
    for feature in whole:
        name = str(feature.name)
        left = offer(wire, name.lower(), features=[f"-{name}"])
        assert feature in whole & ~left
        # Nothing else goes, but what rests on it.
        if feature not in Feature.CTRL_VQ | Feature.CSUM | Feature.GUEST_CSUM | Feature.VERSION_1:
            assert whole & ~left == feature
        info = wire.info(name.lower())
        assert info["withheld"] == [one.name for one in whole & ~left]
        assert info["frontend"] is None


@pytest.mark.parametrize(
    ("name", "missing", "per_pair"),
    [
        (None, Feature(0), 1),
        ("uml", CONTROL | CONFIG | Feature.ACCESS_PLATFORM | Feature.RING_PACKED, 1),
        ("crosvm", CONTROL | CONFIG, 2),
        ("cloud-hypervisor", Feature(0), 2),
    ],
)
@pytest.mark.parametrize("pairs", [1, 4])
def test_frontends(
    wire: Wire, name: str | None, missing: Feature, per_pair: int, pairs: int
) -> None:
    whole = offer(wire, "whole")
    path = wire.port("a", frontend=name, queues=pairs)
    with Frontend.connect(path) as frontend:
        frontend.negotiate(DEFAULT_FEATURES, DEFAULT_PROTOCOL_FEATURES)
        assert frontend.offered_features == whole & ~missing
        assert frontend.get_queue_num() == per_pair * pairs
        assert wire.info("a")["frontend"] == name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("frontend", ["crosvm", "cloud-hypervisor"])
def test_access_platform_is_passed_on(wire: Wire, frontend: str, name: str) -> None:
    """Addresses of a protected guest are guest-physical, a channel to ask for others or not."""
    guest = SoftwareGuest(
        A,
        wanted=Wanted(
            features=DEFAULT_FEATURES | Feature.ACCESS_PLATFORM | FORMATS[name],
            required_features=Feature.ACCESS_PLATFORM,
            protocol_features=DEFAULT_PROTOCOL_FEATURES | ProtocolFeature.BACKEND_REQ,
        ),
    )
    a = wire.enter(guest)
    a.connect(wire.port("a", frontend=frontend))
    b = wire.guest("b", 2)
    teach(a, b)
    for sender, receiver, src, dst in ((a, b, A, B), (b, a, B, A)):
        sent = frames(dst, src, [60, 1514] * 5)
        sender.send(sent)
        assert receiver.recv(len(sent)) == sent
    assert wire.info("a")["state"] == "ready"


def test_what_is_not_offered_is_not_taken(wire: Wire) -> None:
    path = wire.port("a", features=["-IN_ORDER"])
    with Frontend.connect(path) as frontend:
        frontend.set_features(Feature.VERSION_1 | Feature.IN_ORDER)
        frontend.read_to_end()
    wire.wait_log("bits 0x800000000, never offered")
