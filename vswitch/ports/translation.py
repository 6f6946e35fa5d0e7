"""Rings whose buffers are translated by tables that change while workers use them."""

from __future__ import annotations

import abc
from collections.abc import Mapping

from vswitch.dataplane.handover import HandOver
from vswitch.fastpath.main.iotlb import ENTRIES, Iotlb, IotlbTables
from vswitch.fastpath.main.mapping import Memory
from vswitch.ports.ring import TRANSLATED, GuestRing
from vswitch.vhost_user.datapath import RingSetup

_AHEAD_MIN = 16
"""Descriptors of a ring that are looked at ahead of the worker, however many rings there are."""


class PortTranslation(abc.ABC):
    """What stands between rings and memory; `rings` are all of the port's, served or not."""

    def __init__(self, rings: Mapping[int, GuestRing], handover: HandOver, iotlb: Iotlb) -> None:
        self._iotlb = iotlb
        self._rings = rings
        self._handover = handover
        self._lost = False

    # What it is asked for

    @abc.abstractmethod
    def find(self, ring: GuestRing, setup: RingSetup) -> RingSetup | None:
        """A ring that is to start, with addresses of the frontend's; None: it becomes LATE.

        Raises TranslationPending: the frontend starts it once more when it has told where it is.
        """

    @abc.abstractmethod
    def started(self, ring: GuestRing) -> None:
        """A ring runs, and workers know it, or it will as soon as its memory is there."""

    @abc.abstractmethod
    def scan(self, ring: GuestRing | None = None) -> None:
        """Ask for all buffers that rings hold, or that one, and that are not translated."""

    @abc.abstractmethod
    def check(self) -> None:
        """Once a second: nobody may wait for what was never asked for."""

    @property
    def tables(self) -> IotlbTables:
        return self._iotlb.tables()

    @property
    def memory(self) -> Memory:
        return self._iotlb.memory

    @property
    def serves_rings(self) -> bool:
        return bool(self._served())

    def memory_lost(self) -> None:
        """The guest's memory was taken away: nothing is asked for any more."""
        self._lost = True

    # For those that are one

    def _show(self, resumed: bool) -> None:
        """Show workers what the tables have now; `resumed`: and which rings run."""
        if self._give_tables() or resumed:
            # Nobody waits for the workers. Publishing also wakes those that sleep.
            self._handover.publish()

    async def _hand_over(self) -> None:
        """Return when no worker uses what the tables had before."""
        self._give_tables()
        await self._handover.settle()

    def _give_tables(self) -> bool:
        """Have all rings translate by the present tables; whether one had others."""
        tables = self._iotlb.tables()
        changed = False
        for ring in self._served():
            if ring.fast.started and ring.fast.iotlb is not tables:
                self._handover.retire(ring.fast.use_iotlb(tables))
                changed = True
        return changed

    def _served(self, only: GuestRing | None = None) -> list[GuestRing]:
        """All rings that are somewhere, or that one if it is."""
        rings = self._rings.values() if only is None else (only,)
        return [ring for ring in rings if ring.translation is self and ring.state in TRANSLATED]

    @property
    def _ahead(self) -> int:
        """Descriptors of a ring to be looked at ahead of its worker.

        Not more than there is room for, or one would put out the other for ever.
        """
        return max(_AHEAD_MIN, ENTRIES // 2 // max(1, len(self._served())))
