"""A port in postcopy: its guest runs, and parts of its memory are still on another machine.

No worker and no event loop may touch a page that is not there: one guest's migration would stop
everybody, and the page would come to be, empty, under the migration's hands. So rings are
translated by tables of the pages that are known to be there, as behind an IOMMU. A ring that needs
another one waits, and a process of its own (fault_process.py) touches that; the frontend hears of
it, gets the page from the other machine and lets the process go on, which says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vswitch.dataplane.handover import HandOver
from vswitch.fastpath.main.iotlb import ACCESS_READ, ACCESS_WRITE, Iotlb
from vswitch.fastpath.main.mapping import Memory, page_size, tells_pages
from vswitch.ports.fault_helper import TOUCHERS
from vswitch.ports.fault_process import FaultProcess
from vswitch.ports.ring import GuestRing, RingState
from vswitch.ports.translation import PortTranslation
from vswitch.vhost_user.datapath import DatapathError, RingSetup
from vswitch.vhost_user.protocol import MemRegion

ASKED_MAX = 512
"""Pages that may be asked for at a time; what is left is asked for when those have come. Half of
them are for what somebody waits for already."""
_BLOCK_PAGES = 32
"""An aligned block that is looked at with a page of it: what is there becomes one mapping."""
_NOWHERE = -1
"""No address of the process's: stands for a region that it does not have yet."""
_LOOKS = 32
"""Such blocks, and passes through the rings, before it is everybody else's turn ..."""
_PAUSE_S = 0.005
"""... which lasts so long: a guest may need more than its tables hold, and would never be done."""


@dataclass(frozen=True, slots=True)
class _Area:
    """A region of the guest's memory, and where the process has it that touches missing pages."""

    region: MemRegion
    page: int
    """Bytes that come at a time."""
    base: int
    """Where the page that the region begins in lies, for that process ..."""
    length: int
    """... and how many bytes from there."""
    tells: bool
    """Whether it can be known which of its pages are there."""

    @property
    def skew(self) -> int:
        """Bytes of the region's first page that belong to somebody else."""
        return self.region.mmap_offset % self.page

    def page_of(self, gpa: int) -> tuple[int, int]:
        """The part of the region in the page that holds an address: its first byte and size."""
        start = gpa - (gpa - self.region.gpa + self.skew) % self.page
        first = max(start, self.region.gpa)
        return first, min(start + self.page, self.region.gpa + self.region.size) - first

    def address(self, gpa: int) -> int:
        return self.base + self.skew + gpa - self.region.gpa


