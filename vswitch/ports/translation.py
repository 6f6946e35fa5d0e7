"""Rings whose buffers are translated by tables that change while workers use them."""

from __future__ import annotations

from vswitch.dataplane.handover import HandOver
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.iotlb import ENTRIES, Iotlb, IotlbTables
from vswitch.fastpath.main.mapping import Memory
from vswitch.fastpath.main.port import Port, Ring
from vswitch.vhost_user.datapath import RingSetup

_AHEAD_MIN = 16
"""Descriptors of a ring that are looked at ahead of the worker, however many rings there are."""


class PortTranslation:
    """One port's rings, the tables that they have now, and those that workers may still use."""

    def __init__(
        self,
        port: Port,
        engine: Engine,
        handover: HandOver,
        iotlb: Iotlb,
    ) -> None:
        self._iotlb = iotlb
        self._port = port
        self._engine = engine
        self._handover = handover
        self._setups: dict[int, RingSetup] = {}
        """Rings that run, with the addresses that the frontend gave."""
        self._lost = False

    @property
    def tables(self) -> IotlbTables:
        return self._iotlb.tables()

    @property
    def memory(self) -> Memory:
        return self._iotlb.memory

    @property
    def serves_rings(self) -> bool:
        return bool(self._setups)

    def memory_lost(self) -> None:
        """The guest's memory was taken away: rings that are suspended stay so."""
        self._lost = True

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
        for index in self._setups:
            ring = self._port.rings[index]
            if ring.started and ring.iotlb is not tables:
                self._handover.retire(ring.use_iotlb(tables))
                changed = True
        return changed

    def _served(self, index: int | None) -> list[Ring]:
        """All rings that run, or that one if it does."""
        numbers = list(self._setups) if index is None else [index]
        return [self._port.rings[one] for one in numbers if one in self._setups]

    @property
    def _ahead(self) -> int:
        """Descriptors of a ring to be looked at ahead of its worker.

        Not more than there is room for, or one would put out the other for ever.
        """
        return max(_AHEAD_MIN, ENTRIES // 2 // max(1, len(self._setups)))
