"""A port behind a virtual IOMMU: its IOTLB, whom it serves, and what it still has to ask for.

A ring whose own memory is not translated is suspended; a buffer that is not makes its worker stop
there and say so. Then the frontend is asked, once, for all that the ring holds. Buffers that a
guest posts to receive into are asked for before a frame comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from vswitch.dataplane.handover import HandOver
from vswitch.fastpath.main.iotlb import ACCESS_READ, ACCESS_WRITE, Iotlb
from vswitch.fastpath.main.joined import why_apart
from vswitch.fastpath.main.mapping import Memory
from vswitch.ports.ring import GuestRing, RingState
from vswitch.ports.translation import PortTranslation
from vswitch.vhost_user.datapath import DatapathError, Pieces, RingSetup, TranslationPending
from vswitch.vhost_user.frontend import Frontend
from vswitch.vhost_user.protocol import Feature

ASKED_MAX = 512
"""Misses that may be without an answer; what is left is asked for when those are answered."""

_BATCH = 32
"""As many of them for buffers. Frontends answer one after the other, QEMU in a third of a
millisecond, and when all mappings are taken back at once, what rings themselves need comes last."""

PIECES_MAX = 1024
"""Pieces that the rings of one port may be in, not counting parts in one piece. A split ring of
1024 entries is in ten at most, in pages of 4 KiB."""

_NOWHERE = "the IOMMU has nothing for it at address {:#x}"

_PAGE = 4096
"""No IOMMU maps less, so two misses in one page are one."""

log = logging.getLogger("vswitch.port")


class PortIotlb(PortTranslation):
    """The IOTLB of one port with its present frontend and memory.

    `go_on` lets a suspended ring run where it was, or elsewhere from where it stopped, and returns
    whether it can; `astray` hears why a ring cannot be where its driver says that it is.
    """

    def __init__(
        self,
        rings: Mapping[int, GuestRing],
        handover: HandOver,
        memory: Memory,
        frontend: Callable[[], Frontend | None],
        go_on: Callable[[GuestRing, RingSetup], bool],
        astray: Callable[[GuestRing, str], None],
    ) -> None:
        super().__init__(rings, handover, Iotlb(memory))
        self._frontend = frontend
        self._go_on = go_on
        self._astray = astray
        self._asked: set[tuple[int, int]] = set()
        self._in_vain: set[tuple[int, int]] = set()
        """What was refused and no worker needs yet: not asked again at once."""
        self._generation = 0
        self._more = False
        """Whether there was more to ask for than a batch."""

    # Rings

    def find(self, ring: GuestRing, setup: RingSetup) -> RingSetup:
        """The same ring with addresses of the frontend's. Raises TranslationPending."""
        packed = Feature.RING_PACKED in setup.features
        missing: list[tuple[int, int]] = []
        problems: list[str] = []
        found = []
        # The device writes the used ring, of a packed ring all but the driver's event suppression.
        for (address, length), written in zip(setup.areas(), (packed, False, True), strict=True):
            access = ACCESS_READ | ACCESS_WRITE if written else ACCESS_READ
            found.append(self._locate(address, length, access, missing, problems))
        for iova, access in missing:
            self._ask(iova, access, ring)
        pieces = () if max(map(len, found)) == 1 else tuple(found)
        if (count := _scattered(pieces)) and count + self._scattered_others(ring) > PIECES_MAX:
            problems.append(
                f"it lies in {count} pieces of memory, with those of the port's other rings more "
                f"than {PIECES_MAX}; give the guest fewer queues or smaller rings"
            )
        if problems:
            # One of them: to alternate between several would tell of each again and again.
            self._astray(ring, problems[0])
        if missing or problems:
            raise TranslationPending
        desc, avail, used = found
        return replace(
            setup, desc_uva=desc[0][0], avail_uva=avail[0][0], used_uva=used[0][0], pieces=pieces
        )

    def _scattered_others(self, ring: GuestRing) -> int:
        """The pieces of the port's rings but one."""
        return sum(
            _scattered(other.place.pieces)
            for other in self._served()
            if other is not ring and other.place is not None
        )

    def _locate(
        self,
        iova: int,
        length: int,
        access: int,
        missing: list[tuple[int, int]],
        problems: list[str],
    ) -> Pieces:
        """Where a part of a ring lies, as user addresses: all of it, unless something is added to
        what is missing or to what is wrong."""
        pieces: list[tuple[int, int]] = []
        done = 0
        while done < length:
            at = iova + done
            if at >= 1 << 64:
                problems.append(f"its address {iova:#x} plus its length wraps past 2^64")
                return ()
            entry = self._iotlb.find(at)
            if entry is None:
                missing.append((at, access))
                done += _PAGE - at % _PAGE
                continue
            allowed, uva, left = entry
            if access & ~allowed:
                problems.append(_NOWHERE.format(at))
                return ()
            size = min(left, length - done)
            first, before = pieces[-1] if pieces else (uva, 0)
            if first + before == uva and self.memory.in_one_region(first, before + size):
                pieces[-1:] = [(first, before + size)]
            else:
                pieces.append((uva, size))
            done += size
        if not missing and len(pieces) > 1 and (why := why_apart(self.memory, pieces)):
            problems.append(
                f"its part at I/O virtual address {iova:#x} ({length} bytes) is in {len(pieces)} "
                f"pieces of memory, which cannot be mapped side by side: {why}"
            )
        return tuple(pieces)

    def started(self, ring: GuestRing) -> None:
        self._iotlb.forget_denials()
        self._changed()
        self.scan(ring)

    def stopped(self) -> None:
        """Rings have stopped. After the last one frontends tell no more: all is forgotten."""
        if not self.serves_rings:
            self._iotlb.clear()
            self._asked.clear()
            # An answer that is on its way is one to questions of earlier.
            self._generation += 1

    # What the frontend says

    def update(self, iova: int, size: int, uva: int, access: int) -> None:
        """Map a range and let go on who waited for it. Raises DatapathError."""
        try:
            self._iotlb.update(iova, size, uva, access)
        except ValueError as exc:
            raise DatapathError(f"update: {exc}") from exc
        self._asked = {
            (page, how) for page, how in self._asked if page >= iova + size or page + _PAGE <= iova
        }
        self._changed()

    async def invalidate(self, iova: int, size: int) -> None:
        """Forget a range; no worker uses it when this returns."""
        self._iotlb.invalidate(iova, size)
        for ring in self._served():
            if any(_overlap(area, iova, size) for area in ring.known_setup.areas()):
                ring.suspend()
        await self._hand_over()
        self._changed()

    async def use_memory(self, memory: Memory) -> None:
        """Go on with another memory table, in which mappings may lie elsewhere or nowhere."""
        self._iotlb.use_memory(memory)
        for ring in self._served():
            ring.unfit = None
            try:
                here = self.find(ring, ring.known_setup) == ring.place
            except TranslationPending:
                here = False
            if here and ring.state is not RingState.UNTRANSLATED:
                self._handover.retire(ring.fast.use_memory(memory))
            else:
                ring.suspend()
        await self._hand_over()
        self._changed()

    def _resume(self) -> bool:
        """Let those go on whose own memory is translated; whether there were any."""
        resumed = False
        for ring in () if self._lost else self._served():
            if ring.state is not RingState.UNTRANSLATED or ring.fast.fault is not None:
                continue
            try:
                place = self.find(ring, ring.known_setup)
            except TranslationPending:
                continue
            if place == ring.unfit:
                continue
            if self._go_on(ring, place):
                resumed = True
            else:
                ring.unfit = place
        return resumed

    def _changed(self) -> None:
        """Show workers what the IOTLB has now, and ask for what is still missing."""
        self._show(self._resume())
        if not self._asked or (self._more and len(self._asked) <= _BATCH // 2):
            self.scan()

    # What is asked of it

    def scan(self, ring: GuestRing | None = None) -> None:
        if self._lost:
            return
        if ring is None:
            self._more = False
        rings = [one.fast for one in self._served(ring)]
        for left, fast in zip(range(len(rings), 0, -1), rings, strict=True):
            missed = fast.missed
            share = -(-(_BATCH - len(self._asked)) // left)
            for iova, written in fast.untranslated(ASKED_MAX, self._ahead):
                access = ACCESS_WRITE if written else ACCESS_READ
                # A worker waits for this one, whoever else does.
                if iova == missed:
                    self._ask(iova, access)
                elif (iova - iova % _PAGE, access) in self._in_vain:
                    continue
                elif share > 0:
                    share -= self._ask(iova, access)
                else:
                    self._more = True
                    break

    def check(self) -> None:
        self._in_vain.clear()
        if self._asked:
            # What a worker stopped at is asked for at once, and its event may be lost.
            self.scan()
        else:
            self._changed()

    def ask_again(self) -> None:
        """All that is missing, whether it was asked for or not: there is another way to ask."""
        self._asked.clear()
        self._generation += 1
        self._changed()

    def _ask(self, iova: int, access: int, ring: GuestRing | None = None) -> bool:
        """Send a miss, if it was not sent yet; `ring` if its own memory is there, not a buffer."""
        question = (iova - iova % _PAGE, access)
        frontend = self._frontend()
        if question in self._asked or len(self._asked) >= ASKED_MAX or frontend is None:
            return False
        generation = self._generation

        def answered(status: int) -> None:
            if generation != self._generation:
                return
            self._asked.discard(question)
            if status:
                if not self._refused(question, None if ring is None else iova):
                    self._in_vain.add(question)
                if ring is not None and ring.state is RingState.STOPPED:
                    self._astray(ring, _NOWHERE.format(iova))
            self._changed()

        if not frontend.ask_translation(iova, access, answered):
            return False
        self._asked.add(question)
        return True

    def _refused(self, question: tuple[int, int], own: int | None) -> bool:
        """Note that nothing is there, so that who waits for it learns that; False if nobody does.

        Buffers are asked for ahead, and a guest that is being reset has none any more.
        """
        page, access = question
        denied = False
        waiting = {ring.fast.missed for ring in self._served()} | {own}
        for iova in waiting:
            if iova is None or iova - iova % _PAGE != page:
                continue
            entry = self._iotlb.find(iova)
            if entry is None or access & ~entry[0]:
                self._iotlb.deny(iova)
                denied = True
        return denied


def _scattered(pieces: tuple[Pieces, ...]) -> int:
    """How many pieces of a ring's are mapped side by side."""
    return sum(len(part) for part in pieces if len(part) > 1)


def _overlap(area: tuple[int, int], iova: int, size: int) -> bool:
    """Whether an invalidation touches an area; size 0 is all."""
    address, length = area
    return size == 0 or (address < iova + size and iova < address + length)
