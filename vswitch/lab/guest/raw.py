"""Rings as plain bytes, for tests that misbehave: no check, no bookkeeping.

Whoever writes here goes behind the driver's back; the driver of the same queue should not be used
afterwards.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from vswitch.lab.guest.memory import GuestMemory

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1
DESC_LEN = 16

PACKED_F_AVAIL = 0x80
PACKED_F_USED = 0x8000
EVENT_FLAGS_ENABLE = 0
EVENT_FLAGS_DISABLE = 1
EVENT_FLAGS_DESC = 2
_ROUND = 0x8000
"""The wrap counter in a position."""

_DESC = struct.Struct("<QIHH")
_ELEM = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Where the three parts of a ring lie; `size` counts entries.

    Of a packed ring, `avail_gpa` is the driver event suppression structure and `used_gpa` the
    device's.
    """

    size: int
    desc_gpa: int
    avail_gpa: int
    used_gpa: int


class RawDesc(NamedTuple):
    """One descriptor (VIRTIO 1.2 section 2.7.5)."""

    addr: int
    len: int
    flags: int = 0
    next: int = 0


class RawRing:
    """Reads and writes every field of a split ring in guest memory."""

    def __init__(self, memory: GuestMemory, layout: RingLayout) -> None:
        self.memory = memory
        self.layout = layout

    def read_desc(self, index: int) -> RawDesc:
        return self.read_desc_at(self.layout.desc_gpa + DESC_LEN * index)

    def read_desc_at(self, gpa: int) -> RawDesc:
        """A descriptor anywhere in guest memory, as in an indirect table."""
        return RawDesc(*_DESC.unpack(self.memory.read(gpa, DESC_LEN)))

    def write_desc(self, index: int, desc: RawDesc) -> None:
        self.write_desc_at(self.layout.desc_gpa + DESC_LEN * index, desc)

    def write_desc_at(self, gpa: int, desc: RawDesc) -> None:
        """A descriptor anywhere in guest memory, as in an indirect table."""
        self.memory.write(gpa, _DESC.pack(*desc))

    @property
    def avail_flags(self) -> int:
        return self.memory.mapping.load_u16(self.layout.avail_gpa)

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self.memory.mapping.store_u16(self.layout.avail_gpa, value)

    @property
    def avail_idx(self) -> int:
        return self.memory.mapping.load_u16(self.layout.avail_gpa + 2)

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self.memory.mapping.store_u16(self.layout.avail_gpa + 2, value & 0xFFFF)

    def read_avail(self, idx: int) -> int:
        """The head at free-running index `idx`."""
        return self.memory.mapping.load_u16(self._avail_entry(idx))

    def write_avail(self, idx: int, head: int) -> None:
        """Put any 16-bit number where a head belongs; does not publish it."""
        self.memory.mapping.store_u16(self._avail_entry(idx), head & 0xFFFF)

    def _avail_entry(self, idx: int) -> int:
        return self.layout.avail_gpa + 4 + 2 * (idx % self.layout.size)

    @property
    def used_event(self) -> int:
        return self.memory.mapping.load_u16(self.layout.avail_gpa + 4 + 2 * self.layout.size)

    @used_event.setter
    def used_event(self, value: int) -> None:
        gpa = self.layout.avail_gpa + 4 + 2 * self.layout.size
        self.memory.mapping.store_u16(gpa, value & 0xFFFF)

    @property
    def used_flags(self) -> int:
        return self.memory.mapping.load_u16(self.layout.used_gpa)

    @property
    def used_idx(self) -> int:
        return self.memory.mapping.load_u16(self.layout.used_gpa + 2)

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self.memory.mapping.store_u16(self.layout.used_gpa + 2, value & 0xFFFF)

    def read_used(self, idx: int) -> tuple[int, int]:
        """(id, written length in bytes) at free-running index `idx`."""
        gpa = self.layout.used_gpa + 4 + 8 * (idx % self.layout.size)
        ident, length = _ELEM.unpack(self.memory.read(gpa, 8))
        return ident, length

    def write_used(self, idx: int, ident: int, length: int) -> None:
        """Overwrite a used element, which is the device's to write."""
        gpa = self.layout.used_gpa + 4 + 8 * (idx % self.layout.size)
        self.memory.write(gpa, _ELEM.pack(ident, length))

    @property
    def avail_event(self) -> int:
        return self.memory.mapping.load_u16(self.layout.used_gpa + 4 + 8 * self.layout.size)

    def offer(self, *chain: RawDesc, first: int = 0) -> int:
        """Lay `chain` into descriptors `first`, `first` + 1, ... and publish it.

        NEXT flags and links are added where they are missing. Returns the new avail.idx.
        """
        for i, desc in enumerate(chain):
            if i + 1 < len(chain) and not desc.flags & DESC_F_NEXT:
                desc = desc._replace(flags=desc.flags | DESC_F_NEXT, next=first + i + 1)
            self.write_desc(first + i, desc)
        idx = self.avail_idx
        self.write_avail(idx, first)
        self.avail_idx = idx + 1
        return (idx + 1) & 0xFFFF


