"""An engine that goes step by step, two bystanders on it, and a port for somebody hostile.

Everything happens in the calling thread and by its word (Worker.turn), so the same case does the
same again. After each case `check` looks whether the bystanders still forward, and whether a byte
changed that was not the hostile guest's own or a receive buffer that somebody was given.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vswitch import ethertypes
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.fdb import mac_key
from vswitch.fastpath.main.journal import SLOT_LEN, Journal
from vswitch.fastpath.main.mapping import DirtyLog, Memory
from vswitch.fastpath.main.parts import RingError
from vswitch.fastpath.main.port import MAX_VRINGS, Port
from vswitch.fastpath.main.ring import Ring
from vswitch.ports import offloads

PAGE = 4096
HEADER = 12
PATTERN = 0xB5
"""What lies where nobody writes: around the hostile guest's regions, and in unused buffers."""

HOSTILE_MAC = bytes.fromhex("5254000000aa")
MACS = {"left": bytes.fromhex("525400000001"), "right": bytes.fromhex("525400000002")}
BROADCAST = b"\xff" * 6
ETHERTYPE = ethertypes.wire(ethertypes.EXPERIMENT)


class Violation(AssertionError):
    """The switch did what it never may, whatever a guest does."""


@dataclass(frozen=True, slots=True)
class Place:
    """One region of the hostile guest; the file has a page of pattern before and after it."""

    gpa: int
    size: int
    uva: int
    file_offset: int


def places() -> tuple[list[Place], int]:
    """Regions that touch, that are apart, that end in the middle of a page and just below 2^64."""
    found: list[Place] = []
    at = PAGE
    for gpa, size in (
        (0, 0x8000),
        (0x8000, 0x2F00),
        (0x20000, 0x1000),
        ((1 << 64) - 0x2000, 0x1000),
    ):
        found.append(Place(gpa, size, 0x7F00_0000_0000 + (len(found) << 32), at))
        at += (size + PAGE - 1) // PAGE * PAGE + PAGE
    return found, at


PLACES, FILE_LEN = places()
LOG_OFFSET, LOG_LEN = 64, 5
"""A dirty log of forty pages: less than there are."""


@dataclass(slots=True)
class RingSetup:
    """How a hostile ring is started; addresses are guest-physical ones."""

    size: int = 64
    desc: int = 0
    avail: int = 0
    used: int = 0
    base: int = 0
    packed: bool = False
    event_idx: bool = True
    indirect: bool = True
    mergeable: bool = True
    modern: bool = True
    offloads: int = 0
    enabled: bool = True
    identity: int = 0
    """What the notes in the journal are believed for; 0 for not at all."""


