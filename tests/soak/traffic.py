"""Frames that say who sent them, to whom, as the how manyth, and whether they are whole; and the
guests that send and check them."""

from __future__ import annotations

import struct
import time
import zlib
from random import Random
from typing import Any

from vswitch import ethertypes
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.guest.options import by_subject
from vswitch.lab.guest.packets import format_mac

ETHERTYPE = ethertypes.wire(ethertypes.EXPERIMENT)
HEAD = struct.Struct("<6s6s2sIHHQI")  # addresses, type, life, sender, addressee, number, CRC-32
CRC_AT = HEAD.size - 4
SIZES = (60, 64, 128, 300, 600, 1514)
FILLER = Random(7).randbytes(4096)
DEADLINE_S = 60.0


class SoakError(AssertionError):
    """Something was lost, doubled, changed, or came to the wrong one."""


def mac_of(number: int) -> bytes:
    return bytes((0x52, 0x54, 0, 0x50, number >> 8, number & 255))


def make_frame(life: int, sender: int, addressee: int, number: int, size: int) -> bytes:
    head = HEAD.pack(
        mac_of(addressee), mac_of(sender), ETHERTYPE, life, sender, addressee, number, 0
    )
    at = number * 31 % 2048
    body = FILLER[at : at + size - HEAD.size]
    crc = zlib.crc32(body, zlib.crc32(head))
    return head[:CRC_AT] + struct.pack("<I", crc) + body


class Station:
    """A guest at a port: `offered` frames so far, `received` ones, all of them checked.

    `life` tells it from all others there ever were. Whoever it hears from must count up.
    """

    def __init__(self, number: int, life: int, rng: Random, **options: Any) -> None:
        self.number, self.life = number, life
        self.name = f"s{number}"
        self.guest = SoftwareGuest(
            format_mac(mac_of(number)), polling=True, **by_subject(**options)
        )
        self.rng = rng
        self.numbers: dict[int, int] = {}
        self.heard: dict[tuple[int, int], int] = {}
        self.offered = 0
        self.given_up = 0
        """Frames that were offered and forgotten by a reboot before the switch took them."""
        self.received = 0

    @property
    def taken(self) -> int:
        """How many of its frames the switch has taken and given back, as far as this one looked."""
        queue = self.guest.transmitqs[0].ring
        queue.reap()
        return self.offered - self.given_up - queue.outstanding

    def send(self, addressee: int, count: int) -> int:
        """Offer so many frames, or fewer when there is no room; returns how many."""
        number = self.numbers.get(addressee, 0)
        frames = [
            make_frame(self.life, self.number, addressee, number + i, self.rng.choice(SIZES))
            for i in range(count)
        ]
        done = self.send_raw(frames)
        self.numbers[addressee] = number + done
        return done

    def send_raw(self, frames: list[bytes]) -> int:
        queue = self.guest.transmitqs[0]
        queue.ring.reap()
        done: int = queue.ring.send(frames)
        self.offered += done
        if done:
            queue.notify()
        return done

    def take(self) -> int:
        """Read and check what has come; returns how many frames."""
        total = 0
        while frames := self.guest.poll_frames(256):
            for frame in frames:
                self._check(frame)
            total += len(frames)
        self.received += total
        return total

    def _check(self, frame: bytes) -> None:
        if len(frame) < HEAD.size:
            raise SoakError(f"{self.name} got a frame of {len(frame)} bytes")
        dst, src, kind, life, sender, addressee, number, crc = HEAD.unpack_from(frame)
        body = frame[HEAD.size :]
        if zlib.crc32(body, zlib.crc32(frame[:CRC_AT] + bytes(4))) != crc or kind != ETHERTYPE:
            raise SoakError(f"{self.name} got a corrupt frame: {frame.hex()}")
        if (addressee, dst, src) != (self.number, mac_of(self.number), mac_of(sender)):
            raise SoakError(f"{self.name} got a frame from s{sender} to s{addressee}")
        last = self.heard.get((sender, life), -1)
        if number <= last:
            raise SoakError(f"{self.name} got frame {number} of s{sender} after {last}")
        self.heard[sender, life] = number

    def drain(self) -> None:
        """Wait until the switch has given back every frame."""
        deadline = time.monotonic() + DEADLINE_S
        queue = self.guest.transmitqs[0]
        while True:
            queue.ring.reap()
            if not queue.ring.outstanding:
                return
            if time.monotonic() > deadline:
                raise SoakError(f"{self.name}: {queue.ring.outstanding} frames are not given back")
            time.sleep(0)

    def reboot(self) -> None:
        """Stop the rings, take what had come until then, and begin with new ones."""
        self.guest.stop_rings()
        self.take()
        queue = self.guest.transmitqs[0].ring
        queue.reap()
        self.given_up += queue.outstanding
        self.guest.reboot_stopped()
