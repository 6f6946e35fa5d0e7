"""Rings whose buffers are translated by tables that change while workers use them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

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
        settle: Callable[[], Awaitable[None]],
        iotlb: Iotlb,
    ) -> None:
        self._iotlb = iotlb
        self._port = port
        self._engine = engine
        self._settle = settle
        self._setups: dict[int, RingSetup] = {}
        """Rings that run, with the addresses that the frontend gave."""
        self._old: list[tuple[int, list[IotlbTables]]] = []
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
        old = self._give_tables()
        if old or resumed:
            # Nobody waits for the workers: they may use the old ones for a moment, which are kept.
            # Publishing also wakes those that sleep.
            ticket = self._engine.publish()
            passed = self._engine.passed
            self._old = [(since, kept) for since, kept in self._old if not passed(since)]
            self._old.append((ticket, old))

    async def _hand_over(self) -> None:
        """Return when no worker uses what the tables had before."""
        old = self._give_tables()
        await self._settle()
        old.clear()
        self._old.clear()

    def _give_tables(self) -> list[IotlbTables]:
        """Have all rings translate by the present tables; those that they used before."""
        tables = self._iotlb.tables()
        old = []
        for index in self._setups:
            ring = self._port.rings[index]
            if ring.started and ring.iotlb is not tables:
                old.append(ring.iotlb)
                ring.use_iotlb(tables)
        return old

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