class Bystander:
    """A guest that keeps the rules: split rings, and the place of every byte known."""

    SIZE = 64
    SLOT = 2048
    TX = 3 * PAGE
    BUFFERS = 4 * PAGE

    def __init__(self, bed: Bed, name: str, *, mergeable: bool, takes: int) -> None:
        self.name, self.mac = name, MACS[name]
        self.length = self.BUFFERS + self.SIZE * self.SLOT
        self.fd = os.memfd_create(name)
        os.truncate(self.fd, self.length)
        self.map = mmap.mmap(self.fd, self.length)
        self.memory = Memory([(0, self.length, 0x1000_0000, 0)], [self.fd])
        self.port = bed.engine.add_port(name)
        self.map[:] = bytes([PATTERN]) * self.length
        self.mergeable = mergeable
        for index in range(2):
            self.map[PAGE * index : PAGE * (index + 1)] = bytes(PAGE)
        for i in range(self.SIZE):
            where = self.BUFFERS + i * self.SLOT
            struct.pack_into("<QIHH", self.map, 16 * i, where, self.SLOT, 2, 0)
            struct.pack_into("<H", self.map, 0x404 + 2 * i, i)
        struct.pack_into("<H", self.map, 0x402, self.SIZE)
        self.rings = []
        for index in range(2):
            ring = Ring(self.port, index)
            ring.enabled = True
            at = 0x1000_0000 + PAGE * index
            ring.start(
                self.memory, self.SIZE, at, at + 0x800, at + 0x400, hdr_len=HEADER,
                event_idx=False, indirect=True, mergeable=mergeable, base=0, poll_only=True,
                offloads=0 if index else takes,
            )  # fmt: skip
            bed.engine.attach(ring, -1)
            self.rings.append(ring)
        self.taken = 0
        self.sent = 0
        self.image = bytearray(self.map)

    def send(self, frame: bytes) -> None:
        """Offer one frame; the switch takes it in its next turn."""
        assert len(frame) + HEADER <= PAGE
        data = bytes(HEADER) + frame
        for where, raw in (
            (self.TX, data),
            (PAGE, struct.pack("<QIHH", self.TX, len(data), 0, 0)),
            (PAGE + 0x404 + 2 * (self.sent % self.SIZE), bytes(2)),
            (PAGE + 0x402, struct.pack("<H", self.sent + 1 & 0xFFFF)),
        ):
            self.map[where : where + len(raw)] = self.image[where : where + len(raw)] = raw
        self.sent += 1

    def given_back(self) -> int:
        """used.idx of the transmitq: how many frames the switch is done with, modulo 2^16."""
        (idx,) = struct.unpack_from("<H", self.map, PAGE + 0x802)
        return int(idx)

    def receive(self) -> list[bytes]:
        """Frames that came, each checked for who may write what; the buffers are given again."""
        want = self.image
        now = self.map[:]
        frames: list[bytes] = []
        (used,) = struct.unpack_from("<H", now, 0x802)
        count = (used - self.taken) & 0xFFFF
        if count > self.SIZE:
            raise Violation(f"{self.name}: used.idx went from {self.taken} to {used}")
        struct.pack_into("<H", want, 0x802, used)
        (flags,) = struct.unpack_from("<H", now, 0x800)
        struct.pack_into("<H", want, 0x800, flags & 1)
        data = b""
        left = 0
        for i in range(count):
            slot = (self.taken + i) % self.SIZE
            head, length = struct.unpack_from("<II", now, 0x804 + 8 * slot)
            if head != slot or not (0 if left else HEADER) < length <= self.SLOT:
                raise Violation(f"{self.name}: used element {slot} is ({head}, {length})")
            struct.pack_into("<II", want, 0x804 + 8 * slot, head, length)
            where = self.BUFFERS + slot * self.SLOT
            want[where : where + length] = now[where : where + length]
            if left == 0:
                (left,) = struct.unpack_from("<H", now, where + 10)
                if left == 0 or (left > 1 and not self.mergeable):
                    raise Violation(f"{self.name}: num_buffers is {left}")
                data = now[where + HEADER : where + length]
            else:
                data += now[where : where + length]
            left -= 1
            if left == 0:
                if len(data) < 14:
                    raise Violation(f"{self.name}: got a frame of {len(data)} bytes")
                frames.append(data)
        if left:
            raise Violation(f"{self.name}: {left} buffers of a frame are missing")
        # What the switch tells of a transmitq: the chains come back in order, one after the other.
        (gave,) = struct.unpack_from("<H", now, PAGE + 0x802)
        (flags,) = struct.unpack_from("<H", now, PAGE + 0x800)
        struct.pack_into("<HH", want, PAGE + 0x800, flags & 1, gave)
        if (self.sent - gave) & 0xFFFF > 1:
            raise Violation(f"{self.name}: transmitq used.idx is {gave} after {self.sent} frames")
        want[PAGE + 0x804 : PAGE + 0x804 + 8 * self.SIZE] = bytes(8 * self.SIZE)
        if now != want:
            at = next(i for i in range(self.length) if now[i] != want[i])
            raise Violation(f"{self.name}: byte {at:#x} became {now[at]:#x}, was {want[at]:#x}")
        blank = bytes([PATTERN]) * self.SLOT
        for i in range(count):
            slot = (self.taken + i) % self.SIZE
            where = self.BUFFERS + slot * self.SLOT
            self.map[where : where + self.SLOT] = want[where : where + self.SLOT] = blank
        self.taken += count
        raw = struct.pack("<H", self.taken + self.SIZE & 0xFFFF)
        self.map[0x402:0x404] = want[0x402:0x404] = raw
        return frames


