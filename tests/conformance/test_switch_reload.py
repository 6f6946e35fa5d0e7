"""A driver is reloaded, or set up anew, under rings that count as running.

Linux's virtio_uml and DPDK's virtio-user up to 17.11 disable the rings and never send
GET_VRING_BASE; what follows comes in each frontend's own order. libvhost-user, DPDK's and Snabb's
backends take it.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.dirtylog import PAGE_LEN, DirtyLog
from tests.support.formats import FORMATS
from tests.support.frames import frames, mac
from tests.support.running import Wire, silent, teach
from vswitch.lab.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.lab.guest.errors import BackendRefusedError
from vswitch.lab.guest.net_driver import AnyQueue
from vswitch.lab.guest.options import DEFAULT_PROTOCOL_FEATURES, Wanted
from vswitch.vhost_user.protocol import (
    HEADER,
    VRING_F_LOG,
    Feature,
    Inflight,
    ProtocolFeature,
    Request,
    decode_inflight,
    encode_inflight,
)

A, B = mac(1), mac(2)
ORDERS = list(itertools.permutations(("memory", "num", "base", "addr")))

Step = Callable[[AnyQueue], None]


def disable(guest: SoftwareGuest) -> None:
    """As virtio_uml's vu_del_vqs: the last ring first, and all that was said has been done."""
    for queue in reversed(list(guest.queues())):
        guest.frontend.set_vring_enable(queue.index, False)
    guest.frontend.sync()


def set_up(guest: SoftwareGuest, order: tuple[str, ...], *, kick: bool = True) -> None:
    """Say everything of the rings in that order, and enable them."""
    frontend = guest.frontend
    steps: dict[str, Step] = {
        "num": lambda queue: frontend.set_vring_num(queue.index, queue.layout.size),
        "base": lambda queue: frontend.set_vring_base(queue.index, queue.base),
        "addr": lambda queue: frontend.set_vring_addr(guest.vring_addr(queue)),
    }
    for step in order:
        if step == "memory":
            frontend.set_mem_table(*guest.memory.table())
            continue
        for queue in guest.queues():
            steps[step](queue)
    for queue in guest.queues():
        if kick:
            frontend.set_vring_call(queue.index, queue.call_fd)
            frontend.set_vring_kick(queue.index, queue.kick_fd)
        frontend.set_vring_enable(queue.index, True)
    frontend.sync()
    for queue in guest.queues():
        queue.kick()


def crosses(a: SoftwareGuest, b: SoftwareGuest, tag: int) -> None:
    """Frames cross both ways, each once and in order."""
    for sender, receiver, src, dst in ((a, b, A, B), (b, a, B, A)):
        sent = frames(dst, src, [60, 1514, 300] * 3, tag=tag)
        sender.send(sent)
        assert receiver.recv(len(sent)) == sent
        sender.drain()
    assert silent(a, b)


def well(wire: Wire) -> None:
    assert wire.info("a")["state"] == "ready"
    assert wire.info("a")["error"] is None
    assert "ERROR" not in wire.switch.log[wire.log_start :]


@pytest.mark.parametrize("name", FORMATS)
def test_a_driver_is_reloaded(wire: Wire, name: str) -> None:
    """Fresh rings in the same memory, whatever the frontend says first."""
    wire.extra_features = FORMATS[name]
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    for tag, order in enumerate(ORDERS):
        crosses(a, b, tag)
        disable(a)
        a.frontend.set_features(a.features)
        a.build_rings()
        set_up(a, order)
    crosses(a, b, len(ORDERS))
    well(wire)
    assert wire.drops("a") == {}
    assert set(wire.drops("b")) <= {"egress-down"}


