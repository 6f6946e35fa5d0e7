"""Software guests and a TAP uplink: the host's side is a packet socket on the interface.

All of it twice: with io_uring, and as on a kernel that gives none.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.frames import BROADCAST, frame, frames, mac
from tests.support.running import DEADLINE_S, RunningSwitch, Wire, silent, teach
from vswitch import ethertypes

pytestmark = pytest.mark.root("makes TAP interfaces")

A, B = mac(1), mac(2)
HOST = "52:54:00:00:ff:01"
_numbers = itertools.count()


WITHOUT_URING = """
import functools
from vswitch import switch
from vswitch.cli.main import main
switch.Engine = functools.partial(switch.Engine, uring=False)
main()
"""


@pytest.fixture(scope="module", params=["io_uring", "write"])
def switch(run_dir: Path, request: pytest.FixtureRequest) -> Iterator[RunningSwitch]:
    without = ("-c", WITHOUT_URING)
    way = ("-m", "vswitch") if request.param == "io_uring" else without
    running = RunningSwitch(run_dir, command=(sys.executable, *way))
    try:
        yield running
    finally:
        running.stop()
    # Had this kernel none, both would test the same.
    assert "gives no io_uring" not in running.log


class Tap:
    """An uplink of the switch, and the host's view of it."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.name = f"vswt{os.getpid() % 100000}-{next(_numbers)}"
        # Made beforehand, to have none of the kernel's own chatter on it from the beginning.
        subprocess.run(["ip", "tuntap", "add", self.name, "mode", "tap"], check=True)
        Path(f"/proc/sys/net/ipv6/conf/{self.name}/disable_ipv6").write_text("1")
        wire.client.add_uplink(self.name)
        # Bound before it has a protocol, or it would begin with frames of other interfaces.
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.socket.bind((self.name, ethertypes.EXPERIMENT))
        self.socket.settimeout(DEADLINE_S)
        self.link("up")
        wire.wait_state(self.name, "up")

    def link(self, *words: str) -> None:
        subprocess.run(["ip", "link", "set", self.name, *words], check=True)

    def recv(self, n: int) -> list[bytes]:
        """Frames that the switch gave to the host; not those that `send` gave to the switch."""
        got: list[bytes] = []
        while len(got) < n:
            try:
                data, address = self.socket.recvfrom(65536)
            except OSError as error:
                if error.errno == errno.ENETDOWN:
                    continue  # told once, of the interface having been down meanwhile
                raise
            if address[2] != socket.PACKET_OUTGOING:
                got.append(data)
        return got

    def send(self, frames: list[bytes]) -> None:
        for data in frames:
            self.socket.send(data)

    def close(self) -> None:
        self.socket.close()
        self.wire.client.del_uplink(self.name)
        if Path(f"/sys/class/net/{self.name}").exists():
            subprocess.run(["ip", "link", "del", self.name], check=True)


@pytest.fixture
def tap(wire: Wire) -> Iterator[Tap]:
    tap = Tap(wire)
    try:
        yield tap
    finally:
        tap.close()


def test_both_ways(wire: Wire, tap: Tap) -> None:
    a, b = wire.guest("a", 1), wire.guest("b", 2, features=0)
    teach(a, b)
    assert len(tap.recv(2)) == 2
    tap.send([frame(BROADCAST, HOST)])
    assert a.recv(1) == b.recv(1) == [frame(BROADCAST, HOST)]
    assert wire.learned() == {A: "a", B: "b", HOST: tap.name}
    for guest, address in ((a, A), (b, B)):
        out = frames(HOST, address, range(60, 1515, 91))
        guest.send(out)
        assert tap.recv(len(out)) == out
        back = frames(address, HOST, range(60, 1515, 91), tag=7)
        tap.send(back)
        assert guest.recv(len(back)) == back
    a.drain()
    b.drain()
    assert silent(a, b)
    stats = wire.stats(tap.name)
    assert (stats["ingress_frames"], stats["egress_frames"]) == (33, 34)
    assert stats["drops"] == {}


