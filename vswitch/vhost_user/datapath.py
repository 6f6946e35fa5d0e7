"""What a backend needs from the switch: the interface between protocol and forwarding.

The backend knows what the frontend said; a `Datapath` maps the memory and
runs the rings, and hides how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vswitch.vhost_user.protocol import Feature, LogArea, MemRegion


class DatapathError(Exception):
    """The switch cannot do what a request asks; the text names the field and the value."""


class TranslationPending(Exception):
    """A ring can start only when the frontend has told where it lies; it was asked."""


Pieces = tuple[tuple[int, int], ...]
"""A range in the order of its bytes, as (address, bytes) of each piece of it."""


@dataclass(frozen=True, slots=True)
class RingLog:
    """Writes into guest memory are to be logged.

    `used_gpa` is the guest address that a write to the used ring's first byte is logged as; None if
    writes to the used ring are not to be logged.
    """

    used_gpa: int | None


@dataclass(frozen=True, slots=True)
class RingSetup:
    """All that is needed to run a virtqueue.

    `size` counts entries; addresses are the frontend's, or I/O virtual where ACCESS_PLATFORM makes
    them so, see `Datapath.use_iotlb`; `base` is the avail index to go on from;
    `kick_fd` -1 means that the driver cannot kick and the ring is polled, `call_fd` -1 that the
    driver polls. Both descriptors stay the backend's, which closes neither while the ring runs.
    `logged` is None unless writes are to be logged (LOG_ALL). `quiet`: its driver disabled it and
    may be gone; where it lies may be anything, and nobody touches that until it is enabled or
    kicked. `pieces` says for each part, in the order of `areas`, where it lies when that is one
    piece for the driver only, as (address, bytes) of the frontend's; empty when every part is in
    one piece.
    """

    size: int
    desc_uva: int
    used_uva: int
    avail_uva: int
    base: int
    features: Feature
    enabled: bool
    kick_fd: int
    call_fd: int
    logged: RingLog | None = None
    quiet: bool = False
    pieces: tuple[Pieces, ...] = ()

    def areas(self) -> list[tuple[int, int]]:
        """Address and length in bytes of its parts: descriptors, the driver's, the device's."""
        packed = Feature.RING_PACKED in self.features
        return ring_areas(packed, self.size, self.desc_uva, self.avail_uva, self.used_uva)


def ring_areas(packed: bool, size: int, desc: int, avail: int, used: int) -> list[tuple[int, int]]:
    """The parts of a ring at these addresses with their lengths (VIRTIO 1.2, 2.7 and 2.8)."""
    if packed:
        return [(desc, 16 * size), (avail, 4), (used, 4)]
    return [(desc, 16 * size), (avail, 6 + 2 * size), (used, 6 + 8 * size)]


class Datapath(Protocol):
    """One port's rings, as the backend of its present frontend drives them.

    A device of any type needs this; what a type needs besides is in its own file (net.py). Whatever
    a coroutine takes away - a ring, memory, a descriptor - is no longer in use by any worker when
    it returns.
    """

    @property
    def features(self) -> Feature:
        """Virtio features the port offers, without PROTOCOL_FEATURES."""
        ...

    @property
    def memory_slots(self) -> int:
        """The most regions of guest memory at a time."""
        ...

    async def set_memory(self, regions: list[MemRegion], fds: list[int]) -> None:
        """Map new guest memory in place of the old; no ring may be running.

        `fds` has a descriptor a region, may be closed afterwards. Raises DatapathError, and then
        there is no memory at all.
        """
        ...

    async def add_memory(self, region: MemRegion, fd: int) -> None:
        """Map one more region; running rings go on, and may use it when this returns.

        `fd` may be closed afterwards. Raises DatapathError, and then nothing has changed.
        """
        ...

    async def remove_memory(self, region: MemRegion) -> None:
        """Unmap one region, in which no running ring lies; other rings go on.

        Raises DatapathError, and then nothing has changed.
        """
        ...

    async def set_dirty_log(self, fd: int, area: LogArea) -> None:
        """Log writes of the rings that are to be logged in another bitmap from now on.

        `fd` may be closed afterwards. Raises DatapathError, and then nothing has changed.
        """
        ...

    async def log_rings(self, logs: dict[int, RingLog | None]) -> None:
        """Begin or end to log the writes of running rings, which go on meanwhile."""
        ...

    async def start_ring(self, index: int, setup: RingSetup) -> int:
        """Run a virtqueue; returns the avail index it goes on from.

        Raises DatapathError, and TranslationPending.
        """
        ...

    async def stop_rings(self, indices: list[int]) -> list[int]:
        """Stop running virtqueues; returns the avail index of each to go on from later."""
        ...

    def make_inflight(self) -> tuple[int, int]:
        """Memory for what is in flight: a descriptor, which is the caller's, and its size in bytes.

        Raises DatapathError.
        """
        ...

    def use_inflight(self, fd: int, size: int, offset: int) -> None:
        """Keep account of what is in flight there from now on; no ring may be running.

        Raises DatapathError for memory that did not come from `make_inflight`.
        """
        ...

    def forget_ring(self, index: int) -> None:
        """The frontend knows where this stopped virtqueue is: what else is known of it is void."""
        ...

    async def enable_ring(self, index: int, enabled: bool) -> None:
        """Let a running virtqueue carry frames, or have it discard them."""
        ...

    def set_call(self, index: int, fd: int, old: int) -> None:
        """Notify the driver of a running virtqueue through another descriptor from now on.

        `old` is the one so far, or -1. It is the datapath's now, which closes it when nobody
        signals through it any more: its number may belong to another file then.
        """
        ...

    def signal(self, fd: int) -> None:
        """Signal an eventfd of the frontend. Never waits, even if that made it a blocking one."""
        ...

    def use_iotlb(self, on: bool) -> None:
        """Whether rings that start from now on have I/O virtual addresses."""
        ...

    def iotlb_update(self, iova: int, size: int, uva: int, access: int) -> None:
        """Map a range of I/O virtual addresses (`access` 1 to read, 2 to write). DatapathError."""
        ...

    async def iotlb_invalidate(self, iova: int, size: int) -> None:
        """Forget a range: no worker uses it any more when this returns."""
        ...

    @property
    def has_postcopy(self) -> bool:
        """Whether `advise_postcopy` can be expected to work here."""
        ...

    async def advise_postcopy(self) -> int:
        """Get ready for memory that comes late; the userfaultfd for the frontend.

        The descriptor stays the datapath's, until `end_postcopy`. Raises DatapathError.
        """
        ...

    def listen_postcopy(self) -> None:
        """Parts of the memory that is mapped from now on may be missing: nobody touches those.

        Rings start as ever, and run when their own memory has come. With I/O virtual addresses they
        raise TranslationPending until the end of postcopy.
        """
        ...

    async def fault_base(self, region: MemRegion, fd: int) -> int:
        """The user address that missing pages of a mapped region are reported by. DatapathError.

        `fd` may be closed afterwards.
        """
        ...

    def allow_faults(self, allowed: bool) -> None:
        """Whether missing pages may be asked for: the frontend knows all regions' addresses."""
        ...

    async def end_postcopy(self) -> None:
        """Nothing is missing any more; no ring may be running. Harmless without postcopy."""
        ...

    def ask_again(self) -> None:
        """There is a new way to ask the frontend; what was asked before may have got lost."""
        ...
