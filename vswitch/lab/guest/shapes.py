"""What the buffers of a queue look like: sizes, cuts into descriptors, memory they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vswitch.lab.guest.memory import Region, round_up, scattered_layout
from vswitch.lab.guest.raw import DESC_LEN
from vswitch.vhost_user.protocol import Feature

MAX_HEADER_LEN = 12
BLOCK_SLOTS = 64
"""Slots whose n-th pieces lie side by side; the next block may go to another region."""
RING_ALIGN = 4096


def header_len(features: int) -> int:
    """Length of the virtio-net header in bytes (VIRTIO 1.2 sections 5.1.6 and 5.1.6.1)."""
    return 12 if features & (Feature.VERSION_1 | Feature.MRG_RXBUF) else 10


def cut(total_len: int, head_len: int, cuts: Sequence[int]) -> list[int]:
    """Lengths of the descriptors of a buffer of `total_len` bytes, header included.

    `cuts` are offsets from the first byte of the frame: 0 puts the header into a descriptor of its
    own, negative ones cut the header itself. Cuts outside of the buffer are ignored.
    """
    edges = sorted({edge for edge in (head_len + c for c in cuts) if 0 < edge < total_len})
    return [end - start for start, end in zip([0, *edges], [*edges, total_len], strict=True)]


@dataclass(frozen=True, slots=True)
class QueueShape:
    """How the buffers of a queue look; all lengths in bytes.

    `buf_len` is one whole buffer with its header. `offset` moves every piece that far from an
    address divisible by 64. `guard_len` (receive only) is described at ReceiveQueue. `first_idx` is
    where the ring's free-running indices begin.
    """

    size: int
    buf_len: int
    cuts: tuple[int, ...] = ()
    indirect: bool = False
    guard_len: int = 0
    offset: int = 0
    first_idx: int = 0

    def piece_lens(self, head_len: int) -> list[int]:
        return cut(self.buf_len, head_len, self.cuts)

    def slots(self, pieces: int, transmit: bool) -> int:
        """Buffers worth having: a short frame takes fewer descriptors than its slot has pieces."""
        return self.size if transmit or self.indirect else max(1, self.size // pieces)

    def memory_len(self, head_len: int, transmit: bool) -> tuple[int, int]:
        """Guest memory this queue takes at most, and the largest piece of it."""
        lens = self.piece_lens(head_len)
        slots = self.slots(len(lens), transmit)
        strides = [stride(length, self) for length in lens]
        per_block = min(slots, BLOCK_SLOTS)
        blocks = -(-slots // per_block)
        table = round_up(len(lens) * DESC_LEN, 64) if self.indirect else 0
        rings = 3 * RING_ALIGN + 26 * self.size + 12
        largest = max(per_block * max(*strides, table), 16 * self.size) + RING_ALIGN
        return rings + blocks * per_block * (sum(strides) + table), largest


def stride(length: int, shape: QueueShape) -> int:
    return round_up(length + shape.guard_len + shape.offset, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferOptions:
    """What a guest's rings and buffers are to look like, whatever will be negotiated."""

    queue_size: int = 256
    """Entries of each ring, 2 to 32768; a power of two in split rings."""
    rx_queue_size: int | None = None
    """Entries of receiveqs, where they are others."""
    max_frame_len: int = 1518
    """Longest frame to send, and to receive without mergeable buffers, in bytes."""
    tx_cuts: tuple[int, ...] = ()
    """Where to cut buffers into descriptors, see cut(). Legacy layout (neither VERSION_1 nor
    ANY_LAYOUT) cuts after the header where the standard demands it."""
    rx_cuts: tuple[int, ...] = ()
    rx_buf_len: int | None = None
    """Bytes of one receive buffer, header included. Default: 2048 with mergeable buffers, else as
    max_frame_len requires."""
    indirect: bool = True
    """Use indirect descriptors when they are negotiated."""
    rx_guard_len: int = 0
    """See QueueShape: a guard makes every write past the reported length an error."""
    slot_offset: int = 0
    """See QueueShape."""
    first_idx: int = 0
    """Where the free-running indices of fresh rings begin, 0 to 65535; see VirtQueue."""

    def shape(self, features: int, *, transmit: bool) -> QueueShape:
        """The queue's buffers under these features."""
        cuts = self.tx_cuts if transmit else self.rx_cuts
        mergeable = bool(features & Feature.MRG_RXBUF)
        any_layout = features & (Feature.VERSION_1 | Feature.ANY_LAYOUT)
        if not any_layout and (transmit or not mergeable):
            cuts = (0, *(c for c in cuts if c > 0))
        buf_len = MAX_HEADER_LEN + self.max_frame_len
        if not transmit:
            buf_len = self.rx_buf_len or (2048 if mergeable else buf_len)
        return QueueShape(
            size=self.queue_size if transmit else self.rx_queue_size or self.queue_size,
            buf_len=buf_len,
            cuts=cuts,
            indirect=self.indirect and bool(features & Feature.RING_INDIRECT_DESC),
            guard_len=0 if transmit else self.rx_guard_len,
            offset=self.slot_offset,
            first_idx=self.first_idx,
        )

    def layout(self, regions: int, wanted: int, queue_pairs: int) -> list[Region]:
        """`regions` regions with room for all queues, whatever of `wanted` is negotiated."""
        total = largest = 0
        for transmit in (False, True):
            needs = [
                self.shape(features, transmit=transmit).memory_len(MAX_HEADER_LEN, transmit)
                for features in (
                    0,
                    wanted,
                    wanted & ~Feature.RING_INDIRECT_DESC,
                    wanted & ~Feature.MRG_RXBUF,
                )
            ]
            total += max(need for need, _ in needs)
            largest = max(largest, *(piece for _, piece in needs))
        return scattered_layout(regions, total * queue_pairs + (1 << 16), largest)
