"""Guest memory that comes and goes while frames are forwarded (ADD_MEM_REG, REM_MEM_REG)."""

from __future__ import annotations

import pytest

from tests.support.frames import frame, frames, mac
from tests.support.running import Wire, teach
from vswitch.lab.guest import BackendRefusedError, Region, SoftwareGuest
from vswitch.lab.guest.memory import row
from vswitch.lab.guest.raw import DESC_F_WRITE, RawDesc

A, B = mac(1), mac(2)
PAGE = 4096
BASE = Region(0, 1 << 23, 0x7F00_0000_0000)
SPARE = Region(1 << 32, 1 << 23, 0x7E00_0000_0000, 3 * PAGE, file=1)


def plugged_frame(guest: SoftwareGuest, at: int, sent: bytes) -> None:
    """Send a frame from memory at a gpa, behind the driver's back."""
    guest.memory.write(at, bytes(12) + sent)
    guest.transmitqs[0].raw.offer(RawDesc(at, 12 + len(sent)))
    guest.transmitqs[0].kick()


def test_a_running_ring_uses_what_was_plugged(wire: Wire) -> None:
    a = wire.guest("a", 1, regions=[BASE], spare_regions=[SPARE])
    b = wire.guest("b", 2)
    teach(b, a)
    idle = wire.info("a")
    a.plug(SPARE)
    assert wire.info("a")["memory"][1] == {
        "gpa": SPARE.gpa, "size": SPARE.size, "uva": SPARE.uva, "mmap_offset": SPARE.mmap_offset,
    }  # fmt: skip
    sent = frame(B, A, 1000)
    # Its last bytes are the last of the region.
    plugged_frame(a, SPARE.gpa + SPARE.size - 12 - len(sent), sent)
    assert b.recv(1) == [sent]
    assert wire.info("a")["connects"] == idle["connects"]
    assert all(ring["started"] for ring in wire.info("a")["rings"])
    # Without it, the same descriptor is a mistake of the driver's.
    a.unplug(SPARE)
    assert len(wire.info("a")["memory"]) == 1
    plugged_frame(a, SPARE.gpa, sent)
    wire.wait_state("a", "fault")
    assert "bad-address" in str(wire.info("a")["error"])


def test_receive_buffers_in_plugged_memory(wire: Wire) -> None:
    a = wire.guest("a", 1)
    b = wire.guest("b", 2, regions=[BASE], spare_regions=[SPARE])
    b.auto_post = False
    teach(a, b)
    b.plug(SPARE)
    b.reboot()
    raw = b.receiveqs[0].raw
    at = SPARE.gpa + PAGE - 100
    raw.offer(RawDesc(at, 2048, DESC_F_WRITE), first=raw.layout.size - 1)
    sent = frame(B, A, 1500)
    a.send([sent])
    a.drain()
    found = [
        b.memory.read(at + 12, len(sent)) if raw.read_used(i)[0] == raw.layout.size - 1 else None
        for i in range(raw.used_idx)
    ]
    assert sent in found


def test_rings_in_plugged_memory_after_a_reboot(wire: Wire) -> None:
    a = wire.guest("a", 1, regions=[BASE], spare_regions=[SPARE])
    b = wire.guest("b", 2)
    a.plug(SPARE)
    a.reboot()
    places = [q.layout.desc_gpa for q in a.queues()] + [q.layout.used_gpa for q in a.queues()]
    assert any(gpa >= SPARE.gpa for gpa in places)
    teach(a, b)
    sent = frames(B, A, [700] * 200)
    a.send(sent)
    assert b.recv(200) == sent


def test_a_ring_whose_memory_is_replaced_goes_on(wire: Wire) -> None:
    """QEMU cuts a region in two by taking it away and adding the parts."""
    a, b = wire.guest("a", 1, regions=[BASE]), wire.guest("b", 2)
    teach(a, b)
    fd = a.memory.fd(BASE)
    a.frontend.rem_mem_reg(row(BASE))
    assert not any(ring["started"] for ring in wire.info("a")["rings"])
    waiting = frames(B, A, [60] * 20)
    a.send(waiting)
    half = BASE.size // 2
    a.frontend.add_mem_reg(row(Region(0, half, BASE.uva)), fd)
    a.frontend.add_mem_reg(row(Region(half, half, BASE.uva + half, half)), fd)
    assert all(ring["started"] for ring in wire.info("a")["rings"])
    assert b.recv(20) == waiting
    back = frames(A, B, [60] * 20)
    b.send(back)
    assert a.recv(20) == back


def test_what_is_refused(wire: Wire) -> None:
    a, b = wire.guest("a", 1, regions=[BASE]), wire.guest("b", 2)
    teach(a, b)
    fd = a.memory.fd(BASE)
    for bad, why in (
        (Region(PAGE, PAGE, 0), "guest address 0x1000 overlaps region 0"),
        (Region(1 << 40, PAGE, BASE.uva + PAGE), "user address 0x7f0000001000 overlaps region 0"),
        (Region(1 << 40, 0, 0), "size is 0"),
        (
            Region((1 << 64) - PAGE, 2 * PAGE, 0),
            "guest address 0xfffffffffffff000 plus size 0x2000",
        ),
        (Region(1 << 40, PAGE, 0, BASE.size), "mmap offset 0x800000 plus size 0x1000 is beyond"),
    ):
        with pytest.raises(BackendRefusedError, match="ADD_MEM_REG"):
            a.frontend.add_mem_reg(row(bad), fd)
        wire.wait_log(f"port a: ADD_MEM_REG: region 1: {why}")
    with pytest.raises(BackendRefusedError, match="REM_MEM_REG"):
        a.frontend.rem_mem_reg(row(Region(0, PAGE, BASE.uva)))
    wire.wait_log("REM_MEM_REG: no region with guest address 0x0, size 0x1000")
    assert a.frontend.get_max_mem_slots() == 64
    many = [Region(n << 40, PAGE, n << 40) for n in range(1, 65)]
    for region in many[:63]:
        a.frontend.add_mem_reg(row(region), fd)
    with pytest.raises(BackendRefusedError, match="ADD_MEM_REG"):
        a.frontend.add_mem_reg(row(many[63]), fd)
    wire.wait_log("all 64 memory slots are in use")
    # Nothing of this harmed anybody.
    sent = frames(B, A, [60] * 50)
    a.send(sent)
    assert b.recv(50) == sent


def test_under_load(wire: Wire) -> None:
    """Regions come and go many times while frames cross; none is lost, none is changed."""
    a = wire.guest("a", 1, regions=[BASE], spare_regions=[SPARE])
    b = wire.guest("b", 2, regions=[BASE], spare_regions=[SPARE])
    teach(a, b)
    sent = frames(B, A, range(60, 1500, 36))
    for _ in range(50):
        a.send(sent)
        a.plug(SPARE)
        b.plug(SPARE)
        assert b.recv(40) == sent
        a.send(sent)
        a.unplug(SPARE)
        b.unplug(SPARE)
        assert b.recv(40) == sent
    assert wire.drops("a") == {}
