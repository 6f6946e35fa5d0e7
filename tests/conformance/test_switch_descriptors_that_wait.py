"""Descriptors that make whoever receives, looks at or closes them wait: nobody else does."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance.hostile_sender import KINDS
from tests.conformance.turns import TURN_NS_MAX, longest_turns
from tests.support.frames import frame, mac
from tests.support.processes import environment
from tests.support.running import DEADLINE_S, RunningSwitch, Wire, teach
from vswitch.control.client import Client
from vswitch.lab.guest import BackendClosedError, Frontend, SoftwareGuest

B, C = mac(2), mac(3)
FUSE = pytest.mark.root("mounts a FUSE file system")
EVERY_KIND = [kind if kind == "tcp" else pytest.param(kind, marks=FUSE) for kind in KINDS]


class Bench:
    """Two innocent guests on a switch, and processes that send what waits to a third port."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.victim = wire.port("victim")
        self.b, self.c = wire.guest("b", 2), wire.guest("c", 3)
        teach(self.b, self.c)
        self._senders: list[subprocess.Popen[str]] = []
        self._tag = 0

    def send(self, kind: str, form: str, path: Path | None = None) -> str:
        """Have it sent; what the sender says of that. It keeps what it has until `close`."""
        return send(self._senders, kind, form, path or self.victim)

    def nobody_waits(self) -> None:
        """The event loop answers, and frames go from one innocent guest to the other and back."""
        self._tag += 1
        with Client(self.wire.switch.run_dir / "control.sock") as client:
            client.ping()
            assert max(longest_turns(client).values()) < TURN_NS_MAX
        for sender, receiver, dst, src in ((self.b, self.c, C, B), (self.c, self.b, B, C)):
            sent = [frame(dst, src, tag=self._tag)]
            sender.send(sent)
            assert receiver.recv(1) == sent
            sender.drain()

    def honest_frontend(self) -> None:
        """Somebody else can use the port, and set up rings."""
        with SoftwareGuest(mac(9)) as guest:
            guest.connect(self.victim)
            self.wire.wait_state("victim", "ready")
        self.wire.wait_state("victim", "listening")

    def close(self) -> None:
        end(self._senders)


