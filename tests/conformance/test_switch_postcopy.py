"""Postcopy migration: guests that run before their memory is there (PAGEFAULT)."""

from __future__ import annotations

import fcntl
import os
import random
import select
import signal
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.latememory import PAGEFAULT, LateGuest, advise
from tests.support.formats import FORMATS
from tests.support.frames import frame, frames, mac
from tests.support.running import RunningSwitch, Wire, exchanging, teach, translated
from vswitch.lab.guest import DEFAULT_FEATURES, BackendRefusedError, Region, SoftwareGuest
from vswitch.ports import fault_helper
from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import Request

A, B = mac(1), mac(2)


def late(wire: Wire, name: str, n: int, taken: set[int] | None = None, **options: Any) -> LateGuest:
    """A guest that has just arrived."""
    guest = LateGuest(mac(n), features=wire_features(wire), **options)
    wire.enter(guest)
    guest.taken = taken
    guest.connect(wire.port(name))
    return guest


def misses_a_buffer(guest: LateGuest) -> bool:
    return bool(set(guest.other_side.missed) - guest.ring_pages())


def wire_features(wire: Wire) -> int:
    return DEFAULT_FEATURES | wire.extra_features


def others(wire: Wire, **options: Any) -> list[SoftwareGuest]:
    """One to talk to, and two that talk to each other. `options` are those of the first."""
    guests = [wire.guest("b", 2, **options), wire.guest("c", 3), wire.guest("d", 4)]
    teach(*guests)
    return guests


@contextmanager
def others_go_on(wire: Wire, c: SoftwareGuest, d: SoftwareGuest) -> Iterator[None]:
    """Two guests exchange frames without a loss, during and after what is in the block."""
    before = wire.stats("c")["egress_frames"]
    with exchanging(c, d):
        yield
        wire.wait_until(
            lambda: wire.stats("c")["egress_frames"] > before + 5000, "others exchange frames"
        )


