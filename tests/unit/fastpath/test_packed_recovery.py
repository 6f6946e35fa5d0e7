"""Where a packed ring goes on after its switch was killed: the memory that it left, made by hand.

A driver and a device are played over random histories up to a random store of the device.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.unit.fastpath.test_engine import DESC, SIZE, UVA, guest_file, start
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.journal import SLOT_LEN, Journal
from vswitch.fastpath.main.mapping import Memory
from vswitch.fastpath.main.ring import Ring

RINGS = 256
IDENTITY = 77
AVAIL, USED = 0x80, 0x8000
NONE = 0xFFFF
_BATCH_LEN = 8 + 8 * 1024
Chain = tuple[int, int, int]
"""Buffer id, ring entries, written length."""


class PackedRing:
    """Both sides of a packed ring in guest memory, and its notes, as the switch makes them."""

    def __init__(self, memory: mmap.mmap, notes: mmap.mmap, index: int, size: int) -> None:
        self.memory, self.notes, self.slot, self.size = memory, notes, SLOT_LEN * index, size
        self.avail = self.used = (0, 1)
        self.free = size
        self.ids = 0
        self.waiting: deque[Chain] = deque()
        self.given_back: deque[Chain] = deque()
        self.last = (NONE, 0)
        self.current = 0
        self.told = 0x8000
        """Where the frontend says that the ring is: position, and wrap counter in bit 15."""
        memory[: 16 * size] = bytes(16 * size)
        self.note([])

    def step(self, position: tuple[int, int], entries: int) -> tuple[int, int]:
        at, wrap = position[0] + entries, position[1]
        return (at - self.size, wrap ^ 1) if at >= self.size else (at, wrap)

    def write(self, position: tuple[int, int], addr: int, length: int, id: int, flags: int) -> None:
        struct.pack_into("<QIHH", self.memory, 16 * position[0], addr, length, id, flags)

    def offer(self, entries: int) -> None:
        """The driver makes a chain available."""
        self.ids = (self.ids + 1) % 60000
        for i in range(entries):
            flags = (AVAIL if self.avail[1] else USED) | int(i + 1 < entries)
            self.write(self.avail, 0x1000, 64, self.ids, flags)
            self.avail = self.step(self.avail, 1)
        self.waiting.append((self.ids, entries, self.ids % 3))
        self.free -= entries

    def reap(self) -> None:
        self.free += self.given_back.popleft()[1]

    def note(self, chains: list[Chain]) -> None:
        self.current ^= 1
        place = self.slot + 16 + _BATCH_LEN * self.current
        head = struct.pack("<HHBBH", len(chains), *self.used, self.last[1], self.last[0])
        self.notes[place : place + 8] = head
        for i, (id, entries, length) in enumerate(chains):
            struct.pack_into("<HHI", self.notes, place + 8 + 8 * i, id, entries, length)
        struct.pack_into("<QIHH", self.notes, self.slot, IDENTITY, 0, self.current, self.told)

    def use(self, count: int, stores: int) -> None:
        """The device gives `count` chains back and is killed after so many stores of the ring."""
        chains = [self.waiting.popleft() for _ in range(count)]
        self.note(chains)
        places = []
        for _, entries, _ in chains:
            places.append(self.used)
            self.used = self.step(self.used, entries)
        self.last = places[-1]
        order = [*range(1, count), 0]
        for i in order[:stores]:
            self.write_used(places[i], chains[i])
        if stores >= count:
            self.given_back.extend(chains)
        self.batch = list(zip(places, chains, strict=True))

    def write_used(self, position: tuple[int, int], chain: Chain) -> None:
        flags = (AVAIL | USED if position[1] else 0) | (2 if chain[2] else 0)
        struct.pack_into("<IHH", self.memory, 16 * position[0] + 8, chain[2], chain[0], flags)

    @property
    def base(self) -> int:
        half = self.used[0] | self.used[1] << 15
        return half | half << 16


@contextmanager
def ring_at(index: int, size: int) -> Iterator[tuple[PackedRing, Ring, Memory]]:
    with guest_file() as fd:
        notes_fd = os.memfd_create("journal")
        try:
            os.truncate(notes_fd, RINGS * SLOT_LEN)
            memory = Memory([(0, SIZE, UVA, 0)], [fd])
            port = Engine(1).add_port("a")
            port.use_journal(Journal(RINGS, notes_fd))
            with mmap.mmap(fd, SIZE) as guest, mmap.mmap(notes_fd, 0) as notes:
                yield PackedRing(guest, notes, index, size), Ring(port, index), memory
        finally:
            os.close(notes_fd)


def restart(ring: Ring, memory: Memory, size: int, told: int = 0x80008000) -> int:
    """With the base that QEMU tells: that of a fresh ring, but for what it has dropped itself."""
    settings = {"size": size, "base": told, "packed": True, "identity": IDENTITY}
    base = start(ring, memory, desc_uva=DESC, **settings)
    ring.unpublish()
    ring.mark_stopped()
    return base


@pytest.mark.parametrize("size", [2, 3, 16, 100])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("longest", [1, 2, 5])
def test_any_history_and_any_end(size: int, index: int, longest: int) -> None:
    chance = random.Random(size * 10 + longest)
    longest = min(longest, size)
    with ring_at(index, size) as (model, ring, memory):
        for _ in range(1500):
            while model.free and (chance.random() < 0.9 or not model.waiting):
                entries = chance.randint(1, longest)
                if entries > model.free:
                    break
                model.offer(entries)
            if not model.waiting:
                continue
            count = chance.randint(1, min(len(model.waiting), 64))
            killed = chance.random() < 0.3
            model.use(count, chance.randint(0, count) if killed else count)
            if killed:
                assert restart(ring, memory, size) == model.base
                for position, chain in model.batch:
                    before = bytes(model.memory[16 * position[0] + 8 : 16 * position[0] + 16])
                    model.write_used(position, chain)
                    after = bytes(model.memory[16 * position[0] + 8 : 16 * position[0] + 16])
                    assert before == after
                # The new switch's notes; those of the old one are where it put them.
                current = struct.unpack_from("<H", model.notes, model.slot + 12)[0]
                model.current = current & 1
                missing = [chain for _, chain in model.batch if chain not in model.given_back]
                model.given_back.extend(missing)
            while model.given_back and chance.random() < 0.9:
                model.reap()
            while model.given_back and model.free == 0:
                model.reap()
            if chance.random() < 0.2:
                # At rest, with buffers posted anew as far as there is room.
                while model.given_back:
                    model.reap()
                while model.free >= longest:
                    model.offer(chance.randint(1, longest))
                assert restart(ring, memory, size) == model.base
                model.current = struct.unpack_from("<H", model.notes, model.slot + 12)[0] & 1


@pytest.mark.parametrize("size", [2, 16, 100])
def test_a_fresh_ring_in_the_same_place(size: int) -> None:
    """After a reboot while no switch ran, whatever the notes say, it begins at its beginning."""
    chance = random.Random(size)
    with ring_at(1, size) as (model, ring, memory):
        for _ in range(200):
            for _ in range(chance.randint(0, 5 * size)):
                model.offer(1)
                model.use(1, 1)
                model.reap()
            notes = model.notes[model.slot : model.slot + SLOT_LEN]
            fresh = PackedRing(model.memory, model.notes, 1, size)
            # That wrote the notes of a fresh ring; put the old ones in force again.
            fresh.notes[fresh.slot : fresh.slot + SLOT_LEN] = notes
            # With the same ids a batch at the very beginning could be taken for the old one.
            fresh.ids = (model.ids + 30000) % 60000
            for _ in range(chance.randint(0, size)):
                fresh.offer(1)
            assert restart(ring, memory, size) == fresh.base
            model = fresh
            model.current = struct.unpack_from("<H", model.notes, model.slot + 12)[0] & 1


class DroppingRing(PackedRing):
    """A transmitq that QEMU empties where it thinks that the ring is, while there is no switch."""

    def __init__(self, memory: mmap.mmap, notes: mmap.mmap, index: int, size: int) -> None:
        super().__init__(memory, notes, index, size)
        self.outstanding: deque[Chain] = deque()
        self.reaped = self.dropped = (0, 1)

    def offer(self, entries: int) -> None:
        super().offer(entries)
        self.outstanding.append(self.waiting[-1])

    def entry(self, at: int) -> tuple[int, bool, bool, bool]:
        """Buffer id, and whether AVAIL, USED and NEXT are set."""
        id, flags = struct.unpack_from("<HH", self.memory, 16 * at + 12)
        return id, bool(flags & AVAIL), bool(flags & USED), bool(flags & 1)

    def drop(self) -> int:
        """What QEMU's virtqueue_packed_drop_all() does; returns how many chains it took."""
        dropped = 0
        while True:
            at, wrap = self.dropped
            id, avail, used, more = self.entry(at)
            if avail != wrap or used == wrap:
                return dropped
            entries = 1
            while more:
                more = self.entry((at + entries) % self.size)[3]
                entries += 1
            self.write_used(self.dropped, (id, entries, 0))
            self.dropped = self.step(self.dropped, entries)
            dropped += 1

    def reap_used(self) -> None:
        """The driver takes back what the ring says was used, which must be in its order."""
        while self.outstanding:
            id, avail, used, _ = self.entry(self.reaped[0])
            if avail != self.reaped[1] or used != self.reaped[1]:
                return
            chain = self.outstanding.popleft()
            assert id == chain[0]
            self.free += chain[1]
            self.reaped = self.step(self.reaped, chain[1])

    def resume(self) -> None:
        """Go on as the switch would that was started: with its notes, behind what was used."""
        self.current = struct.unpack_from("<H", self.notes, self.slot + 12)[0] & 1
        place = self.slot + 16 + _BATCH_LEN * self.current
        _, _, _, last_wrap, last = struct.unpack_from("<HHBBH", self.notes, place)
        self.last = (last, last_wrap)
        self.used = self.reaped
        self.waiting = self.outstanding.copy()


