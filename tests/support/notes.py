"""What rings note for whoever starts them again, in a file that outlives their engine."""

from __future__ import annotations

import mmap
import os
import struct
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple, Self

from vswitch.fastpath.main.journal import SLOT_LEN, Journal
from vswitch.fastpath.main.port import MAX_VRINGS

BATCH_LEN = 8 + 8 * 1024
"""Bytes that a batch of chains takes: what is the same for all, and each chain."""


class Batch(NamedTuple):
    """Chains of a packed ring that were used at once: how many, the place of the first."""

    chains: int
    position: int


class Notes:
    """A port's notes, as C has them in JournalC."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            fd = os.memfd_create("journal", os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
            os.truncate(fd, MAX_VRINGS * SLOT_LEN)
            self.journal = Journal(MAX_VRINGS, fd)
            self._map = mmap.mmap(fd, 0)

    def note_taken(self, vring: int, taken: int, used: int) -> None:
        """Of a split ring: avail and used index when chains were taken last."""
        struct.pack_into("<HH", self._map, SLOT_LEN * vring + 8, taken, used)

    def batches(self, vring: int) -> tuple[Batch, Batch]:
        """Of a packed ring: the batch before the last and the last one."""
        start = SLOT_LEN * vring
        (current,) = struct.unpack_from("<H", self._map, start + 12)
        before, last = (
            Batch(*struct.unpack_from("<HH", self._map, start + 16 + BATCH_LEN * which))
            for which in (current ^ 1, current)
        )
        return before, last

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._map.close()