def helpers(wire: Wire) -> list[int]:
    """Processes that the switch has started and that are there, zombies too."""
    tasks = Path(f"/proc/{wire.switch.process.pid}/task")
    children = [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    return [
        int(pid) for pid in children
        if Path(f"/proc/{pid}/comm").read_text() != "vswitch-relay\n"
    ]  # fmt: skip


def open_files(wire: Wire) -> int:
    return len(os.listdir(f"/proc/{wire.switch.process.pid}/fd"))


@contextmanager
def nothing_left(wire: Wire) -> Iterator[None]:
    """What ran in between has left neither descriptor nor process behind."""
    before = open_files(wire)
    assert helpers(wire) == []
    yield
    wire.wait_until(lambda: helpers(wire) == [], "no process is left")
    wire.wait_until(lambda: open_files(wire) == before, "no descriptor is left")


@pytest.mark.parametrize("slots", [False, True], ids=["table", "slots"])
@pytest.mark.parametrize("format", FORMATS)
def test_all_memory_comes_late(wire: Wire, format: str, slots: bool) -> None:
    b, c, d = others(wire)
    wire.extra_features = FORMATS[format]
    a = late(wire, "a", 1, slots=slots, regions=3, slot_offset=40)
    a.other_side.wait_missed(a.ring_pages())
    # Others go on while it waits.
    with others_go_on(wire, c, d):
        assert not any(ring["started"] for ring in wire.info("a")["rings"])
        assert wire.info("a")["state"] == "connected"
        assert wire.info("a")["warning"] == (
            f"the guest is in postcopy migration: {len(a.ring_pages())} pages of its memory are "
            "waited for"
        )
    a.other_side.allow()
    wire.wait_state("a", "ready")
    a.other_side.wait_missed(a.receive_pages)
    sent = frames(A, B, range(60, 1500, 20))
    b.send(sent)
    assert a.recv(len(sent)) == sent
    for number in range(3):
        sent = frames(B, A, range(60, 1500, 20), tag=1000 * number)
        a.send(sent)
        assert b.recv(len(sent)) == sent
    a.other_side.bring()
    assert a.end_postcopy() == 0
    assert wire.info("a")["warning"] is None
    for source, target, to, by in ((a, b, B, A), (b, a, A, B)):
        sent = frames(to, by, [1000] * 300, tag=5000)
        for at in range(0, 300, 100):
            source.send(sent[at : at + 100])
            assert target.recv(100) == sent[at : at + 100]
    assert wire.drops("b") == {}
    assert wire.drops("a").keys() <= {"page-missing"}


@pytest.mark.parametrize("format", ["split", "packed"])
def test_a_transmitq_waits_for_its_pages(wire: Wire, format: str) -> None:
    """Frames that lay in the ring when the guest moved arrive when their pages do, in order."""
    b, c, d = others(wire)
    wire.extra_features = FORMATS[format]
    a = LateGuest(A, features=wire_features(wire))
    wire.enter(a)
    a.unsent = frames(B, A, range(600, 1500, 10))
    a.connect(wire.port("a"))
    side = a.other_side
    side.wait_missed(a.ring_pages())
    side.allow(a.ring_pages())
    wire.wait_state("a", "ready")
    wire.wait_until(partial(misses_a_buffer, a), "a buffer is missed")
    with others_go_on(wire, c, d):
        assert wire.stats("a")["ingress_frames"] == 0
        assert b.recv(1, timeout=0) == []
    side.allow()
    assert b.recv(len(a.unsent)) == a.unsent
    assert wire.drops("b") == {}


@pytest.mark.parametrize("format", ["split", "packed"])
def test_a_receiveq_without_its_pages_drops(wire: Wire, format: str) -> None:
    """Nobody waits for a receiver, and its pages are asked for before a frame comes."""
    b, c, d = others(wire)
    wire.extra_features = FORMATS[format]
    a = late(wire, "a", 1)
    a.other_side.allow(a.ring_pages())
    wire.wait_state("a", "ready")
    wire.wait_until(partial(misses_a_buffer, a), "a buffer is missed")
    sent = frames(A, B, [500] * 10)
    with others_go_on(wire, c, d):
        pass
    b.send(sent)
    b.drain()
    got = a.recv(10, timeout=0)
    # Some buffers share a page with a ring.
    assert got == sent[: len(got)]
    assert len(got) < 10
    assert wire.drops("a") == {"page-missing": 10 - len(got)}
    a.other_side.allow()
    a.other_side.wait_missed(a.receive_pages)
    b.send(sent)
    assert a.recv(10) == sent
    assert wire.drops("a") == {"page-missing": 10 - len(got)}


@pytest.mark.parametrize("format", FORMATS)
def test_pages_come_in_any_order(wire: Wire, format: str) -> None:
    """Some at once, some late, some although nobody asked, while frames go both ways.

    Nobody but the migration makes a page: what was not brought is a hole in the file to the last.
    """
    b, _, _ = others(wire, max_frame_len=4000)
    wire.extra_features = FORMATS[format]
    chance = random.Random(7)
    a = LateGuest(
        A, features=wire_features(wire), regions=4, queue_size=64, tx_cuts=(0, 300), slot_offset=40,
        max_frame_len=4000, rx_buf_len=1500,
    )  # fmt: skip
    wire.enter(a)
    a.unsent = frames(B, A, [chance.randrange(60, 4000) for _ in range(30)])
    a.connect(wire.port("a"))
    # Or frames for it are flooded, and missed by nobody where it does not hear them.
    wire.client.fdb_add(A, "a")
    side = a.other_side
    got: list[bytes] = []
    total = 0
    # Until its ring has come and frames with it: how soon is the machine's to say.
    for number in count():
        if number >= 200 and got:
            break
        asked = sorted(set(side.missed))
        side.allow(chance.sample(asked, min(len(asked), chance.randrange(3))))
        if chance.random() < 0.3:
            side.bring_some(chance, 2)
        sent = frames(A, B, [chance.randrange(60, 4000) for _ in range(3)], tag=1000 + number * 3)
        b.send(sent)
        b.drain()
        total += len(sent)
        if side.brought(a.ring_pages()):
            got += a.recv(3, timeout=0)
        assert side.empty_pages() == set()
    assert 0 < len(got) < total
    side.bring()
    wire.wait_state("a", "ready")
    assert b.recv(30) == a.unsent
    sent = frames(A, B, [1000] * 20, tag=9000)

    def all_arrive() -> bool:
        nonlocal total
        b.send(sent)
        b.drain()
        total += len(sent)
        arrived = a.recv(20, timeout=0)
        got.extend(arrived)
        return arrived == sent

    wire.wait_until(all_arrive, "it goes as ever")
    assert wire.drops("a").keys() <= {"page-missing", "no-buffer"}
    assert wire.drops("b").keys() <= {"egress-down"}
    assert total == len(got) + sum([*wire.drops("a").values(), *wire.drops("b").values()])
    assert a.end_postcopy() == 0


@pytest.mark.parametrize("how", ["deleted", "gone", "ended"])
def test_while_pages_are_missing(wire: Wire, how: str) -> None:
    """The port is deleted, its frontend dies, or says that all is there: nobody is held up by it,
    and none of the missing pages comes to be empty."""
    _, c, d = others(wire)
    with nothing_left(wire):
        a = late(wire, "a", 1)
        side = a.other_side
        side.wait_missed(a.ring_pages())
        assert len(helpers(wire)) == 1
        with others_go_on(wire, c, d):
            if how == "deleted":
                wire.remove("a")
            elif how == "gone":
                a.frontend.close()
                wire.wait_state("a", "listening")
            else:
                side.bring(a.ring_pages())
                wire.wait_state("a", "ready")
                wire.wait_until(partial(misses_a_buffer, a), "a buffer is missed")
                held = set(side.missed) - a.ring_pages()
                assert a.end_postcopy() == 0
                a.stop_rings()
                wire.remove("a")
                assert not any(map(side.is_there, held))
        if how != "ended":
            assert not any(map(side.is_there, a.ring_pages()))
        a.close()
        if how == "gone":
            wire.remove("a")


def test_memory_is_taken_away_while_it_is_missing(wire: Wire) -> None:
    b = wire.guest("b", 2)
    a = late(wire, "a", 1, slots=True)
    side = a.other_side
    side.wait_missed(a.ring_pages())
    [row], [fd] = a.memory.table()
    a.frontend.rem_mem_reg(row)
    assert not any(map(side.is_there, a.ring_pages()))
    # It comes back, with another address for faults.
    reply = a.frontend.request(Request.ADD_MEM_REG, protocol.encode_mem_region(row), [fd])
    [region] = a.memory.regions
    side.missed.clear()
    side.bases[region] = protocol.decode_mem_region(reply).uva
    # As QEMU has it when it sent nothing before.
    a.frontend.send(0, protocol.encode_u64(0))
    side.wait_missed(a.ring_pages())
    side.allow()
    wire.wait_state("a", "ready")
    sent = frames(A, B, [700] * 20)
    side.wait_missed(a.receive_pages)
    b.send(sent)
    assert a.recv(20) == sent


def test_no_fault_before_the_frontend_knows_where(wire: Wire) -> None:
    a = LateGuest(A)
    wire.enter(a)
    a._give_memory = _without_ack(a)  # type: ignore[method-assign]
    a.connect(wire.port("a"))
    a.frontend.sync()
    assert a.other_side.missed == []
    assert not any(map(a.other_side.is_there, a.ring_pages()))
    a.frontend.send(Request.SET_MEM_TABLE, b"")
    a.other_side.wait_missed(a.ring_pages())


def _without_ack(a: LateGuest):  # type: ignore[no-untyped-def]
    def give(rows: list[protocol.MemRegion], fds: list[int]) -> None:
        reply = a.frontend.request(Request.SET_MEM_TABLE, protocol.encode_mem_table(rows), fds)
        [region], [answer] = a.memory.regions, protocol.decode_mem_table(reply)
        a.other_side.bases[region] = answer.uva

    return give


@pytest.mark.parametrize("format", ["split", "packed"])
def test_behind_an_iommu_everything_waits_for_the_end(wire: Wire, format: str) -> None:
    """Where a buffer is says the frontend, and whether it is there nobody: no ring runs so long."""
    b, c, d = others(wire)
    wire.extra_features = FORMATS[format]
    options: dict[str, Any] = {
        "protocol_features": PAGEFAULT,
        "regions": [Region(0, 1 << 23, 0x7F00_0000_0000)],
    }
    a = LateGuest(A, features=wire_features(wire), iommu=True, **options)
    a.taken = set()
    wire.enter(a)
    a.connect(wire.port("a"))
    a.send(frames(B, A, [500] * 50))
    with others_go_on(wire, c, d):
        assert wire.info("a")["state"] == "connected"
        assert "its rings wait for the end" in str(wire.info("a")["warning"])
    assert a.iommu.misses == []
    assert a.end_postcopy() == 0
    assert b.recv(50) == frames(B, A, [500] * 50)
    wire.wait_state("a", "ready")
    translated(a)
    sent = frames(A, B, [600] * 20)
    b.send(sent)
    assert a.recv(20) == sent


def test_the_process_is_killed(wire: Wire) -> None:
    """Its port is at fault until the frontend says that all is there."""
    b, c, d = others(wire)
    with nothing_left(wire):
        a = late(wire, "a", 1)
        side = a.other_side
        side.wait_missed(a.ring_pages())
        [helper] = helpers(wire)
        with others_go_on(wire, c, d):
            os.kill(helper, signal.SIGKILL)
            wire.wait_state("a", "fault")
        assert "no page of the guest's memory can be asked for" in str(wire.info("a")["error"])
        side.bring()
        assert a.end_postcopy() == 0
        wire.wait_state("a", "ready")
        sent = frames(B, A, [800] * 20)
        a.send(sent)
        assert b.recv(20) == sent
        a.close()
        wire.remove("a")


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_the_process_goes_with_the_switch(run_dir: Path, how: str) -> None:
    running = RunningSwitch(Path(tempfile.mkdtemp(dir=run_dir)))
    wire = Wire(running)
    with LateGuest(A) as a:
        a.connect(wire.port("a"))
        a.other_side.wait_missed(a.ring_pages())
        [helper] = helpers(wire)
        pidfd = os.pidfd_open(helper)
        if how == "stop":
            running.stop()
        else:
            running.kill()
        gone = select.poll()
        gone.register(pidfd, select.POLLIN)
        assert gone.poll(10_000), "it outlives the switch"
        os.close(pidfd)
        assert not any(map(a.other_side.is_there, a.ring_pages()))


def test_a_frontend_that_uses_its_power(wire: Wire) -> None:
    """It writes over what the process has, and makes all of it stop: its own port's loss."""
    _, c, d = others(wire)
    with nothing_left(wire):
        a = late(wire, "a", 1)
        side = a.other_side
        side.wait_missed(a.ring_pages())
        [helper] = helpers(wire)
        maps = Path(f"/proc/{helper}/maps").read_text().splitlines()
        stopped = 0
        for line in maps:
            low, high = (int(word, 16) for word in line.split()[0].split("-"))
            try:
                fcntl.ioctl(
                    side.uffd,
                    fault_helper._UFFDIO_REGISTER,
                    struct.pack("=QQQQ", low, high - low, 1, 0),
                )
                stopped += 1
            except OSError:
                pass
        assert stopped > 0
        with others_go_on(wire, c, d):
            side.failure = None
            wire.remove("a")
        a.other_side.failure = None
        a.close()


def test_messages_in_the_wrong_order(wire: Wire) -> None:
    more = Region(1 << 32, 1 << 20, 0x7E00_0000_0000, file=1)
    a = wire.guest("a", 1, protocol_features=PAGEFAULT, spare_regions=[more])
    a.plug(more)
    frontend = a.frontend
    with pytest.raises(BackendRefusedError, match="POSTCOPY_LISTEN"):
        frontend.command(Request.POSTCOPY_LISTEN)
    wire.wait_log("port a: POSTCOPY_LISTEN: there was no POSTCOPY_ADVISE before it")
    assert protocol.decode_u64(frontend.request(Request.POSTCOPY_END)) == 1
    wire.wait_log("port a: POSTCOPY_END: there was no POSTCOPY_LISTEN")
    uffd = advise(frontend)
    assert uffd >= 0
    os.close(uffd)
    with pytest.raises(BackendRefusedError, match="POSTCOPY_LISTEN"):
        frontend.command(Request.POSTCOPY_LISTEN)
    wire.wait_log("port a: POSTCOPY_LISTEN: 2 memory regions were given before it, none may be")
    # It works as it did.
    a.unplug(more)
    b = wire.guest("b", 2)
    teach(a, b)
    sent = [frame(B, A, 60)]
    a.send(sent)
    assert b.recv(1) == sent