@pytest.mark.parametrize("size", [2, 3, 16, 100])
@pytest.mark.parametrize("longest", [1, 2, 5])
def test_frames_that_qemu_dropped_meanwhile(size: int, longest: int) -> None:
    chance = random.Random(size * 10 + longest)
    longest = min(longest, size)
    dropped = 0
    with ring_at(1, size) as (plain, ring, memory):
        model = DroppingRing(plain.memory, plain.notes, 1, size)
        restart(ring, memory, size)
        model.resume()
        for _ in range(3000):
            while model.free and chance.random() < 0.9:
                entries = chance.randint(1, longest)
                if entries > model.free:
                    break
                model.offer(entries)
            count = chance.randint(0, min(len(model.waiting), 64))
            killed = chance.random() < 0.3
            if count:
                model.use(count, chance.randint(0, count) if killed else count)
            if killed:
                dropped += model.drop()
                model.told = model.dropped[0] | model.dropped[1] << 15
                base = restart(ring, memory, size, model.told | model.told << 16)
                model.reap_used()
                # The driver waits for nothing that the switch does not see as its next.
                half = model.reaped[0] | model.reaped[1] << 15
                assert base == half | half << 16
                at = model.reaped
                for _, entries, _ in model.outstanding:
                    _, avail, used, _ = model.entry(at[0])
                    assert (avail, used) == (at[1], not at[1])
                    at = model.step(at, entries)
                model.resume()
            elif chance.random() < 0.9:
                model.reap_used()
    assert dropped > 100
