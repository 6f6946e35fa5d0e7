"""Memory that is not there when it is touched: a file cut short, huge pages that are used up.

Every access to it is a SIGBUS, in whichever thread makes it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.scattering import scatter
from tests.support.frames import BROADCAST, frame, mac
from tests.support.running import RunningSwitch, Wire, teach, translated
from vswitch.lab.guest import Region, SoftwareGuest
from vswitch.lab.guest.net_driver import AnyQueue
from vswitch.lab.guest.raw import RawDesc
from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import MemRegion, Request

A, B, C = mac(1), mac(2), mac(3)
HUGE_PAGE = 2 << 20
FAR = 1 << 40
"""A guest-physical address at which no guest here has memory."""


@pytest.fixture
def own_wire(run_dir: Path) -> Iterator[Wire]:
    """A switch for each test: if this one dies, no other test is to suffer."""
    directory = Path(tempfile.mkdtemp(dir=run_dir))
    running = RunningSwitch(directory)
    wire = Wire(running)
    yield wire
    if running.process.poll() is None:
        wire.close()
        running.stop()
    else:
        running.kill()
        pytest.fail(f"the switch has died: {running.process.returncode}\n{running.log}")


def check(wire: Wire, b: SoftwareGuest, c: SoftwareGuest) -> None:
    wire.wait_state("a", "fault")
    assert "memory" in str(wire.info("a")["error"])
    wire.wait_log("port a: fault")
    for n in range(3):
        b.send([frame(C, B, tag=n)])
        assert c.recv(1) == [frame(C, B, tag=n)]
        c.send([frame(B, C, tag=n)])
        assert b.recv(1) == [frame(B, C, tag=n)]


@pytest.mark.parametrize("regions", [1, 4])
def test_receiver(own_wire: Wire, regions: int) -> None:
    wire = own_wire
    a, b, c = wire.guest("a", 1, regions=regions), wire.guest("b", 2), wire.guest("c", 3)
    teach(a, b, c)
    for region in a.memory.regions:
        a.memory.truncate(region, 0)
    b.send([frame(BROADCAST, B)])
    assert c.recv(1) == [frame(BROADCAST, B)]
    check(wire, b, c)
    # Another guest gets the port.
    a.frontend.close()
    successor = wire.enter(SoftwareGuest(A))
    successor.connect(a.path)
    teach(successor, b, c)


def test_sender(own_wire: Wire) -> None:
    """The poll of its transmitq alone meets the hole."""
    wire = own_wire
    a, b, c = wire.guest("a", 1), wire.guest("b", 2), wire.guest("c", 3)
    teach(a, b, c)
    queue = a.transmitqs[0]
    a.memory.truncate(a.memory.regions[0], 0)
    queue.kick()
    check(wire, b, c)


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_scattered_rings(own_wire: Wire, role: str) -> None:
    """Pages of a ring that were mapped once more, side by side, are lost there as well."""
    wire = own_wire
    length = 1 << 24
    regions = [Region(0, length, 0x7F00_0000_0000)]
    a = wire.guest("a", 1, iommu=True, queue_size=1024, regions=regions)
    b, c = wire.guest("b", 2), wire.guest("c", 3)
    translated(a)
    teach(a, b, c)
    queue: AnyQueue = a.transmitqs[0] if role == "sender" else a.receiveqs[0]
    scatter(a, queue, length // 2)
    sent = [frame(B, A), frame(A, B)]
    a.send(sent[:1])
    assert b.recv(1) == sent[:1]
    b.send(sent[1:])
    assert a.recv(1) == sent[1:]
    # The first half is still there, and with it all that is no ring.
    a.memory.truncate(a.memory.regions[0], length // 2)
    if role == "sender":
        queue.kick()
    else:
        b.send([frame(BROADCAST, B)])
        assert c.recv(1) == [frame(BROADCAST, B)]
    check(wire, b, c)


def test_start(own_wire: Wire) -> None:
    """The file is cut between SET_MEM_TABLE and the start of the rings: the main thread's turn."""
    wire = own_wire
    a, b, c = wire.guest("a", 1), wire.guest("b", 2), wire.guest("c", 3)
    teach(a, b, c)
    a.stop_rings()
    a.memory.truncate(a.memory.regions[0], 0)
    frontend = a.frontend
    queue = a.receiveqs[0]
    frontend.set_vring_addr(a.vring_addr(queue))
    frontend.set_vring_enable(queue.index, True)
    # Accepted or refused, as the switch likes; it goes on either way.
    frontend.request(
        Request.SET_VRING_KICK,
        protocol.encode_u64(queue.index),
        [queue.kick_fd],
        flags=protocol.FLAG_NEED_REPLY,
    )
    b.send([frame(C, B)])
    assert c.recv(1) == [frame(C, B)]


@contextlib.contextmanager
def no_huge_pages() -> Iterator[None]:
    """All huge pages that are free are spoken for meanwhile."""
    free = int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    with contextlib.ExitStack() as stack:
        if free:
            taken = os.memfd_create("taken", os.MFD_HUGETLB)
            stack.callback(os.close, taken)
            os.ftruncate(taken, free * HUGE_PAGE)
            stack.enter_context(mmap.mmap(taken, free * HUGE_PAGE))
        yield


def test_huge_pages_that_cannot_be_had(own_wire: Wire) -> None:
    """A hugetlbfs file takes its pages when they are touched, and there are none left then."""
    wire = own_wire
    a, b, c = wire.guest("a", 1), wire.guest("b", 2), wire.guest("c", 3)
    teach(a, b, c)
    with no_huge_pages():
        fd = os.memfd_create("guest", os.MFD_HUGETLB)
        try:
            os.ftruncate(fd, HUGE_PAGE)
            a.frontend.add_mem_reg(MemRegion(FAR, HUGE_PAGE, 0x7E00_0000_0000, 0), fd)
        finally:
            os.close(fd)
        # Its frame lies there.
        a.transmitqs[0].raw.offer(RawDesc(FAR, 72))
        a.transmitqs[0].kick()
        check(wire, b, c)
