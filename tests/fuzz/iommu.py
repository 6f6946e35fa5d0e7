"""A hostile guest behind an IOMMU, and a frontend that translates for it and lies.

The port is the switch's own (`VhostPort`), the frontend a list of questions that the case answers.
What may be read and written at each moment is kept by a model of its own, byte by byte: memory that
the frontend has not mapped for reading is covered with bytes that no frame and no address may be
made of, and what changed is held against what was mapped for writing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from tests.fuzz.bed import FILE_LEN, LOG_LEN, LOG_OFFSET, PAGE, PLACES, Bed, RingSetup, Violation
from tests.fuzz.mappings import EVERYWHERE, LAST, Mappings, Range, merged, minus
from tests.support.handover import AtOnce
from vswitch.config.settings import PortSettings
from vswitch.fastpath.main.iotlb import ACCESS_READ, ACCESS_WRITE
from vswitch.ports import offloads
from vswitch.ports.guest import VhostPort
from vswitch.relay.process import Relay
from vswitch.vhost_user.backend import Backend
from vswitch.vhost_user.datapath import DatapathError, RingLog, TranslationPending
from vswitch.vhost_user.datapath import RingSetup as Setup
from vswitch.vhost_user.protocol import Feature, LogArea, MemRegion

BOTH = ACCESS_READ | ACCESS_WRITE
COVER = bytes([0xDA, 0x3C, 0x96, 0x5E, 0xB2, 0x74, 0xCA, 0x1E])
"""What lies over memory that must not be read. All even: taken for addresses, they are no groups',
so that a frame of it is delivered to somebody, and its virtio_net_hdr asks for no checksum."""
COVERED = COVER * (FILE_LEN // len(COVER) + 1)
COVER_ADDRESSES = [int.from_bytes((COVER * 2)[i : i + 8], "little") for i in range(8)]
ROUNDS_MAX = 500
"""Rounds of honest answers after which nothing may be left to ask."""

Result = TypeVar("Result")


def _elsewhere(gpa: int) -> int:
    """Where a guest-physical address of the first region is when pages are `scattered`."""
    count = PLACES[0].size // PAGE
    if not 0 <= gpa < PLACES[0].size:
        return gpa
    return (gpa // PAGE * 5 + 3) % count * PAGE + gpa % PAGE


def done(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine that waits for nobody but the engine."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return cast("Result", end.value)
    raise Violation("the port waits for something else than its workers")


class IommuBed(Bed):
    """A bed whose hostile port has an IOMMU; steps of a case answer for its frontend."""

    def __init__(self) -> None:
        super().__init__()
        self._scattered = False
        """The driver's pages in the first region are in another order for the frontend."""
        self._settings = PortSettings(name="hostile", socket=Path("/nonexistent/hostile"))
        self._regions = [MemRegion(*row) for row in self.rows]
        self.rings = self.hostile.rings
        self._begin(deaf=False)

    def _begin(self, *, deaf: bool) -> None:
        """A frontend that connects."""
        self.vhost = VhostPort(
            self._settings, self.engine, self.hostile, cast("Relay", None), AtOnce(self.engine),
            lambda _: 0, lambda *_: None,
        )  # fmt: skip
        # Of a backend, a port behind an IOMMU uses no more than this.
        self.vhost._backend = cast(
            "Backend",
            SimpleNamespace(ask_translation=self._ask, signal_error=lambda _: None, peer_pid=None),
        )
        self._deaf = deaf
        self.questions: list[tuple[int, int, Callable[[int], None]]] = []
        """Address, access and answer of misses without an answer yet, oldest first."""
        self._ignored: list[tuple[int, int, Callable[[int], None]]] = []
        self._waiting: dict[int, Setup] = {}
        self._running: dict[int, Setup] = {}
        self._mapped = Mappings([], list(PLACES))
        self._visible: list[Range] = []
        self._hidden = bytearray(FILE_LEN)
        """What really lies under the cover."""
        for low, high in EVERYWHERE:
            self.map[low:high] = COVERED[low:high]
        done(self.vhost.datapath.set_memory(self._regions, [self.fd] * len(PLACES)))
        self.vhost.datapath.use_iotlb(True)

    def _ask(self, iova: int, access: int, answered: Callable[[int], None]) -> bool:
        self._is_no_cover(iova)
        if not 1 <= access <= BOTH:
            raise Violation(f"a miss for access {access}")
        self.questions.append((iova, access, answered))
        return True

    # What may be read and written

    def _own(self, written: bool) -> list[Range]:
        """Where the rings are that workers know: not looked up again while they run."""
        found = []
        for index, ring in self.rings.items():
            if not ring.published:
                continue
            # The descriptors, the driver's part and the device's.
            packed = Feature.RING_PACKED in self._running[index].features
            for part, write in zip(ring.areas, (packed, False, True), strict=True):
                for uva, length in part:
                    at = Mappings.offset(PLACES, uva, length)
                    if at is None:
                        raise Violation(f"vring {index} is at {uva:#x}")
                    if write or not written:
                        found.append((at, at + length))
                if len(part) > 1:
                    self.reached["scattered"] += 1
        return found

    def _readable(self, mapped: Mappings) -> list[Range]:
        return merged(mapped.open_for(ACCESS_READ) + self._own(False))

    def _writable(self, mapped: Mappings) -> list[Range]:
        return merged(mapped.open_for(ACCESS_WRITE) + self._own(True))

    @contextmanager
    def _watched(self, after: Mappings | None = None, *, at_once: bool = False) -> Iterator[None]:
        """Let the switch act, with the present mappings and, while it goes over to them, others.

        `at_once`: when it says that it has done so, no worker uses the old ones.
        """
        after = after or self._mapped
        self._show(merged(self._readable(self._mapped) + self._readable(after)))
        writable = merged(self._writable(self._mapped) + self._writable(after))
        before = self.map[:]
        yield
        if not at_once:
            self.settle()
        self._mapped = after
        writable = merged(writable + self._writable(after))
        self._compare(bytearray(before), writable)
        self._show(self._readable(after))
        for ring in self.rings.values():
            missed, fault = ring.missed, ring.fault if ring.started else None
            if missed is not None:
                self._is_no_cover(missed)
            if fault is not None:
                for number in re.findall("0x[0-9a-f]+", fault[1]):
                    self._is_no_cover(int(number, 16))

    def _show(self, visible: list[Range]) -> None:
        """Uncover what may be read, and cover the rest."""
        for low, high in minus(self._visible, visible):
            self._hidden[low:high] = self.map[low:high]
            self.map[low:high] = COVERED[low:high]
        for low, high in minus(visible, self._visible):
            self.map[low:high] = self._hidden[low:high]
        self._visible = visible

    def _compare(self, before: bytearray, writable: list[Range]) -> None:
        """See that nothing changed but what may be written."""
        now = self.map[:]
        for low, high in writable + self._unwatched():
            before[low:high] = now[low:high]
        if now != before:
            at = next(i for i in range(FILE_LEN) if now[i] != before[i])
            raise Violation(
                f"byte {at:#x} of the hostile guest, not mapped for writing, became {now[at]:#x}, "
                f"was {before[at]:#x}"
            )

    def _unwatched(self) -> list[Range]:
        return []

    @staticmethod
    def _is_no_cover(address: int) -> None:
        if any((address - cover) & LAST < 1 << 32 for cover in COVER_ADDRESSES):
            raise Violation(f"{address:#x} was read from memory that was not mapped for reading")

    def _look_at(self, frames: list[bytes]) -> None:
        if any(COVER in frame for frame in frames):
            raise Violation("a frame was read from memory that was not mapped for reading")

    # The guest

    def write(self, gpa: int, data: bytes) -> None:
        """To where an honest frontend has what its driver has at `gpa`."""
        while self._scattered and data:
            left = PAGE - gpa % PAGE
            self._write(_elsewhere(gpa), data[:left])
            gpa, data = gpa + left, data[left:]
        self._write(gpa, data)

    def _write(self, gpa: int, data: bytes) -> None:
        found = self.offset(gpa)
        if found is None:
            return
        at, left = found
        end = at + len(data[:left])
        self._hidden[at:end] = data[:left]
        for low, high in self._visible:
            low, high = max(low, at), min(high, end)
            if low < high:
                self.map[low:high] = data[low - at : high - at]

    def blank(self) -> None:
        for place in PLACES:
            self.write(place.gpa, bytes(place.size))

    def start(self, index: int, setup: RingSetup) -> bool:
        """Start a ring as soon as its own addresses are translated."""
        self.halt(index)
        features = offloads.offered(bool(setup.offloads))
        for wanted, feature in (
            (setup.packed, Feature.RING_PACKED),
            (setup.event_idx, Feature.RING_EVENT_IDX),
            (setup.indirect, Feature.RING_INDIRECT_DESC),
            (setup.mergeable, Feature.MRG_RXBUF),
            (setup.modern, Feature.VERSION_1),
        ):
            if wanted:
                features |= feature
        self._waiting[index] = Setup(
            setup.size, setup.desc, setup.used, setup.avail, setup.base, features,
            setup.enabled, kick_fd=-1, call_fd=self.call_fd,
        )  # fmt: skip
        self._start_waiting()
        return index in self._running

    def _start_waiting(self) -> None:
        for index, setup in list(self._waiting.items()):
            del self._waiting[index]
            self._running[index] = setup
            with self._watched():
                try:
                    done(self.vhost.datapath.start_ring(index, setup))
                except TranslationPending:
                    self._waiting[index] = setup
                    del self._running[index]
                except DatapathError as error:
                    del self._running[index]
                    self.reached[f"refused: {str(error).split(': ')[-1].split(' ')[0]}"] += 1
                else:
                    self.reached[
                        "packed" if Feature.RING_PACKED in setup.features else "split"
                    ] += 1

    def halt(self, index: int) -> None:
        if self._waiting.pop(index, None) is not None:
            self.vhost.datapath.forget_ring(index)
        elif index in self._running:
            with self._watched(at_once=True):
                done(self.vhost.datapath.stop_rings([index]))
            del self._running[index]
        else:
            return
        if not self._running:
            # Frontends take nothing back from here on: all is forgotten.
            self._mapped = Mappings([], self._mapped.places)
            self._show([])

    def log(self, used_gpa: int | None) -> None:
        self.reached["logged"] += 1
        with self._watched():
            done(self.vhost.datapath.set_dirty_log(self.log_fd, LogArea(LOG_LEN, LOG_OFFSET)))
            logs: dict[int, RingLog | None] = {index: RingLog(used_gpa) for index in self._running}
            done(self.vhost.datapath.log_rings(logs))

    def unplug(self, which: int) -> None:
        """Take a region away, or give it again."""
        place, region = PLACES[which], self._regions[which]
        if place in self._mapped.places:
            with self._watched(self._mapped.unplugged(place), at_once=True):
                done(self.vhost.datapath.remove_memory(region))
        else:
            with self._watched():
                done(self.vhost.datapath.add_memory(region, self.fd))
            self._mapped.places.append(place)
        self.reached["unplugged"] += 1

    # The frontend

    def update(self, iova: int, size: int, uva: int, access: int) -> bool:
        """Map something; False when it is refused, as it should be then."""
        after = self._mapped.updated(iova, size, uva, access)
        with self._watched(after):
            try:
                self.vhost.datapath.iotlb_update(iova, size, uva, access)
            except DatapathError as error:
                if after is not None:
                    raise Violation(f"refused what could be done: {error}") from error
                self.reached["update refused"] += 1
            else:
                if after is None:
                    raise Violation(f"mapped {size:#x} bytes from {iova:#x} at {uva:#x}")
        self._start_waiting()
        return after is not None

    def flood(self, iova: int, count: int, size: int, access: int) -> None:
        """More mappings than an IOTLB holds, one beside the other; the model forgets none."""
        place = PLACES[0]
        updates = []
        for i in range(count if place in self._mapped.places else 0):
            updates.append((iova + 2 * i * size, i * size % (place.size - size)))
        rows = [(at, at + size - 1, place.file_offset + to, access) for at, to in updates]
        with self._watched(Mappings(self._mapped.rows + rows, self._mapped.places)):
            for at, to in updates:
                self.vhost.datapath.iotlb_update(at, size, place.uva + to, access)
        self._start_waiting()
        self.reached["flooded"] += 1

    def invalidate(self, iova: int, size: int) -> None:
        with self._watched(self._mapped.invalidated(iova, size), at_once=True):
            done(self.vhost.datapath.iotlb_invalidate(iova, size))
        last = min(iova + size - 1, LAST) if size else LAST
        for index, setup in self._running.items():
            hit = any(at <= last and at + length > iova for at, length in setup.areas())
            if (hit or not size) and self.rings[index].published:
                raise Violation(f"vring {index} runs where nothing is mapped any more")
        self.reached["invalidated"] += 1

    def answer(self, count: int, how: str) -> bool:
        """Answer some of the questions, oldest first; whether something was mapped by that."""
        asked, self.questions = self.questions[:count], self.questions[count:]
        mapped = False
        if how == "silent":
            self._ignored += asked
            return False
        for iova, access, answered in asked:
            updates, status = self._found(iova, access, how)
            for update in updates:
                mapped |= self.update(*update)
            with self._watched():
                answered(status)
        return mapped

    def _found(
        self, iova: int, access: int, how: str
    ) -> tuple[list[tuple[int, int, int, int]], int]:
        """Updates and status for a miss. "good": I/O virtual addresses are guest-physical ones."""
        if how == "refuse":
            return [], 1
        for place in PLACES:
            if place.gpa <= iova < place.gpa + place.size and place in self._mapped.places:
                break
        else:
            return [], 1
        page = iova - iova % PAGE
        uva = place.uva + page - place.gpa
        if self._scattered and place is PLACES[0]:
            uva = place.uva + _elsewhere(page)
        size = min(PAGE, place.gpa + place.size - page)
        match how:
            case "exact":
                return [(page, size, uva, access)], 0
            case "read":
                return [(page, size, uva, ACCESS_READ)], 0
            case "write":
                return [(page, size, uva, ACCESS_WRITE)], 0
            case "none":
                return [(page, size, uva, 0)], 0
            case "nothing":
                return [], 0
            case "wide":
                return [(place.gpa, place.size, place.uva, BOTH)], 0
            case "bytes":
                size = min(7, place.gpa + place.size - iova)
                return [(iova, size, uva + iova - page, BOTH)], 0
            case "moved":
                other = PLACES[0].uva + (page * 5 + 0x3000) % PLACES[0].size
                return [(page, size, other, BOTH)], 0
            case "elsewhere":
                there = PLACES[(PLACES.index(place) + 1) % len(PLACES)]
                return [(there.gpa, there.size, there.uva, BOTH)], 0
        return [(page, size, uva, BOTH)], 0

    # A case

    def run(self, case: dict[str, Any]) -> None:
        self._scattered = case.get("scattered", False)
        self._begin(deaf=case.get("deaf", False))
        super().run(case)
        done(self.vhost.datapath.set_memory([], []))

    def _run(self, case: dict[str, Any]) -> None:
        super()._run(case)
        self._come_to_rest()

    def _step(self, op: str, *arguments: Any) -> None:
        super()._step(op, *arguments)
        match op:
            case "update":
                self.update(*arguments)
            case "invalidate":
                self.invalidate(*arguments)
            case "answer":
                self.answer(*arguments)
            case "flood":
                self.flood(*arguments)
            case "kick":
                with self._watched():
                    self.vhost.iotlb_missed(arguments[0])
            case "second":
                with self._watched():
                    self.vhost.check()

    def turn(self, arm: bool = False) -> None:
        with self._watched():
            super().turn(arm)
            self._hear()

    def _hear(self) -> None:
        for kind, port, index, _ in self.engine.take_events():
            if port != self.hostile.id or self._deaf:
                continue
            if kind == "iotlb-miss":
                self.vhost.iotlb_missed(index)
                self.reached["iotlb-miss at a ring"] += 1
            elif kind == "ring-fault":
                self.vhost.ring_fault(index)

    def _come_to_rest(self) -> None:
        """An honest frontend from here on: all is asked for that somebody waits for."""
        in_vain = 0
        self.questions += self._ignored
        for _ in range(ROUNDS_MAX):
            with self._watched():
                self.vhost.check()
            # Rings that have not started are looked at again with every update.
            self._start_waiting()
            in_vain = 0 if self.answer(len(self.questions), "good") else in_vain + 1
            self._step("send", "left", "hostile", 60)
            self.drain()
            # A ring that has flooded much or was long idle has its turn later.
            if in_vain > 2 and (in_vain > 40 or not any(r.missed for r in self.rings.values())):
                break
        if not in_vain:
            raise Violation("the questions have no end")
        for index, ring in self.rings.items():
            if index not in self._running or ring.fault is not None:
                continue
            if not ring.published:
                if self.vhost.state != "fault":
                    raise Violation(f"vring {index} does not run, the port is {self.vhost.state}")
            elif ring.missed in [iova for iova, _ in ring.untranslated(1, 1)]:
                # Else the guest has rewritten what it had offered, and waits for something else.
                raise Violation(f"vring {index} waits for {ring.missed:#x}, nobody was asked")
        if self._waiting and self.vhost.state != "fault":
            raise Violation(f"vrings {list(self._waiting)} never started")

    def drain(self) -> None:
        for other in (self.left, self.right):
            self._look_at(other.receive())

    def check(self) -> None:
        for other in (self.left, self.right):
            self._look_at(other.receive())
        super().check()
