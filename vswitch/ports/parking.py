"""Rings of one port that their driver has disabled: nobody touches them until it shows itself.

A frontend that takes a driver away may say no more than SET_VRING_ENABLE 0 (Linux's virtio_uml,
DPDK's virtio-user up to 17.11), and the guest uses the memory for something else. What then looks
like an avail index is none, and a used index would be written into somebody's data. So workers do
not see a ring that was disabled. "Ring states" of the protocol document wants what a disabled
transmitq has to offer to be taken and discarded: workers see it again as soon as its driver kicks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

from vswitch.fastpath.main.port import Port, Ring
from vswitch.vhost_user.datapath import RingSetup

LOOKS = 3
"""How often a ring is given back to the workers that still has something to offer."""


class Parking:
    """`unpark` runs a ring again whose driver kicked."""

    def __init__(self, port: Port, unpark: Callable[[int], None]) -> None:
        self._port = port
        self._unpark = unpark
        self._kick_fds: dict[int, int] = {}
        self._watched: dict[int, int] = {}
        self._suspended: set[int] = set()
        self._unstarted: dict[int, RingSetup] = {}

    def started(self, index: int, kick_fd: int) -> None:
        """A ring runs, and its driver kicks through this; -1 if it is polled."""
        self._kick_fds[index] = kick_fd

    def can_park(self, ring: Ring) -> bool:
        """Whether it can be known that its driver is there after all.

        A transmitq without kicks is looked at for ever; nobody waits for receive buffers.
        """
        return not ring.is_transmitq or self._kick_fds.get(ring.index, -1) >= 0

    def suspend(self, ring: Ring) -> None:
        """Keep a running ring out of what is published from now on."""
        ring.suspend()
        self._suspended.add(ring.index)

    def has_more(self, ring: Ring) -> bool:
        """Ask the driver of a suspended ring for a kick; whether it has offered something already.

        Only after a quiescent point. Never of receive buffers, which nobody waits for.
        """
        if not ring.is_transmitq or not ring.started:
            return False
        fd = self._kick_fds[ring.index]
        _drain(fd)  # of kicks that workers were woken by, and do not read
        if ring.want_kicks():
            return True
        self._watch(ring.index, fd)
        return False

    def hold(self, ring: Ring, setup: RingSetup) -> None:
        """Do not start this one before it is wanted."""
        self._unstarted[ring.index] = setup
        self._kick_fds[ring.index] = setup.kick_fd
        if ring.is_transmitq:
            self._watch(ring.index, setup.kick_fd)

    def held(self, index: int) -> RingSetup | None:
        """The set-up of a ring that is to start when it is wanted."""
        return self._unstarted.get(index)

    def holds(self, index: int) -> bool:
        """Whether the frontend takes a ring for started that is kept from the workers."""
        return index in self._unstarted or index in self._suspended

    def release(self, index: int) -> None:
        """A ring is wanted again, or has stopped."""
        self.ignore(index)
        self._unstarted.pop(index, None)
        if index in self._suspended:
            self._suspended.remove(index)
            self._port.rings[index].resume()

    def ignore(self, index: int) -> None:
        """Do not look for kicks of a ring any more."""
        fd = self._watched.pop(index, -1)
        if fd >= 0:
            asyncio.get_running_loop().remove_reader(fd)

    def _watch(self, index: int, fd: int) -> None:
        self._watched[index] = fd
        asyncio.get_running_loop().add_reader(fd, self._kicked, index)

    def _kicked(self, index: int) -> None:
        _drain(self._watched[index])
        self._unpark(index)


def _drain(fd: int) -> None:
    # Without waiting, whatever its frontend has made of the descriptor's flags.
    with contextlib.suppress(OSError):
        os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)
