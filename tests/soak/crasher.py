"""A guest in a process of its own, to be killed in the middle of everything.

Its memory is mapped here, too: what it had sent and been given is read from the rings that it left
behind. The process is not a fork of this one, which has threads.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from tests.soak.traffic import DEADLINE_S, SoakError, Station
from tests.support.processes import environment

_NOTES = struct.Struct("<QQQQQ")
"""Offered, received, the memfd of its memory, and where in that the two used rings are."""
_NOTES_LEN = 4096
_INDEX = struct.Struct("<H")


class Crasher:
    """Child process `pid` with a station that sends to `addressees` until it is killed."""

    def __init__(
        self, number: int, life: int, seed: int, path: Path, addressees: list[int]
    ) -> None:
        self.name = f"s{number}"
        fd = os.memfd_create("notes")
        os.ftruncate(fd, _NOTES_LEN)
        self._notes = mmap.mmap(fd, _NOTES_LEN)
        self._memory: mmap.mmap | None = None
        told = json.dumps([fd, number, life, seed, str(path), addressees])
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, told], env=environment(), pass_fds=(fd,)
        )
        os.close(fd)

    def wait(self) -> None:
        """Until it has its rings up and takes part."""
        deadline = time.monotonic() + DEADLINE_S
        while (notes := _NOTES.unpack_from(self._notes))[0] == 0:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise SoakError(f"{self.name}: the process to be killed never began")
            time.sleep(0.001)  # between two looks
        with Path(f"/proc/{self._process.pid}/fd/{notes[2]}").open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def kill(self) -> None:
        """As the kernel's out-of-memory killer does."""
        self._process.kill()
        if self._process.wait() != -signal.SIGKILL:
            raise SoakError(f"{self.name}: ended before it was killed, see its traceback")

    def left(self) -> tuple[int, int]:
        """(frames the switch took, frames it delivered), once it has let go of the memory."""
        assert self._memory is not None
        offered, received, _, rx_used, tx_used = _NOTES.unpack_from(self._notes)
        [taken] = _INDEX.unpack_from(self._memory, tx_used + 2)
        [delivered] = _INDEX.unpack_from(self._memory, rx_used + 2)
        return unwrap(taken, offered), unwrap(delivered, received)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._memory is not None:
            self._memory.close()
        self._notes.close()


def live(told: str) -> None:
    """Be the process, until it is killed."""
    fd, number, life, seed, path, addressees = json.loads(told)
    notes = mmap.mmap(fd, _NOTES_LEN)
    station = Station(number, life, Random(seed))
    station.guest.connect(path)
    [region], [memory] = station.guest.memory.table()
    used = [
        queue.layout.used_gpa - region.gpa + region.mmap_offset for queue in station.guest.queues()
    ]
    while True:
        # Noted before it is done: what is in the rings is at most a ring's size ahead.
        _NOTES.pack_into(notes, 0, station.offered, station.received, memory, *used)
        station.send(station.rng.choice(addressees), station.rng.randrange(16))
        station.take()
        time.sleep(0.0005)  # not all that the machine has


def unwrap(low: int, near: int) -> int:
    """The number with these low 16 bits that is nearest to another."""
    best = (near & ~0xFFFF) | low
    return min((best - 0x10000, best, best + 0x10000), key=lambda n: abs(n - near))


if __name__ == "__main__":
    live(sys.argv[1])
