"""Notifications as messages, device status and resets, with real rings."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.support.frames import frame, frames, mac
from tests.support.running import Wire, silent, teach
from vswitch.lab.guest import DEFAULT_PROTOCOL_FEATURES, BackendRefusedError
from vswitch.lab.guest.raw import RawDesc
from vswitch.vhost_user.protocol import Feature, ProtocolFeature, Status

A, B = mac(1), mac(2)


def test_traffic_without_a_single_eventfd(wire: Wire) -> None:
    a = wire.guest("a", 1, inband=True)
    b = wire.guest("b", 2, inband=True)
    assert "INBAND_NOTIFICATIONS" in wire.info("a")["protocol_feature_names"]
    teach(a, b)
    sent = frames(B, A, range(60, 1500, 7))
    back = frames(A, B, range(60, 1500, 11))
    for _ in range(5):
        a.send(sent)
        assert b.recv(len(sent)) == sent
        b.send(back)
        assert a.recv(len(back)) == back
    # A driver that waits is called by a message.
    queue = b.receiveqs[0]
    b.take_requests()
    before = queue.calls
    assert not queue.ring.calls_on()
    a.send([sent[0]])

    def called() -> bool:
        b.take_requests()
        return queue.calls > before

    wire.wait_until(called, "BACKEND_VRING_CALL")
    assert b.recv(1) == [sent[0]]


def test_a_worker_sleeps_beside_a_ring_that_is_kicked_by_messages(wire: Wire) -> None:
    """A ring without any kick is polled once a millisecond; this one is not."""
    a = wire.guest("a", 1, inband=True)
    b = wire.guest("b", 2)
    teach(a, b)
    worker = wire.client.workers()[0]
    wire.wait_until(lambda: wire.client.workers()[0]["state"] == "sleeping", "the worker sleeps")
    begun = time.monotonic()
    for tag in range(20):
        sent = frame(B, A, tag=tag)
        a.send([sent])
        assert b.recv(1) == [sent]
    time.sleep(0.5)  # the span that is counted, in which a ring that is polled is looked at
    wire.wait_until(lambda: wire.client.workers()[0]["state"] == "sleeping", "the worker sleeps")
    # 20 kicks, the settling of changes and a little for the machine: no thousand a second.
    most = 100 + 100 * (time.monotonic() - begun)
    assert wire.client.workers()[0]["sleeps"] - worker["sleeps"] < most
    assert wire.stats("a")["kicks"] >= 1


def test_a_broken_ring_is_told_by_a_message(wire: Wire) -> None:
    a = wire.guest("a", 1, inband=True)
    a.transmitqs[0].raw.offer(RawDesc(1 << 50, 72))
    a.transmitqs[0].kick()
    wire.wait_state("a", "fault")

    def told() -> bool:
        a.take_requests()
        return a.vring_errors == {1}

    wire.wait_until(told, "BACKEND_VRING_ERR")


def test_status(wire: Wire) -> None:
    features = DEFAULT_PROTOCOL_FEATURES | ProtocolFeature.STATUS | ProtocolFeature.RESET_DEVICE
    a = wire.guest("a", 1, protocol_features=features)
    b = wire.guest("b", 2)
    teach(a, b)
    ready = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
    a.frontend.set_status(ready)
    assert a.frontend.get_status() == ready
    sent = frames(B, A, [60] * 30)
    a.send(sent)
    assert b.recv(30) == sent
    try:
        a.frontend.set_features(1 << 63 | a.features)
    except BackendRefusedError:
        a.frontend.set_status(Status.FEATURES_OK)
        assert a.frontend.get_status() == Status(0)
    else:
        raise AssertionError("a feature that was not offered was taken")
    # Memory survives a reset, rings and features do not.
    resets: tuple[Callable[[], None], ...] = (
        lambda: a.frontend.set_status(0), a.frontend.reset_device,
    )  # fmt: skip
    for reset in resets:
        reset()
        assert wire.info("a")["features"] == 0
        assert len(wire.info("a")["memory"]) == 1
        assert not any(ring["started"] for ring in wire.info("a")["rings"])
        assert silent(b)
        a.frontend.set_features(a.features | Feature.PROTOCOL_FEATURES)
        for queue in a.queues():
            queue.base = queue.raw.used_idx
        a.start_rings()
        sent = frames(B, A, [60] * 30)
        a.send(sent)
        assert b.recv(30) == sent