def test_frames_in_many_pieces(wire: Wire, tap: Tap) -> None:
    a = wire.guest("a", 1, tx_cuts=(-5, 0, 1, 14, 59, 700), indirect=False, regions=4)
    out = frames(HOST, A, [14, 60, 701, 1514])
    a.send(out)
    assert tap.recv(4) == out


def test_bursts_of_all_kinds(wire: Wire, tap: Tap) -> None:
    """Short ones, long ones and some that are dropped, in order, and more than a burst of them."""
    a = wire.guest("a", 1, max_frame_len=9018)
    for n in range(3):
        out = frames(HOST, A, [60, 1514, 244, 245, 246, 1519, 61, 700, 9014, 60, 60] * 6, tag=n)
        a.send(out)
        passed = [each for each in out if len(each) <= 1518]
        assert tap.recv(len(passed)) == passed
    a.drain()
    assert wire.drops(tap.name) == {"egress-mtu": 2 * 18}
    assert wire.stats(tap.name)["egress_frames"] == 9 * 18


def test_bursts_of_more_pieces_than_are_written_together(wire: Wire, tap: Tap) -> None:
    a = wire.guest("a", 1, tx_cuts=tuple(range(1, 64)))
    out = frames(HOST, A, [1200] * 40)
    a.send(out)
    assert tap.recv(40) == out


def test_interface_down_and_up(wire: Wire, tap: Tap) -> None:
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    tap.send([frame(BROADCAST, HOST)])
    assert a.recv(1) == b.recv(1) == [frame(BROADCAST, HOST)]
    tap.link("down")
    wire.wait_state(tap.name, "down")
    a.send([frame(HOST, A)] * 3 + [frame(BROADCAST, A)])
    assert b.recv(1) == [frame(BROADCAST, A)]
    a.drain()
    assert wire.drops(tap.name) == {"tap-down": 4}
    tap.link("up")
    wire.wait_state(tap.name, "up")
    out = frame(HOST, A, 300)
    a.send([out])
    assert tap.recv(1) == [out]
    tap.send([frame(A, HOST, 301)])
    assert a.recv(1) == [frame(A, HOST, 301)]


def test_mtu_follows_the_interface(wire: Wire, tap: Tap) -> None:
    a = wire.guest("a", 1, max_frame_len=9018)
    a.send([frame(HOST, A, 1518), frame(HOST, A, 1519)])
    assert [len(f) for f in tap.recv(1)] == [1518]
    a.drain()
    assert wire.drops(tap.name) == {"egress-mtu": 1}
    tap.link("mtu", "9000")
    wire.wait_until(lambda: wire.info(tap.name)["mtu"] == 9000, "the switch sees the new MTU")
    a.send([frame(HOST, A, 9014)])
    assert tap.recv(1) == [frame(HOST, A, 9014)]
    tap.send([frame(A, HOST, 9014)])
    assert a.recv(1) == [frame(A, HOST, 9014)]
    assert wire.drops(tap.name) == {"egress-mtu": 1}


def test_deleted_interface(wire: Wire, tap: Tap) -> None:
    """Somebody removes the interface: the port says so, the guests go on."""
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    subprocess.run(["ip", "link", "del", tap.name], check=True)
    wire.wait_state(tap.name, "fault")
    assert "was deleted" in str(wire.info(tap.name)["error"])
    for n in range(5):
        a.send([frame(B, A, tag=n)])
        assert b.recv(1) == [frame(B, A, tag=n)]


def test_uplinks_come_and_go(wire: Wire, tap: Tap) -> None:
    a = wire.guest("a", 1)
    for n in range(5):
        other = Tap(wire)
        a.send([frame(BROADCAST, A, tag=n)])
        assert other.recv(1) == tap.recv(1) == [frame(BROADCAST, A, tag=n)]
        # From one uplink to the other, through the switch.
        other.send([frame(BROADCAST, HOST, tag=n)])
        assert tap.recv(1) == a.recv(1) == [frame(BROADCAST, HOST, tag=n)]
        other.close()
