"""Virtqueues of the software guest: their place in memory, their buffers and their eventfds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Generic, TypeVar

from vswitch.lab.guest.driver import ReceiveQueue, TransmitQueue, VirtQueue
from vswitch.lab.guest.errors import GuestError
from vswitch.lab.guest.memory import GuestMemory, round_up
from vswitch.lab.guest.raw import DESC_LEN, RawPackedRing, RawRing, RingLayout
from vswitch.lab.guest.shapes import BLOCK_SLOTS, RING_ALIGN, QueueShape, header_len, stride
from vswitch.vhost_user.protocol import Feature


def place_ring(memory: GuestMemory, size: int, packed: bool) -> RingLayout:
    """Set memory aside for a ring, its parts apart from each other."""
    if packed:
        return RingLayout(
            size,
            memory.allocate(16 * size, RING_ALIGN),
            memory.allocate(4),
            memory.allocate(4),
        )
    return RingLayout(
        size,
        memory.allocate(16 * size, RING_ALIGN),
        memory.allocate(6 + 2 * size, 64),
        memory.allocate(6 + 8 * size, 64),
    )


def _place_many(memory: GuestMemory, count: int, stride: int) -> list[int]:
    places: list[int] = []
    while len(places) < count:
        n = min(BLOCK_SLOTS, count, count - len(places))
        start = memory.allocate(n * stride)
        places.extend(range(start, start + n * stride, stride))
    return places


def place_slots(
    memory: GuestMemory, shape: QueueShape, head_len: int, transmit: bool
) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """Buffers as lists of (gpa, length), and the gpa of an indirect table for each of them."""
    lens = shape.piece_lens(head_len)
    count = shape.slots(len(lens), transmit)
    columns = [
        [(gpa + shape.offset, length) for gpa in _place_many(memory, count, stride(length, shape))]
        for length in lens
    ]
    slots = [list(row) for row in zip(*columns, strict=True)]
    tables = (
        _place_many(memory, count, round_up(len(lens) * DESC_LEN, 64)) if shape.indirect else []
    )
    return slots, tables


Q = TypeVar("Q", bound=VirtQueue)


class GuestQueue(Generic[Q]):
    """One vring: the driver's queue, the raw ring below it, and the eventfds.

    `index` is the vring's number in the protocol: 2n is the receiveq of pair n, 2n + 1 its
    transmitq. `base` is where the backend is to start at the next SET_VRING_BASE.
    """

    def __init__(self, index: int, ring: Q, memory: GuestMemory, layout: RingLayout) -> None:
        self.index = index
        self.ring = ring
        self.layout = layout
        self._memory = memory
        self._raw = RawRing(memory, layout)
        self.base = ring.used_idx
        if ring.packed:
            self.base = ring.used_position | ring.used_position << 16
        self.calls = 0
        """Notifications that the device sent, as far as taken."""
        self.kick_message: Callable[[int], None] | None = None
        """What kicks in place of the eventfd."""
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def raw(self) -> RawRing:
        """The split ring below the driver's."""
        if self.ring.packed:
            raise GuestError(f"{self.ring.name} is a packed ring: use raw_packed()")
        return self._raw

    def raw_packed(self) -> RawPackedRing:
        """The packed ring below the driver's, ready to go on where the driver would."""
        if not self.ring.packed:
            raise GuestError(f"{self.ring.name} is a split ring: use raw")
        return RawPackedRing(self._memory, self.layout, self.ring.avail_position)

    def guess_base(self) -> None:
        """Take as `base` what QEMU does when the backend is gone and cannot be asked.

        For a split ring that is used.idx. Nothing in memory says it of a packed ring, so what was
        known last stays, however old.
        """
        if not self.ring.packed:
            self.base = self._raw.used_idx

    def kick(self) -> None:
        """Notify the device, wanted or not."""
        if self.kick_message is not None:
            self.kick_message(self.index)
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.kick_fd, 1)

    def notify(self) -> None:
        """Notify the device if it wants to be."""
        if self.ring.take_kick():
            self.kick()

    def take_calls(self) -> int:
        """Empty the call eventfd. Returns how many notifications were in it."""
        try:
            n = os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0
        self.calls += n
        return n

    def take_error(self) -> bool:
        """Whether the device has signalled an error on this vring since the last look."""
        try:
            return os.eventfd_read(self.err_fd) > 0
        except BlockingIOError:
            return False

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)


def build_receive_queue(
    memory: GuestMemory, pair: int, shape: QueueShape, features: int, name: str
) -> GuestQueue[ReceiveQueue]:
    """The receiveq of a queue pair, set up in memory, nothing posted."""
    layout = place_ring(memory, shape.size, bool(features & Feature.RING_PACKED))
    slots, tables = place_slots(memory, shape, header_len(features), transmit=False)
    ring = ReceiveQueue(
        memory.mapping,
        f"{name}: receiveq {pair}",
        layout.size,
        layout.desc_gpa,
        layout.avail_gpa,
        layout.used_gpa,
        slots,
        tables,
        header_len=header_len(features),
        event_idx=bool(features & Feature.RING_EVENT_IDX),
        packed=bool(features & Feature.RING_PACKED),
        in_order=bool(features & Feature.IN_ORDER),
        first_idx=shape.first_idx,
        mergeable=bool(features & Feature.MRG_RXBUF),
        guard_len=shape.guard_len,
    )
    return GuestQueue(2 * pair, ring, memory, layout)


def build_transmit_queue(
    memory: GuestMemory, pair: int, shape: QueueShape, features: int, name: str
) -> GuestQueue[TransmitQueue]:
    """The transmitq of a queue pair."""
    layout = place_ring(memory, shape.size, bool(features & Feature.RING_PACKED))
    slots, tables = place_slots(memory, shape, header_len(features), transmit=True)
    ring = TransmitQueue(
        memory.mapping,
        f"{name}: transmitq {pair}",
        layout.size,
        layout.desc_gpa,
        layout.avail_gpa,
        layout.used_gpa,
        slots,
        tables,
        header_len=header_len(features),
        event_idx=bool(features & Feature.RING_EVENT_IDX),
        packed=bool(features & Feature.RING_PACKED),
        in_order=bool(features & Feature.IN_ORDER),
        first_idx=shape.first_idx,
    )
    return GuestQueue(2 * pair + 1, ring, memory, layout)