class Bed:
    """Left and right, who only want to be left alone, and the port of a hostile guest."""

    def __init__(self) -> None:
        self.engine = Engine(workers=1)
        self.worker = self.engine.workers[0]
        self.fd = os.memfd_create("hostile")
        os.truncate(self.fd, FILE_LEN)
        self.map = mmap.mmap(self.fd, FILE_LEN)
        self.map[:] = bytes([PATTERN]) * FILE_LEN
        self.journal_fd = os.memfd_create("journal")
        os.truncate(self.journal_fd, MAX_VRINGS * SLOT_LEN)
        self.journal_map = mmap.mmap(self.journal_fd, 2 * SLOT_LEN)
        self.log_fd = os.memfd_create("log")
        os.truncate(self.log_fd, PAGE)
        self.log_map = mmap.mmap(self.log_fd, PAGE)
        self.rows = [(p.gpa, p.size, p.uva, p.file_offset) for p in PLACES]
        self.memory = Memory(self.rows, [self.fd] * len(PLACES))
        self.hostile: Port = self.engine.add_port("hostile")
        self.hostile.use_journal(Journal(MAX_VRINGS, self.journal_fd))
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.left = Bystander(
            self, "left", mergeable=True, takes=offloads.taken(offloads.offered(True))
        )
        self.right = Bystander(self, "right", mergeable=False, takes=0)
        for other in (self.left, self.right):
            self.engine.fdb.add_static(mac_key(other.mac.hex(":")), other.port.id)
        self.rings: dict[int, Ring] = {}
        self.count = 0
        self.reached: Counter[str] = Counter()
        """Faults and drop reasons met so far, and features that were in use."""
        self.settle()

    def close(self) -> None:
        self.stop()
        others = (self.left.fd, self.right.fd)
        for fd in (self.fd, self.log_fd, self.journal_fd, self.call_fd, *others):
            os.close(fd)

    def settle(self) -> None:
        if not self.engine.wait(self.engine.publish(), 60_000_000_000):
            raise Violation("no quiescence within a minute")

    # The hostile guest's memory

    @staticmethod
    def offset(gpa: int) -> tuple[int, int] | None:
        """File offset of a guest address and how many bytes are left there; None in a hole."""
        for place in PLACES:
            if place.gpa <= gpa < place.gpa + place.size:
                return place.file_offset + gpa - place.gpa, place.gpa + place.size - gpa
        return None

    def write(self, gpa: int, data: bytes) -> None:
        """Write to guest memory; what does not fit into the region is left out."""
        found = self.offset(gpa)
        if found is not None:
            at, left = found
            data = data[:left]
            self.map[at : at + len(data)] = data

    def blank(self) -> None:
        """Zero the hostile guest's memory."""
        for place in PLACES:
            self.map[place.file_offset : place.file_offset + place.size] = bytes(place.size)

    # The hostile guest's rings

    def uva(self, gpa: int) -> int:
        for place in PLACES:
            if place.gpa <= gpa < place.gpa + place.size:
                return place.uva + gpa - place.gpa
        return gpa

    def start(self, index: int, setup: RingSetup) -> bool:
        """Start a ring as asked; False when the switch refuses, which it may."""
        ring = self.rings.get(index)
        if ring is None:
            ring = self.rings[index] = Ring(self.hostile, index)
        if ring.started:
            self.halt(index)
        ring.enabled = setup.enabled
        ring.set_call(self.call_fd)
        try:
            ring.start(
                self.memory,
                setup.size,
                self.uva(setup.desc),
                self.uva(setup.used),
                self.uva(setup.avail),
                hdr_len=HEADER if setup.modern or setup.mergeable else 10,
                event_idx=setup.event_idx,
                indirect=setup.indirect,
                mergeable=setup.mergeable,
                base=setup.base,
                poll_only=True,
                packed=setup.packed,
                offloads=setup.offloads,
                identity=setup.identity,
            )
        except RingError as error:
            self.reached[f"refused: {str(error).split(' ')[0]}"] += 1
            return False
        self.reached["packed" if setup.packed else "split"] += 1
        self.engine.attach(ring, -1)
        self.settle()
        return True

    def halt(self, index: int) -> None:
        ring = self.rings.get(index)
        if ring is not None and ring.started:
            ring.unpublish()
            self.engine.detach(ring)
            self.settle()
            ring.mark_stopped()

    def stop(self) -> None:
        for index in self.rings:
            self.halt(index)

    def log(self, used_gpa: int | None) -> None:
        """Have what is written for the hostile guest logged from now on."""
        log = DirtyLog(self.log_fd, LOG_LEN, LOG_OFFSET)
        self.reached["logged"] += 1
        for ring in self.rings.values():
            ring.set_dirty_log(log, used_gpa)

    def unplug(self, which: int) -> None:
        """Take a region away from running rings, and give it back in the next case."""
        place = PLACES[which]
        memory = self.memory.without_region(place.gpa, place.size, place.uva)
        for ring in self.rings.values():
            if ring.started:
                try:
                    ring.use_memory(memory)
                except RingError:
                    self.reached["refused: unplug"] += 1
        self.settle()

    # A case

    def run(self, case: dict[str, Any]) -> None:
        """Carry out one case. Raises Violation."""
        self.blank()
        self.engine.fdb.flush()
        self.hostile.max_len = case.get("max_len", 65553)
        for port in (self.left.port, self.right.port):
            port.max_len = case.get("egress_max_len", 65553)
        self.left.rings[0].enabled = case.get("left_up", True)
        self.right.rings[0].enabled = case.get("right_up", True)
        self.settle()
        self.hostile.link_down = case.get("link_down", False)
        # One frame of each kind, and the next one in a second.
        self.hostile.set_storm((1, 1, 1) if "storm" in case else (None, None, None), burst=1)
        before = {p.id: self.engine.stats(p) for p in self.ports()}
        try:
            self._run(case)
        finally:
            faults = [r.fault for r in self.rings.values() if r.started and r.fault]
            self.stop()
            self.left.rings[0].enabled = self.right.rings[0].enabled = True
            for port in (self.left.port, self.right.port):
                port.max_len = 65553
            self.settle()
        self.reached.update(fault[0] for fault in faults)
        for port in self.ports():
            stats, old = self.engine.stats(port), before[port.id]["drops"]
            for reason, n in stats["drops"].items():
                if n != old.get(reason, 0):
                    self.reached[reason] += n - old.get(reason, 0)
        self.engine.take_events()
        self.check()

    def _run(self, case: dict[str, Any]) -> None:
        for op, *arguments in case["ops"]:
            self._step(op, *arguments)

    def _step(self, op: str, *arguments: Any) -> None:
        """Carry out one step; those of other beds are none here."""
        match op:
            case "write":
                self.write(arguments[0], bytes.fromhex(arguments[1]))
            case "start":
                self.start(arguments[0], RingSetup(**arguments[1]))
            case "stop":
                self.halt(arguments[0])
            case "turn":
                self.turn(arguments[0])
            case "send":
                who, to, length = arguments
                sender = self.left if who == "left" else self.right
                target = {"hostile": HOSTILE_MAC, "all": BROADCAST}[to]
                sender.send((target + sender.mac + ETHERTYPE).ljust(length, b"\x11"))
                self.turn()
            case "drain":
                self.drain()
            case "journal":
                at, raw = SLOT_LEN * arguments[0], bytes.fromhex(arguments[1])
                self.journal_map[at : at + len(raw)] = raw
                self.reached["journal"] += 1
            case "log":
                self.log(arguments[0])
            case "unplug":
                self.unplug(arguments[0])

    def turn(self, arm: bool = False) -> None:
        """Let the switch do what there is to do."""
        self.worker.turn()
        if arm:
            self.worker.arm()

    def drain(self) -> None:
        """Have the bystanders take what came, and give their buffers again."""
        self.left.receive()
        self.right.receive()

    def ports(self) -> list[Port]:
        return [self.hostile, self.left.port, self.right.port]

    def check(self) -> None:
        """The bystanders still forward, and nothing changed that nobody may change."""
        self.left.receive()
        self.right.receive()
        self.count += 1
        for sender, receiver in ((self.left, self.right), (self.right, self.left)):
            frame = receiver.mac + sender.mac + ETHERTYPE + self.count.to_bytes(46, "big")
            sender.send(frame)
            self.turn()
            got = receiver.receive()
            if got != [frame]:
                raise Violation(f"{receiver.name} got {len(got)} frames for one from {sender.name}")
            if sender.receive():
                raise Violation(f"{sender.name} got its own frame, or somebody's")
        pattern = bytes([PATTERN])
        end = 0
        for place in PLACES:
            gap = self.map[end : place.file_offset]
            if gap.count(pattern) != len(gap):
                raise Violation(f"a byte was written before the region at {place.gpa:#x}")
            end = place.file_offset + place.size
        if self.map[end:].count(pattern) != FILE_LEN - end:
            raise Violation("a byte was written behind the last region")
        outside = self.log_map[:LOG_OFFSET] + self.log_map[LOG_OFFSET + LOG_LEN :]
        if any(outside):
            raise Violation("a bit was set outside the dirty log")


def setup_row(setup: RingSetup) -> dict[str, Any]:
    return {name: getattr(setup, name) for name in RingSetup.__slots__}


def run_cases(bed: Bed, make: Callable[[int], dict[str, Any]], count: int, name: str) -> None:
    """The first cases of a kind of `make fuzz`; a failure says how to have it again."""
    for seed in range(count):
        try:
            bed.run(make(seed))
        except Violation as exc:
            raise AssertionError(f"make fuzz SEED={seed} ARGS='--only {name}'") from exc