class RawPackedDesc(NamedTuple):
    """One descriptor of a packed ring (VIRTIO 1.2 section 2.8.13), AVAIL and USED in the flags."""

    addr: int
    len: int
    id: int = 0
    flags: int = 0


class RawPackedRing:
    """Reads and writes every field of a packed ring in guest memory.

    `position` is where `offer` goes on, the wrap counter in bit 15.
    """

    def __init__(self, memory: GuestMemory, layout: RingLayout, position: int = _ROUND) -> None:
        self.memory = memory
        self.layout = layout
        self.position = position

    def read_desc(self, index: int) -> RawPackedDesc:
        return RawPackedDesc(*_DESC.unpack(self.memory.read(self._entry(index), DESC_LEN)))

    def write_desc(self, index: int, desc: RawPackedDesc) -> None:
        """A whole descriptor, its flags last."""
        gpa = self._entry(index)
        self.memory.write(gpa, _DESC.pack(*desc)[:14])
        self.memory.mapping.store_u16(gpa + 14, desc.flags)

    def write_desc_at(self, gpa: int, desc: RawPackedDesc) -> None:
        """A descriptor anywhere in guest memory, as in an indirect table."""
        self.memory.write(gpa, _DESC.pack(*desc))

    def _entry(self, index: int) -> int:
        return self.layout.desc_gpa + DESC_LEN * index

    def after(self, position: int, entries: int) -> int:
        """The position so many entries on."""
        at = (position & (_ROUND - 1)) + entries
        wrap = position & _ROUND
        while at >= self.layout.size:
            at -= self.layout.size
            wrap ^= _ROUND
        return at | wrap

    def available(self, position: int) -> int:
        """The flags that make the entry at a position available."""
        return PACKED_F_AVAIL if position & _ROUND else PACKED_F_USED

    def used(self, position: int) -> int:
        """The flags that mark the entry at a position as used."""
        return PACKED_F_AVAIL | PACKED_F_USED if position & _ROUND else 0

    def is_used(self, position: int) -> bool:
        both = PACKED_F_AVAIL | PACKED_F_USED
        at = position & (_ROUND - 1)
        flags = self.memory.mapping.load_u16(self._entry(at) + 14)
        return flags & both == self.used(position)

    def put(self, *entries: RawPackedDesc) -> None:
        """Make entries available at `position`, the first of them last; AVAIL and USED are added.

        `position` is moved past them.
        """
        places: list[tuple[int, RawPackedDesc]] = []
        position = self.position
        for desc in entries:
            flags = desc.flags | self.available(position)
            places.append((position & (_ROUND - 1), desc._replace(flags=flags)))
            position = self.after(position, 1)
        for at, desc in reversed(places):
            self.write_desc(at, desc)
        self.position = position

    def offer(self, *chain: RawDesc, id: int = 0) -> None:
        """Make a chain available at `position`: NEXT is added, `id` goes into every entry."""
        last = len(chain) - 1
        self.put(
            *(
                RawPackedDesc(d.addr, d.len, id, d.flags | (DESC_F_NEXT if i < last else 0))
                for i, d in enumerate(chain)
            )
        )

    def write_used(self, position: int, id: int, length: int) -> None:
        """Mark an entry as used, which is the device's to do."""
        flags = self.used(position) | (DESC_F_WRITE if length else 0)
        self.write_desc(position & (_ROUND - 1), RawPackedDesc(0, length, id, flags))

    @property
    def driver_event(self) -> tuple[int, int]:
        """Offset with its wrap counter in bit 15, and flags, of the driver event suppression."""
        load = self.memory.mapping.load_u16
        return load(self.layout.avail_gpa), load(self.layout.avail_gpa + 2)

    @property
    def device_event(self) -> tuple[int, int]:
        """The same of the device event suppression."""
        load = self.memory.mapping.load_u16
        return load(self.layout.used_gpa), load(self.layout.used_gpa + 2)

    @device_event.setter
    def device_event(self, value: tuple[int, int]) -> None:
        self.memory.mapping.store_u16(self.layout.used_gpa, value[0])
        self.memory.mapping.store_u16(self.layout.used_gpa + 2, value[1])
