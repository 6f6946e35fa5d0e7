"""Rings of one port that their driver has disabled: nobody touches them until it shows itself.

A frontend that takes a driver away may say no more than SET_VRING_ENABLE 0 (Linux's virtio_uml,
DPDK's virtio-user up to 17.11), and the guest uses the memory for something else. What then looks
like an avail index is none, and a used index would be written into somebody's data. So workers do
not see a ring that was disabled. "Ring states" of the protocol document wants what a disabled
transmitq has to offer to be taken and discarded: workers see it again as soon as its driver kicks.
"""

from __future__ import annotations

from collections.abc import Callable

from vswitch.dataplane.handover import HandOver
from vswitch.ports.ring import GuestRing, RingState
from vswitch.vhost_user.datapath import RingSetup

LOOKS = 3
"""How often a ring is given back to the workers that still has something to offer."""


def can_hold(ring: GuestRing, setup: RingSetup) -> bool:
    """Whether it can be known that the driver of such a ring is there after all.

    A transmitq without kicks is looked at for ever; nobody waits for receive buffers.
    """
    return not ring.fast.is_transmitq or setup.kick_fd >= 0


class Parking:
    """`wanted` hears of a parked or quiet ring whose driver kicked."""

    def __init__(self, handover: HandOver, wanted: Callable[[GuestRing], None]) -> None:
        self._handover = handover
        self._wanted = wanted

    def hold(self, ring: GuestRing) -> None:
        """Do not start this one before it is wanted."""
        ring.become(RingState.QUIET)
        if ring.fast.is_transmitq:
            ring.watch(self._wanted)

    async def park(self, ring: GuestRing) -> None:
        """Take a ring away from the workers when they have discarded what it had to offer."""
        for _ in range(LOOKS):
            if ring.state is not RingState.RUNNING:
                return
            ring.become(RingState.PARKED)
            await self._handover.settle()
            if not self._is_parked(ring) or not ring.fast.is_transmitq:
                return  # nobody waits for receive buffers
            ring.drain_kicks()
            if not ring.fast.want_kicks():
                ring.watch(self._wanted)
                return
            ring.become(RingState.RUNNING)
            await self._handover.settle()

    @staticmethod
    def _is_parked(ring: GuestRing) -> bool:
        """Still: its memory may be lost or a fault found while workers are waited for."""
        return ring.state is RingState.PARKED
