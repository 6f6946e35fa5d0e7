"""Connections come and go: both socket modes, reconnects, hot add and delete, restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.frames import BROADCAST, frame, frames, mac
from tests.support.running import DEADLINE_S, RunningSwitch, Wire, exchanging, silent, teach
from vswitch.lab.guest import BackendClosedError, Frontend, SoftwareGuest
from vswitch.vhost_user.protocol import ProtocolFeature

A, B, C = mac(1), mac(2), mac(3)


def talk(a: SoftwareGuest, b: SoftwareGuest, tag: int = 0) -> None:
    """Frames both ways between guests 1 and 2."""
    for sender, receiver, dst, src in ((a, b, B, A), (b, a, A, B)):
        sent = frames(dst, src, [60, 1514, 300], tag)
        sender.send(sent)
        assert receiver.recv(3) == sent
        sender.drain()


@pytest.mark.parametrize("mode", ["server", "client"])
def test_reconnect_at_leisure(wire: Wire, mode: str) -> None:
    """The switch has noticed that the frontend is gone before the next one comes."""
    a, b = wire.guest("a", 1, mode=mode), wire.guest("b", 2)
    teach(a, b)
    waiting = "listening" if mode == "server" else "connecting"
    for n in range(2, 5):
        if mode == "server":
            a.drop()
            wire.wait_state("a", waiting)
        a.reconnect()
        wire.wait_state("a", "ready")
        assert wire.info("a")["connects"] == n
        a.send([frame(BROADCAST, A)])
        assert b.recv(1) == [frame(BROADCAST, A)]
        talk(a, b, n)
    assert wire.drops("a") == wire.drops("b") == {}


def test_reconnect_at_once(wire: Wire) -> None:
    """The successor knocks before the switch has cleaned up after its predecessor."""
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    for n in range(20):
        if n % 2:
            a.drop()
        else:
            a.disconnect()
        a.reconnect()
        a.send([frame(BROADCAST, A, tag=n)])
        assert b.recv(1) == [frame(BROADCAST, A, tag=n)]
        talk(a, b, n)
    assert wire.info("a")["connects"] == 21


def test_frames_wait_for_the_reconnect(wire: Wire) -> None:
    """What lies in the transmitq while nobody reads it goes out later, once and in order."""
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    a.disconnect()
    wire.wait_state("a", "listening")
    queued = frames(B, A, range(60, 100))
    a.send(queued)
    a.reconnect()
    assert b.recv(len(queued)) == queued
    a.drain()
    assert silent(b)


def test_reboot(wire: Wire) -> None:
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    for n in range(3):
        teach(a, b)
        talk(a, b, n)
        a.reboot()
        assert wire.info("a")["state"] == "ready"
    assert wire.info("a")["connects"] == 1


def test_client_mode_waits_for_the_frontend(wire: Wire) -> None:
    """The port is there before anybody listens."""
    b = wire.guest("b", 2)
    socket = wire.port("a", mode="client")
    assert wire.info("a")["state"] == "connecting"
    assert "a" in [port["name"] for port in wire.client.ports()]
    a = wire.enter(SoftwareGuest(A))
    a.listen(socket)
    a.accept()
    teach(a, b)
    talk(a, b)


def test_both_ends_in_client_mode_say_why(wire: Wire) -> None:
    socket = wire.port("a", mode="client")
    wire.wait_until(lambda: wire.info("a")["error"] is not None, "the port says what is wrong")
    assert str(socket) in str(wire.info("a")["error"])
    wire.wait_log("port a: ")


def test_second_frontend_is_refused(wire: Wire) -> None:
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    second = Frontend.connect(a.frontend.path, timeout=DEADLINE_S)
    with pytest.raises(BackendClosedError):
        second.get_features()
    second.close()
    wire.wait_log("port a: refused a second frontend")
    talk(a, b)
    assert wire.info("a")["connects"] == 1


def test_deleted_port(wire: Wire) -> None:
    a, b, c = wire.guest("a", 1), wire.guest("b", 2), wire.guest("c", 3)
    teach(a, b, c)
    socket = Path(a.frontend.path)
    wire.remove("a")
    with pytest.raises(BackendClosedError):
        a.recv(1)
    assert not socket.exists()
    assert wire.learned() == {B: "b", C: "c"}
    b.send([frame(A, B)])
    assert c.recv(1) == [frame(A, B)]
    # The same name and address anew.
    a.connect(wire.port("a"))
    teach(a, b)
    assert c.recv(2)
    talk(a, b)


@pytest.mark.parametrize("mode", ["server", "client"])
def test_hot_add_and_delete_under_load(wire: Wire, mode: str) -> None:
    """Ports come, talk and go while two guests exchange frames as fast as they can."""
    b, c = wire.guest("b", 2), wire.guest("c", 3)
    teach(b, c)
    with exchanging(b, c):
        for n in range(10, 20):
            names = (f"x{n}", f"y{n}")
            x = wire.guest(names[0], 1000 + n, mode=mode)
            y = wire.guest(names[1], 2000 + n, mode=mode)
            # No broadcast: it would reach the two that count every frame.
            wire.client.fdb_add(mac(1000 + n), names[0])
            wire.client.fdb_add(mac(2000 + n), names[1])
            x.send([frame(mac(2000 + n), mac(1000 + n), tag=n)] * 50)
            assert y.recv(50) == [frame(mac(2000 + n), mac(1000 + n), tag=n)] * 50
            for name in names:
                wire.remove(name)
    assert wire.drops("b") == wire.drops("c") == {}
    assert wire.learned() == {B: "b", C: "c"}


@pytest.mark.parametrize("killed", [False, True])
def test_restart_of_the_switch(run_dir: Path, killed: bool) -> None:
    """Guests outlive the switch and go on with the rings they have, in either socket mode."""
    directory = run_dir / f"restart-{killed}"
    directory.mkdir()
    sockets = directory / "a.sock", directory / "b.sock"
    with SoftwareGuest(A) as a, SoftwareGuest(B) as b:
        b.listen(sockets[1])
        for n in range(3):
            running = RunningSwitch(directory)
            try:
                running.client.add_port("a", sockets[0])
                running.client.add_port("b", sockets[1], mode="client")
                if n == 0:
                    a.connect(sockets[0])
                    b.accept()
                else:
                    a.reconnect()
                    b.reconnect()
                # b was not learned: this one reaches it all the same.
                a.send([frame(B, A, tag=n)])
                assert b.recv(1) == [frame(B, A, tag=n)]
                talk(a, b, n)
            finally:
                if killed:
                    running.kill()
                else:
                    running.stop()
            with pytest.raises(BackendClosedError):
                a.recv(1)
            with pytest.raises(BackendClosedError):
                b.recv(1)
            assert sockets[0].exists() == killed


def test_no_descriptor_is_left_behind(wire: Wire) -> None:
    def descriptors() -> int:
        return len(list(Path(f"/proc/{wire.switch.process.pid}/fd").iterdir()))

    def mappings() -> int:
        text = Path(f"/proc/{wire.switch.process.pid}/maps").read_text()
        return text.count("vswitch-guest")

    a, b = wire.guest("a", 1, regions=8), wire.guest("b", 2, queues=2)
    before, mapped = descriptors(), mappings()
    assert mapped >= 9
    for n in range(10):
        a.drop()
        wire.wait_state("a", "listening")
        if n == 0:
            assert mappings() < mapped
        a.connect(a.path)
        b.reboot()
        a.reboot()
    teach(a, b)
    assert descriptors() == before
    assert mappings() == mapped


def test_without_optional_protocol_features(wire: Wire) -> None:
    """Frontends that know no REPLY_ACK, or nothing of protocol features at all."""
    b = wire.guest("b", 2)
    for name, n, options in (
        ("bare", 5, {"features": 0}),
        ("no-ack", 6, {"protocol_features": 0}),
        ("mq-only", 7, {"protocol_features": ProtocolFeature.MQ}),
    ):
        guest = wire.guest(name, n, **options)
        wire.wait_state(name, "ready")
        hello = frame(BROADCAST, mac(n))
        guest.send([hello])
        assert b.recv(1) == [hello]
        b.send([frame(mac(n), B)])
        assert guest.recv(1) == [frame(mac(n), B)]
        guest.reboot()
        wire.wait_state(name, "ready")
        guest.send([hello])
        assert b.recv(1) == [hello]
        wire.remove(name)


def test_responders_find_the_switch_again(run_dir: Path) -> None:
    """Guests that answer pings in a thread of their own reconnect by themselves."""
    directory = run_dir / "responders"
    directory.mkdir()
    sockets = directory / "a.sock", directory / "b.sock"
    with SoftwareGuest(A, "10.2.0.1") as a, SoftwareGuest(B, "10.2.0.2") as b:
        b.listen(sockets[1])
        for n in range(3):
            running = RunningSwitch(directory)
            try:
                running.client.add_port("a", sockets[0])
                running.client.add_port("b", sockets[1], mode="client")
                if n == 0:
                    a.connect(sockets[0])
                    b.accept()
                    a.start_responder(reconnect=True)
                    b.start_responder(reconnect=True)
                assert a.ping("10.2.0.2", timeout=DEADLINE_S)
                assert b.ping("10.2.0.1", timeout=DEADLINE_S)
            finally:
                running.stop()
        a.stop_responder()
        b.stop_responder()
