"""A split ring as plain bytes, for tests that misbehave: no check, no bookkeeping.

Whoever writes here goes behind the driver's back; the driver of the same queue should not be used
afterwards.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from vswitch.guest.memory import GuestMemory

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1
DESC_LEN = 16

_DESC = struct.Struct("<QIHH")
_ELEM = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Where the three parts of a split ring lie; `size` counts entries."""

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
