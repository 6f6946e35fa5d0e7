"""A guest in a process of its own, to be killed in the middle of everything.

Its memory belongs to the parent, too: what it had sent and been given is read from the rings that
it left behind.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
import traceback
from pathlib import Path
from random import Random

from traffic import DEADLINE_S, SoakError, Station

_NOTES = struct.Struct("<QQQQ")  # offered, received, gpa of the two used rings


class Crasher:
    """Child process `pid` with a station that sends to `addressees` until it is killed."""

    def __init__(
        self, number: int, life: int, seed: int, path: Path, addressees: list[int]
    ) -> None:
        self.number = number
        self.name = f"s{number}"
        self.station = Station(number, life, Random(seed))
        self._notes = mmap.mmap(-1, 4096)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._live(path, addressees)
            except BaseException:
                traceback.print_exc()
            os._exit(1)

    def _live(self, path: Path, addressees: list[int]) -> None:
        station = self.station
        station.guest.connect(path)
        used = [queue.layout.used_gpa for queue in station.guest.queues()]
        while True:
            # Noted before it is done: what is in the rings is at most a ring's size ahead.
            _NOTES.pack_into(self._notes, 0, station.offered, station.received, *used)
            station.send(station.rng.choice(addressees), station.rng.randrange(16))
            station.take()
            time.sleep(0.0005)

    def wait(self) -> None:
        """Until it has its rings up and takes part."""
        deadline = time.monotonic() + DEADLINE_S
        while _NOTES.unpack_from(self._notes)[0] == 0:
            if time.monotonic() > deadline or os.waitpid(self.pid, os.WNOHANG)[0]:
                raise SoakError(f"{self.name}: the process to be killed never began")
            time.sleep(0.001)

    def kill(self) -> None:
        """As the kernel's out-of-memory killer does."""
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        if not os.WIFSIGNALED(status):
            raise SoakError(f"{self.name}: ended before it was killed, see its traceback")

    def left(self) -> tuple[int, int]:
        """(frames the switch took, frames it delivered), once it has let go of the memory."""
        offered, received, rx_used, tx_used = _NOTES.unpack_from(self._notes)
        load = self.station.guest.memory.mapping.load_u16
        return unwrap(load(tx_used + 2), offered), unwrap(load(rx_used + 2), received)

    def close(self) -> None:
        self.station.guest.close()
        self._notes.close()


def unwrap(low: int, near: int) -> int:
    """The number with these low 16 bits that is nearest to another."""
    best = (near & ~0xFFFF) | low
    return min((best - 0x10000, best, best + 0x10000), key=lambda n: abs(n - near))