@pytest.mark.parametrize("kick", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_everything_is_said_again_under_rings_that_go_on(wire: Wire, name: str, kick: bool) -> None:
    """No driver was reloaded: no frame is lost, none comes twice."""
    wire.extra_features = FORMATS[name]
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    for tag, order in enumerate(ORDERS):
        crosses(a, b, tag)
        for queue in a.queues():
            if queue.ring.packed:
                at = queue.ring.used_position
                queue.base = at | at << 16
            else:
                queue.base = queue.ring.used_idx
        set_up(a, order, kick=kick)
    crosses(a, b, len(ORDERS))
    well(wire)
    assert wire.drops("a") == wire.drops("b") == {}


@pytest.mark.parametrize("formats", [("split", "packed"), ("packed", "split")])
def test_another_driver_takes_other_rings(wire: Wire, formats: tuple[str, str]) -> None:
    """The kernel's driver after a DPDK application's: the rings have another format."""
    first, second = (FORMATS[name] for name in formats)
    wire.extra_features = first
    a, b = wire.guest("a", 1, queue_size=64), wire.guest("b", 2)
    teach(a, b)
    crosses(a, b, 1)
    disable(a)
    a.features = a.features & ~first | second
    a.frontend.set_features(a.features)
    a.build_rings()
    set_up(a, ORDERS[0])
    crosses(a, b, 2)
    well(wire)


@pytest.mark.parametrize("name", FORMATS)
def test_nobody_touches_the_memory_of_a_driver_that_is_gone(wire: Wire, name: str) -> None:
    """It was disabled and kicks no more: what lies where its rings were is something else."""
    wire.extra_features = FORMATS[name]
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    crosses(a, b, 1)
    disable(a)
    places = [(q.layout.desc_gpa, q.layout.used_gpa, q.layout.avail_gpa) for q in a.queues()]
    for areas in places:
        for gpa in areas:
            a.memory.mapping.fill(gpa, 64, 0x5A)
    a.frontend.set_features(a.features & ~Feature.MRG_RXBUF)
    a.frontend.set_mem_table(*a.memory.table())
    for queue in a.queues():
        a.frontend.set_vring_base(queue.index, 0x8000 if queue.ring.packed else 0)
    # Its worker has work, and looks at all rings that it has.
    for _ in range(20):
        b.send(frames(A, B, [60] * 50))
        b.drain()
    for areas in places:
        for gpa in areas:
            assert a.memory.read(gpa, 64) == b"\x5a" * 64
    assert (wire.info("a")["state"], wire.info("a")["error"]) == ("connected", None)
    a.frontend.set_features(a.features)
    a.build_rings()
    set_up(a, ORDERS[0])
    crosses(a, b, 2)
    well(wire)


@pytest.mark.parametrize("name", FORMATS)
def test_a_disabled_transmitq_whose_driver_kicks_is_emptied(wire: Wire, name: str) -> None:
    """ "Ring states": what it offers is discarded, also after the frontend said it all again."""
    wire.extra_features = FORMATS[name]
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    for times in range(1, 4):
        a.frontend.set_vring_enable(1, False)
        if times == 3:
            a.frontend.set_mem_table(*a.memory.table())
        a.send(frames(B, A, [60] * 10))
        if times == 3:
            a.transmitqs[0].kick()  # a ring that did not start asks for nothing
        a.drain()
        assert wire.drops("a") == {"disabled": 10 * times}
        a.frontend.set_vring_enable(1, True)
        crosses(a, b, times)
    well(wire)


@pytest.mark.parametrize("name", ["split", "packed"])
def test_with_what_is_in_flight(wire: Wire, name: str) -> None:
    """The notes that the frontend keeps are of the rings before."""
    a = SoftwareGuest(
        A,
        wanted=Wanted(
            features=DEFAULT_FEATURES | FORMATS[name],
            protocol_features=DEFAULT_PROTOCOL_FEATURES | ProtocolFeature.INFLIGHT_SHMFD,
        ),
    )
    wire.enter(a)
    a.connect(wire.port("a"))
    b = wire.guest("b", 2)
    teach(a, b)
    frontend = a.frontend
    frontend.send(Request.GET_INFLIGHT_FD, encode_inflight(Inflight(0, 0, 2, 256)))
    data, fds, _, _ = socket.recv_fds(frontend.socket, 64, 1)
    size = decode_inflight(data[HEADER.size :]).mmap_size
    for tag, order in enumerate(ORDERS[::5]):
        told = encode_inflight(Inflight(size, 0, 2, 256))
        frontend.command(Request.SET_INFLIGHT_FD, told, fds)
        crosses(a, b, tag)
        disable(a)
        frontend.set_features(a.features)
        a.build_rings()
        set_up(a, order)
    os.close(fds[0])
    crosses(a, b, 99)
    well(wire)
    # Nothing of it stays mapped in the switch, nor of its own journals, when the ports are gone.
    maps = Path(f"/proc/{wire.switch.process.pid}/maps")
    assert "vswitch-inflight" in maps.read_text()
    wire.remove("a")
    assert "vswitch-inflight" not in maps.read_text()
    wire.remove("b")
    assert ".rings/" not in maps.read_text()


@pytest.mark.parametrize("name", ["split", "packed"])
def test_with_a_dirty_log(wire: Wire, name: str) -> None:
    """What is written into the rings of the new driver is logged where that has them."""
    wire.extra_features = FORMATS[name]
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    log = DirtyLog(a)
    log.start()
    crosses(a, b, 1)
    disable(a)
    a.frontend.set_features(a.features | Feature.LOG_ALL)
    a.build_rings()
    log.fetch()
    set_up(a, ORDERS[0])
    for queue in a.queues():
        addr = a.vring_addr(queue)._replace(flags=VRING_F_LOG, log_gpa=queue.layout.used_gpa)
        a.frontend.set_vring_addr(addr)
    a.frontend.sync()
    crosses(a, b, 2)
    marked = log.pages()
    for queue in a.queues():
        ring = queue.layout.desc_gpa if queue.ring.packed else queue.layout.used_gpa
        assert ring // PAGE_LEN in marked
    well(wire)


def test_memory_that_the_old_rings_are_not_in(wire: Wire) -> None:
    """The new table comes first, and the rings are elsewhere from then on."""
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    disable(a)
    regions, fds = a.memory.table()
    shifted = [region._replace(uva=region.uva + (1 << 40)) for region in regions]
    a.frontend.set_mem_table(shifted, fds)
    a.build_rings()
    for queue in a.queues():
        addr = a.vring_addr(queue)
        moved = {
            key: getattr(addr, key) + (1 << 40) for key in ("desc_uva", "used_uva", "avail_uva")
        }
        a.frontend.set_vring_base(queue.index, queue.base)
        a.frontend.set_vring_addr(addr._replace(**moved))
        a.frontend.set_vring_kick(queue.index, queue.kick_fd)
        a.frontend.set_vring_enable(queue.index, True)
    a.frontend.sync()
    crosses(a, b, 1)
    well(wire)


def test_a_ring_that_lies_nowhere_is_refused_when_it_is_enabled(wire: Wire) -> None:
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    disable(a)
    queue = a.transmitqs[0]
    addr = a.vring_addr(queue)
    a.frontend.set_vring_addr(addr._replace(desc_uva=1 << 40))
    with pytest.raises(BackendRefusedError, match="SET_VRING_ENABLE"):
        a.frontend.set_vring_enable(queue.index, True)
    wire.wait_log("descriptor table address 0x10000000000 (size 256) is outside the guest memory")
    # Its driver kicks all the same: that is its port's fault, and lasts until the ring runs.
    queue.kick()
    wire.wait_state("a", "fault")
    assert "outside the guest memory" in (wire.info("a")["error"] or "")
    a.build_rings()
    set_up(a, ORDERS[0])
    crosses(a, b, 1)
    assert (wire.info("a")["state"], wire.info("a")["error"]) == ("ready", None)
