"""A frontend punches a large hole into its memory file: who touches it there waits for the end.

The kernel's doing, which SECURITY.md does not promise to prevent; what is tested is the way out
that it recommends.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.frames import BROADCAST, frame, mac
from tests.support.running import RunningSwitch, Wire, teach
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.guest.packets import format_mac
from vswitch.lab.guest.raw import DESC_F_WRITE, RawDesc
from vswitch.vhost_user.protocol import MemRegion

A, B, C = mac(1), mac(2), mac(3)
SIZE = 256 << 20
FAR = 1 << 40
"""A guest-physical address at which no guest here has memory."""
KEEP_SIZE_PUNCH_HOLE = 3
ENOUGH = 5
ATTEMPTS = 30
"""Holes that are punched at most; each takes as long as the kernel takes."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_numbers = itertools.count()


class Holed:
    """A region of a guest's that is all pages, until it is a hole."""

    def __init__(self, guest: SoftwareGuest) -> None:
        self.fd = os.memfd_create("holed")
        os.ftruncate(self.fd, SIZE)
        guest.frontend.add_mem_reg(MemRegion(FAR, SIZE, 0x7E00_0000_0000, 0), self.fd)

    def fill(self) -> None:
        assert _libc.fallocate(self.fd, 0, 0, SIZE) == 0

    @contextlib.contextmanager
    def being_punched(self) -> Iterator[Callable[[], bool]]:
        """Once some of it is gone; gives what tells whether it still is being punched."""
        result: list[int] = []
        full = SIZE // 512

        def punch() -> None:
            result.append(_libc.fallocate(self.fd, KEEP_SIZE_PUNCH_HOLE, 0, SIZE))

        thread = threading.Thread(target=punch)
        thread.start()
        try:
            while os.fstat(self.fd).st_blocks == full and not result:
                pass
            # Those who wait are woken at the very end, before the system call returns.
            yield lambda: os.fstat(self.fd).st_blocks > full // 16
        finally:
            thread.join()
        assert result == [0]


def hear_each_other(
    b: SoftwareGuest, c: SoftwareGuest, holed: Holed, touch: Callable[[], None]
) -> None:
    """While a hole is being punched and after its pages were touched, frames go from b to c.

    A worker that waits for the punching delivers none before that is over, but for what it had
    taken already.
    """
    most = 0
    for _ in range(ATTEMPTS):
        holed.fill()
        with holed.being_punched() as punching:
            touch()
            heard = 0
            while punching() and heard <= ENOUGH:
                b.send([frame(C, B, tag=heard)])
                while c.recv(1) != [frame(C, B, tag=heard)]:
                    pass  # what is flooded
                heard += punching()
        most = max(most, heard)
        if most > ENOUGH:
            return
    pytest.fail(f"{most} frames at most while a hole was punched")


def offer_from(a: SoftwareGuest) -> Callable[[], None]:
    """What has the switch read a frame of this guest's that lies in the hole."""
    queue = a.transmitqs[0]

    def touch() -> None:
        queue.raw.offer(RawDesc(FAR, 72))  # which is gone first
        queue.kick()

    return touch


def receive_into(a: SoftwareGuest) -> None:
    """All receive buffers of this guest lie in the hole now."""
    raw = a.receiveqs[0].raw
    for i in range(a.receiveqs[0].layout.size):
        raw.write_desc(i, RawDesc(FAR + 4096 * i, 2048, DESC_F_WRITE))


def test_what_a_port_with_a_worker_of_its_own_sends(run_dir: Path) -> None:
    """That worker waits and no other."""
    directory = run_dir / "own worker"
    directory.mkdir()
    running = RunningSwitch(directory, workers=2)
    wire = Wire(running)
    try:
        a, b, c = wire.guest("a", 1), wire.guest("b", 2), wire.guest("c", 3)
        for name, worker in (("a", 1), ("b", 0), ("c", 0)):
            wire.client.worker_pin(name, worker)
        teach(a, b, c)
        hear_each_other(b, c, Holed(a), offer_from(a))
        assert wire.info("a")["state"] == "ready"
    finally:
        wire.close()
        running.stop()


@pytest.mark.root("TAPs and a bridge")
@pytest.mark.parametrize("side", ["sends", "receives"])
def test_a_switch_of_its_own(run_dir: Path, side: str) -> None:
    """Two switches joined by a bridge: what has to wait is the other one.

    Even if it is for frames of ours, which are flooded to whoever punches.
    """
    bridge = f"vswb{os.getpid() % 100000}"
    subprocess.run(
        ["ip", "link", "add", bridge, "up", "type", "bridge", "forward_delay", "0"], check=True
    )
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["ip", "link", "del", bridge], check=True)
        wires = []
        for _ in range(2):
            directory = run_dir / f"own switch {next(_numbers)}"
            directory.mkdir()
            running = RunningSwitch(directory)
            stack.callback(running.stop)
            wires.append(Wire(running))
            stack.callback(wires[-1].close)
            name = f"vswp{os.getpid() % 100000}-{next(_numbers)}"
            wires[-1].client.add_uplink(name, bridge=bridge)
            # It would have something of its own to say, when it likes.
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
            stack.callback(wires[-1].client.del_uplink, name)
            wires[-1].wait_state(name, "up")
        theirs, ours = wires
        a = theirs.guest("a", 1)
        b, c = ours.guest("b", 2), ours.guest("c", 3)
        for each in (b, c):
            # Behind what host and bridge said before they were told not to.
            hello = frame(BROADCAST, format_mac(each.mac), 60, 999)
            each.send([hello])
            while (c if each is b else b).recv(1) != [hello]:
                pass
        a.send([frame(BROADCAST, A)])
        while frame(BROADCAST, A) not in b.recv(1):
            pass
        touch = offer_from(a)
        if side == "receives":
            receive_into(a)

            def touch() -> None:
                b.send([frame(BROADCAST, B)])

        hear_each_other(b, c, Holed(a), touch)
        assert ours.info("b")["state"] == ours.info("c")["state"] == "ready"
