"""`vswitchctl show` says why a port does not forward, and the log stays small."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.formats import FORMATS
from tests.support.frames import frames, mac
from tests.support.running import Wire, teach
from vswitch.lab.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.lab.guest.errors import BackendRefusedError
from vswitch.lab.guest.frontend import Frontend
from vswitch.lab.guest.options import DEFAULT_PROTOCOL_FEATURES
from vswitch.ports.diagnosis import IN_VAIN, SPACING_S
from vswitch.vhost_user.protocol import Feature, MemRegion, ProtocolFeature, Request

A, B = mac(1), mac(2)
GUESS = "the frontend looked at what the port offers and left"


def negotiated(path: Path, features: Feature = DEFAULT_FEATURES) -> Frontend:
    frontend = Frontend.connect(path)
    frontend.negotiate(features, DEFAULT_PROTOCOL_FEATURES)
    return frontend


def reason(wire: Wire, name: str) -> str:
    """What `show` says of a port that does not forward."""
    info = wire.info(name)
    assert info["state"] != "ready"
    return info["error"] or ""


@contextmanager
def small_file() -> Iterator[int]:
    fd = os.memfd_create("small")
    os.ftruncate(fd, 4096)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("request_", ["SET_MEM_TABLE", "ADD_MEM_REG"])
def test_memory_that_was_refused(wire: Wire, request_: str) -> None:
    region = MemRegion(0, 1 << 20, 0x7F0000000000, 0)
    with negotiated(wire.port("a")) as frontend, small_file() as fd:

        def give() -> None:
            if request_ == "SET_MEM_TABLE":
                frontend.set_mem_table([region], [fd])
            else:
                frontend.add_mem_reg(region, fd)

        with pytest.raises(BackendRefusedError):
            give()
        assert f"the frontend was refused {request_}: region 0: mmap offset" in reason(wire, "a")
        assert reason(wire, "a").endswith("look at the guest's memory backend")
        # It finds better memory: nothing is wrong any more.
        os.ftruncate(fd, 1 << 20)
        give()
        assert reason(wire, "a") == ""
    wire.wait_state("a", "listening")


def test_an_mtu_that_was_refused(wire: Wire) -> None:
    a, b = wire.guest("a", 1, mtu_of_port=1400), wire.guest("b", 2)
    teach(a, b)
    with pytest.raises(BackendRefusedError):
        a.frontend.net_set_mtu(1500)
    # It forwards all the same, for this frontend does not mind.
    info = wire.info("a")
    assert (info["state"], info["error"]) == ("ready", None)
    said = "the frontend was refused NET_SET_MTU: MTU 1500 is more than the port's mtu, 1400"
    assert said in (info["warning"] or "")
    assert "host_mtu" in (info["warning"] or "")
    a.frontend.net_set_mtu(1400)
    assert wire.info("a")["warning"] is None


def test_a_request_of_a_later_time(wire: Wire) -> None:
    with negotiated(wire.port("a")) as frontend:
        with pytest.raises(BackendRefusedError):
            frontend.command(Request.CHECK_DEVICE_STATE)
        assert "refused CHECK_DEVICE_STATE: it is not supported" in reason(wire, "a")


def test_what_was_refused_last_is_told_when_the_frontend_has_gone(wire: Wire) -> None:
    with negotiated(wire.port("a", mtu=1400)) as frontend, pytest.raises(BackendRefusedError):
        frontend.net_set_mtu(9000)
    wire.wait_state("a", "listening")
    assert "NET_SET_MTU: MTU 9000 is more" in reason(wire, "a")


def look_and_leave(path: Path) -> None:
    """As QEMU does that wants more queue pairs than there are."""
    with Frontend.connect(path) as frontend:
        frontend.get_features()
        frontend.get_protocol_features()
        frontend.set_protocol_features(DEFAULT_PROTOCOL_FEATURES)
        frontend.get_queue_num()


def test_frontends_that_come_in_vain(wire: Wire) -> None:
    """Their reason is told once, they are served at a pace, and who comes for good is served."""
    path = wire.port("a", queues=2)
    wire.wait_state("a", "listening")
    assert wire.info("a")["error"] is None
    start = time.monotonic()
    rounds = IN_VAIN + 3
    for _ in range(rounds):
        look_and_leave(path)
    # No sooner, however fast they are.
    assert time.monotonic() - start >= (rounds - IN_VAIN - 1) * SPACING_S
    wire.wait_state("a", "listening")
    assert f"{GUESS}, and does not get past its start: " in reason(wire, "a")
    assert "more than 2 queue pairs (QEMU: queues=N" in reason(wire, "a")
    assert "give the port that back" not in reason(wire, "a")
    wire.wait_log(GUESS)
    lines = [line for line in wire.switch.log[wire.log_start :].splitlines() if "port a:" in line]
    assert sum("frontend connected" in line for line in lines) == IN_VAIN
    assert sum(GUESS in line for line in lines) == 1
    assert len(lines) <= 2 * IN_VAIN + 3

    a = wire.enter(SoftwareGuest(A))
    a.connect(path)
    b = wire.guest("b", 2)
    teach(a, b)
    assert (wire.info("a")["state"], wire.info("a")["error"]) == ("ready", None)
    # What was is over: the next is announced as ever.
    seen = len(wire.switch.log)
    a.disconnect()
    a.reconnect()
    wire.switch.wait_for_log("port a: frontend connected", seen)
    wire.wait_state("a", "ready")


def test_a_frontend_that_came_in_vain_once(wire: Wire) -> None:
    """Both that may be are told."""
    look_and_leave(wire.port("a"))
    wire.wait_until(lambda: wire.info("a")["error"] is not None, "the port says so")
    said = reason(wire, "a")
    assert said.startswith(f"{GUESS}. If nobody ended it, ")
    assert "more than 1 queue pair (QEMU: queues=N" in said
    assert "its guest's device was made when the port offered more" in said


def test_a_legacy_guest_of_the_other_byte_order(wire: Wire) -> None:
    """QEMU says base and size, cannot say the byte order, and says no more."""
    legacy = DEFAULT_FEATURES & ~Feature.VERSION_1
    with negotiated(wire.port("a"), legacy) as frontend:
        frontend.set_vring_num(0, 256)
        frontend.set_vring_base(0, 0)
        wire.wait_until(lambda: bool(wire.info("a")["error"]), "the port says so")
        assert "the other byte order" in reason(wire, "a")
        assert "disable-legacy=on" in reason(wire, "a")
        wire.wait_log("the other byte order")
    with negotiated(wire.port("b")) as frontend, negotiated(wire.port("c"), legacy) as other:
        frontend.set_vring_num(0, 256)
        frontend.set_vring_base(0, 0)
        other.sync()
        # Both have been silent for long enough when a third one, later than they, is told.
        with negotiated(wire.port("d"), legacy) as last:
            last.set_vring_num(0, 256)
            last.set_vring_base(0, 0)
            wire.wait_until(lambda: bool(wire.info("d")["error"]), "the port says so")
        assert reason(wire, "b") == reason(wire, "c") == ""


@pytest.mark.parametrize("modern", [False, True])
def test_a_ring_in_the_other_byte_order(wire: Wire, modern: bool) -> None:
    """Frontends that do not look hand it over: its first avail index is 256."""
    features = DEFAULT_FEATURES if modern else DEFAULT_FEATURES & ~Feature.VERSION_1
    a = wire.guest("a", 1, queue_size=128, features=features)
    queue = a.transmitqs[0]
    a.memory.write(queue.layout.avail_gpa + 2, (1).to_bytes(2, "big"))
    queue.kick()
    wire.wait_state("a", "fault")
    error = wire.info("a")["error"] or ""
    assert "avail index 256 is more than the ring's size ahead of 0" in error
    assert ("In the other byte order it would be 1" in error) is not modern


@pytest.mark.parametrize("name", FORMATS)
def test_a_port_that_works_has_nothing_to_say(wire: Wire, name: str) -> None:
    wire.extra_features = FORMATS[name]
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    a.send(frames(B, A, [60] * 10))
    assert len(b.recv(10)) == 10
    for port in ("a", "b"):
        assert (wire.info(port)["error"], wire.info(port)["warning"]) == (None, None)
    assert ProtocolFeature.MQ in a.frontend.protocol_features