def send(senders: list[subprocess.Popen[str]], kind: str, form: str, path: Path) -> str:
    """Start a sender, which is added to the others; what it says of how it went."""
    sender = subprocess.Popen(
        [sys.executable, "-m", "tests.conformance.hostile_sender", kind, form, str(path)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    senders.append(sender)
    assert sender.stdout is not None
    return sender.stdout.readline().strip()


def end(senders: list[subprocess.Popen[str]]) -> None:
    """End them. Their file systems go with their stdin, and whoever waited for those goes on."""
    for sender in senders:
        assert sender.stdin is not None
        sender.stdin.close()
    for sender in senders:
        sender.kill()
        sender.wait()
        assert sender.stdout is not None
        sender.stdout.close()
    senders.clear()


@pytest.fixture
def bench(wire: Wire) -> Iterator[Bench]:
    bench = Bench(wire)
    try:
        yield bench
    finally:
        bench.close()


def relay_of(switch: RunningSwitch) -> int:
    """The process id of a switch's relay."""
    pid = switch.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    [relay] = [
        int(child) for child in children
        if Path(f"/proc/{child}/comm").read_text() == "vswitch-relay\n"
    ]  # fmt: skip
    return relay


@pytest.mark.parametrize("form", ["received", "unread", "without_room"])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_sent_by_a_frontend(bench: Bench, kind: str, form: str) -> None:
    assert bench.send(kind, form) == "sent"
    bench.nobody_waits()
    bench.wire.wait_log("port victim: disconnected: ")
    bench.nobody_waits()
    bench.honest_frontend()
    # And the port goes, with what its relay still waits for.
    bench.wire.remove("victim")
    assert not bench.victim.exists()
    bench.nobody_waits()


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_sent_by_whoever_is_turned_away(bench: Bench, kind: str) -> None:
    with Frontend.connect(bench.victim, 5.0) as frontend:
        frontend.get_features()
        bench.send(kind, "received")
        bench.wire.wait_log("port victim: refused a second frontend")
        bench.nobody_waits()
        frontend.get_features()


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_in_a_message_that_is_not_finished(bench: Bench, kind: str) -> None:
    assert bench.send(kind, "in_the_midst") == "sent"
    bench.wire.wait_log("port victim: frontend connected")
    bench.nobody_waits()
    bench.wire.remove("victim")
    bench.nobody_waits()


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_in_the_backlog_of_a_socket_that_is_closed(bench: Bench, kind: str) -> None:
    """The relay does not run, so what is sent stays where it is until the port is gone."""
    relay = relay_of(bench.wire.switch)
    os.kill(relay, signal.SIGSTOP)
    try:
        assert bench.send(kind, "received") == "sent"
        bench.wire.remove("victim")
    finally:
        os.kill(relay, signal.SIGCONT)
    bench.nobody_waits()
    bench.wire.port("victim")
    bench.nobody_waits()


@pytest.mark.parametrize("kind", ["tcp", pytest.param("flush", marks=FUSE)])
@pytest.mark.parametrize("crash", ["", "the switch", "both"])
def test_a_new_switch_while_the_old_relay_is_stuck(run_dir: Path, kind: str, crash: str) -> None:
    """It ends in good order, or is killed; what it listened on is free for the next one."""
    directory = run_dir / f"stuck-{kind}-{crash[-4:]}"
    directory.mkdir()
    sockets = [directory / name for name in ("a", "b", "c")]
    tables = "".join(f'[[port]]\nname = "{path.name}"\nsocket = "{path}"\n' for path in sockets)
    senders: list[subprocess.Popen[str]] = []
    switches = [RunningSwitch(directory, tables=tables)]
    try:
        relay = relay_of(switches[0])
        for path in sockets:
            assert send(senders, kind, "received", path) == "sent"
            switches[0].wait_for_log(f"port {path.name}: disconnected: ")
        if crash == "both":
            os.kill(relay, signal.SIGSTOP)
            for path in sockets:
                # Into the backlog of each, where the relay's own end finds it.
                assert send(senders, kind, "received", path) == "sent"
            os.kill(relay, signal.SIGKILL)
        if crash:
            switches[0].kill()
        else:
            switches[0].stop()
        switches.append(RunningSwitch(directory, tables=tables))
        with SoftwareGuest(mac(2)) as b, SoftwareGuest(mac(3)) as c:
            b.connect(sockets[1])
            c.connect(sockets[2])
            teach(b, c)
        switches.pop().stop()
    finally:
        end(senders)
        if len(switches) > 1:
            switches[1].stop()


def test_nobody_can_send_descriptors_to_the_control_socket(start: Callable[..., Wire]) -> None:
    """The kernel refuses it, where it can (Linux 6.16)."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, 83, 0)
        except OSError:
            pytest.skip("this kernel has no SO_PASSRIGHTS")
    bench = Bench(start(control_permissions="0666"))
    try:
        control = bench.wire.switch.run_dir / "control.sock"
        assert bench.send("tcp", "control", control) == "refused"
        bench.nobody_waits()
    finally:
        bench.close()


# A kernel before 6.16.
OLD_KERNEL = (
    "from vswitch.host import unixsocket\n"
    "unixsocket.refuse_rights = lambda sock: False\n"
    "from vswitch.cli.main import main\n"
    "main()\n"
)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_sent_to_the_control_socket_of_an_old_kernel(start: Callable[..., Wire], kind: str) -> None:
    bench = Bench(start(command=(sys.executable, "-c", OLD_KERNEL), control_permissions="0666"))
    try:
        control = bench.wire.switch.run_dir / "control.sock"
        assert bench.send(kind, "control", control) == "sent"
        bench.nobody_waits()
        # Clients are told apart as ever, and none more is let in than may be.
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(Client(control)).ping()
            bench.nobody_waits()
            assert [port["name"] for port in bench.wire.client.ports()] == ["victim", "b", "c"]
    finally:
        bench.close()


@FUSE
def test_a_port_whose_connections_cannot_be_closed_says_so(bench: Bench) -> None:
    for _ in range(8):
        assert bench.send("flush", "received") == "sent"
    bench.wire.wait_until(
        lambda: "cannot be closed" in str(bench.wire.info("victim")["error"]), "the port says why"
    )
    bench.nobody_waits()
    bench.close()  # the senders end
    bench.wire.wait_until(
        lambda: "cannot be closed" not in str(bench.wire.info("victim")["error"]), "it is over"
    )
    bench.honest_frontend()


def test_a_relay_that_ends_takes_the_switch_with_it(run_dir: Path) -> None:
    """In good order: a service manager starts it again, and guests go on as after any restart."""
    directory = run_dir / "relay-killed"
    directory.mkdir()
    switch = RunningSwitch(directory)
    wire = Wire(switch)
    guest = wire.guest("a", 1)
    os.kill(relay_of(switch), signal.SIGKILL)
    assert switch.process.wait(DEADLINE_S) == 1
    switch.wait_for_log("the relay of the vhost-user sockets ended (")
    with pytest.raises(BackendClosedError):
        guest.recv(1)
    guest.close()
    switch.kill()
    assert sorted(path.name for path in directory.iterdir()) == ["control.sock.rings", "ports.toml"]