class PortPostcopy(PortTranslation):
    """The pages of one port's guest that are there, and those that its rings need.

    `run` starts a ring that had to wait for its own memory; `fail` hears why none can run any more.
    """

    def __init__(
        self,
        rings: Mapping[int, GuestRing],
        handover: HandOver,
        run: Callable[[GuestRing], bool],
        fail: Callable[[str], None],
    ) -> None:
        super().__init__(rings, handover, Iotlb(Memory([], []), physical=True))
        self.listening = False
        """Between POSTCOPY_LISTEN and the end."""
        self._run = run
        self._fail = fail
        self._process: FaultProcess | None = None
        self._areas: dict[MemRegion, _Area] = {}
        self._memory: Memory | None = None
        self._urgent: dict[int, None] = {}
        self._later: dict[int, None] = {}
        """Addresses of the process's that are to be touched when it may, the oldest first."""
        self._asked: dict[int, tuple[int, int, int] | None] = {}
        """Each of these and those that it was given: guest address, size and user address of the
        page; None if its region has gone."""
        self.touched = 0
        """Pages that were given to the process."""
        self._may_fault = False
        self._look_due = False

    @property
    def waited_for(self) -> int:
        """Pages that were asked for and have not come."""
        return len(self._asked)

    # Life

    async def advise(self) -> int:
        """Get ready; the userfaultfd for the frontend, which stays ours. Raises DatapathError."""
        try:
            self._process = await FaultProcess.start(self._found, self._ended)
        except OSError as exc:
            raise DatapathError(
                f"no process to touch missing pages: {exc.strerror or exc}"
            ) from exc
        return self._process.uffd

    async def close(self) -> None:
        """Forget everything; no ring may be running."""
        self._urgent.clear()
        self._later.clear()
        process, self._process = self._process, None
        try:
            if process is not None:
                await process.close()
        finally:
            self._areas.clear()
            self._memory = None

    def _ended(self, reason: str) -> None:
        self._may_fault = False
        self._lost = True
        self._fail(f"no page of the guest's memory can be asked for any more: {reason}")

    # Memory

    async def map(self, region: MemRegion, fd: int) -> int:
        """Be ready to have pages of a region touched; the user address that faults are reported by.

        Raises DatapathError.
        """
        if region in self._areas:
            area = self._areas[region]
            return area.address(region.gpa)
        assert self._process is not None
        page = page_size(fd)
        start = region.mmap_offset - region.mmap_offset % page
        length = -(-(region.mmap_offset + region.size - start) // page) * page
        try:
            base = await self._process.map(fd, length, start)
        except OSError as exc:
            raise DatapathError(
                f"the region with guest address {region.gpa:#x} cannot be watched for missing "
                f"pages: {exc.strerror or exc}; postcopy takes memfd, /dev/shm or hugetlbfs"
            ) from exc
        area = self._areas[region] = _Area(region, page, base, length, tells_pages(fd))
        for ring in self._late():
            ring.missing.pop(_NOWHERE, None)
        return area.address(region.gpa)

    async def use_memory(self, memory: Memory) -> None:
        """Go on with another memory table. What is not in it any more is not touched again.

        What is there has to be found out anew: the same memory may have other addresses.
        """
        kept = {MemRegion(*row) for row in memory.regions}
        gone = [self._areas.pop(region) for region in set(self._areas) - kept]
        for area in gone:
            for address in list(self._asked):
                if area.base <= address < area.base + area.length:
                    self._asked[address] = None
                    for queue in (self._urgent, self._later):
                        if address in queue:
                            del queue[address], self._asked[address]
        self._memory = memory
        self._iotlb.use_memory(memory)
        self._iotlb.clear()
        for ring in self._served():
            self._handover.retire(ring.fast.use_memory(memory))
        await self._hand_over()
        try:
            for area in gone:
                if self._process is not None:
                    await self._process.drop(area.base, area.length)
        except OSError as exc:
            self._ended(exc.strerror or str(exc))
        self._look()

    def allow_faults(self, allowed: bool) -> None:
        """Whether the frontend knows all regions, and so what to do when a page is missing."""
        self._may_fault = allowed and not self._lost
        self._look()

    # Rings

    def find(self, ring: GuestRing, setup: RingSetup) -> RingSetup | None:
        """Where it is, if all of its own memory is there; what is not is asked for."""
        missing = self._missing(setup)
        if missing:
            ring.missing, ring.missing_asked = missing, False
            return None
        return setup

    def _missing(self, setup: RingSetup) -> dict[int, int]:
        """A ring's own pages that have not come: guest addresses, by those to be touched."""
        missing: dict[int, int] = {}
        for uva, length in setup.areas():
            at = uva
            while at < uva + length:
                area = self._area(uva=at)
                if area is None:
                    if not any(0 <= at - start < size for _, size, start, _ in self.memory.regions):
                        return {}  # it lies outside of the memory: starting it says so
                    missing[_NOWHERE] = -1
                    break
                gpa = area.region.gpa + at - area.region.uva
                first, size = area.page_of(gpa)
                if self._iotlb.find(first) is None and not self._is_there(area, first):
                    missing[area.address(first)] = first
                at += first + size - gpa
        return missing

    def started(self, _: GuestRing) -> None:
        self._look()

    def _late(self) -> list[GuestRing]:
        """Rings whose own memory has not come."""
        return [
            ring
            for ring in self._rings.values()
            if ring.translation is self and ring.state is RingState.LATE and ring.unfit is None
        ]

    def _resume(self) -> bool:
        """Start those whose own memory is there now; whether there were any."""
        resumed = False
        for ring in self._late():
            if ring.missing:
                if not ring.missing_asked and len(self._asked) < ASKED_MAX:
                    areas = [(self._area(gpa=gpa), gpa) for gpa in ring.missing.values()]
                    ring.missing_asked = all(
                        [area is not None and self._ask(area, gpa, urgent=True)
                         for area, gpa in areas]
                    )  # fmt: skip
            elif self.find(ring, ring.known_setup) is not None:
                if self._run(ring):
                    resumed = True
                else:
                    ring.unfit = ring.setup
        return resumed

    # Pages

    def check(self) -> None:
        self._look()

    def scan(self, ring: GuestRing | None = None) -> None:
        self._look(ring)

    def _look(self, only: GuestRing | None = None) -> None:
        """Look through the rings, and let go on who can."""
        if self._lost or self._process is None:
            return
        resumed = self._resume()
        left = _LOOKS
        while True:
            before = left
            for ring in self._served(only):
                left = self._look_through(ring, left)
            self._show(resumed)
            resumed = False
            if left == before:
                break
            if left == 0:
                if not self._look_due:
                    self._look_due = True
                    asyncio.get_running_loop().call_later(_PAUSE_S, self._look_on)
                break
        self._send()

    def _look_through(self, ring: GuestRing, left: int) -> int:
        """Map what a ring needs and is there, in at most `left` blocks, and ask for the rest."""
        for gpa, _ in ring.fast.untranslated(ASKED_MAX, self._ahead):
            area = self._area(gpa=gpa)
            if area is None or self._iotlb.find(gpa) is not None:
                continue
            if left == 0:
                break
            if self._learn(area, gpa):
                left -= 1
            else:
                self._ask(area, gpa, urgent=gpa == ring.fast.missed)
        return left

    def _look_on(self) -> None:
        self._look_due = False
        self._look()

    def _area(self, *, gpa: int | None = None, uva: int | None = None) -> _Area | None:
        for area in self._areas.values():
            if gpa is not None and 0 <= gpa - area.region.gpa < area.region.size:
                return area
            if uva is not None and 0 <= uva - area.region.uva < area.region.size:
                return area
        return None

    def _is_there(self, area: _Area, gpa: int) -> bool:
        """Whether the file has contents at an address; False if it cannot be told."""
        return area.tells and self._memory is not None and self._memory.has_page(gpa)

    def _learn(self, area: _Area, gpa: int) -> bool:
        """Whether the page with an address is there. It is mapped then, with its neighbours."""
        first, size = area.page_of(gpa)
        if not self._is_there(area, first):
            return False
        end = first + size
        block = _BLOCK_PAGES * area.page
        into = (first - area.region.gpa + area.region.mmap_offset) % block
        low = max(first - into, area.region.gpa)
        high = min(first - into + block, area.region.gpa + area.region.size)
        while end < high and self._is_there(area, end):
            end = sum(area.page_of(end))
        while first > low and self._is_there(area, before := area.page_of(first - 1)[0]):
            first = before
        self._map(area, first, end - first)
        return True

    def _map(self, area: _Area, gpa: int, size: int) -> None:
        uva = area.region.uva + gpa - area.region.gpa
        self._iotlb.update(gpa, size, uva, ACCESS_READ | ACCESS_WRITE)

    def _ask(self, area: _Area, gpa: int, *, urgent: bool) -> bool:
        """Have a page touched, if it was not asked for yet; False if there is no room."""
        first, size = area.page_of(gpa)
        address = area.address(first)
        if address in self._asked:
            if urgent and address in self._later:
                del self._later[address]
                self._urgent[address] = None
            return True
        if len(self._asked) >= (ASKED_MAX if urgent else ASKED_MAX // 2):
            return False
        self._asked[address] = (first, size, area.region.uva + first - area.region.gpa)
        (self._urgent if urgent else self._later)[address] = None
        return True

    def _send(self) -> None:
        """Give the process as much as it can do at a time; the rest may still be overtaken."""
        if not self._may_fault or self._process is None:
            return
        given = len(self._asked) - len(self._urgent) - len(self._later)
        while given < TOUCHERS and (queue := self._urgent or self._later):
            address = next(iter(queue))
            del queue[address]
            self._process.touch(address)
            self.touched += 1
            given += 1

    def _found(self, addresses: list[int]) -> None:
        """Pages are there now, says the process. Raises ValueError for what it cannot know."""
        for address in addresses:
            if address not in self._asked or address in self._urgent or address in self._later:
                raise ValueError(f"it names address {address:#x}, which it was not asked for")
            page = self._asked.pop(address)
            if page is not None:
                gpa, size, uva = page
                self._iotlb.update(gpa, size, uva, ACCESS_READ | ACCESS_WRITE)
            for ring in self._late():
                ring.missing.pop(address, None)
        self._look()
