"""The frontend's side of dirty page logging: what a hypervisor does while a guest migrates."""

from __future__ import annotations

import mmap
import os

from tests.native.bitmaps import fetch_and_clear
from vswitch.lab.guest.guest import SoftwareGuest
from vswitch.vhost_user.protocol import VRING_F_LOG, Feature

PAGE_LEN = 4096


class DirtyLog:
    """A bitmap of the guest's written pages, shared with the backend while `start`ed.

    `size` and `offset` (bytes) place it in its file; by default it covers all guest memory.
    """

    def __init__(self, guest: SoftwareGuest, *, size: int | None = None, offset: int = 0) -> None:
        self.guest = guest
        highest = guest.memory.gpa_offset + max(r.gpa + r.size for r in guest.memory.regions)
        # Whole words, as `fetch` reads them.
        self.size = 8 * -(-highest // (64 * PAGE_LEN)) if size is None else size
        self.offset = offset
        self.fd = os.memfd_create("vswitch-guest-log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, offset + self.size)
        self._map = mmap.mmap(self.fd, offset + self.size)

    def start(self) -> None:
        """As QEMU does at the beginning of a migration, with rings that go on."""
        frontend = self.guest.frontend
        frontend.set_log_base(self.fd, self.size, self.offset)
        frontend.set_features(self.guest.features | Feature.LOG_ALL)
        self._log_rings(VRING_F_LOG)

    def stop(self) -> None:
        """No more logging, as at the end of a migration that was given up."""
        self.guest.frontend.set_features(self.guest.features)
        self._log_rings(0)
        self.guest.frontend.sync()

    def _log_rings(self, flags: int) -> None:
        for queue in self.guest.queues():
            address = self.guest.vring_addr(queue)
            self.guest.frontend.set_vring_addr(
                address._replace(flags=flags, log_gpa=queue.layout.used_gpa)
            )

    def pages(self) -> set[int]:
        """Numbers of the pages that are marked; behind an IOMMU, as the driver has them."""
        found = set()
        for at, byte in enumerate(self._map[self.offset :]):
            if byte:
                found |= {8 * at + bit for bit in range(8) if byte >> bit & 1}
        return {page - self.guest.memory.gpa_offset // PAGE_LEN for page in found}

    def fetch(self) -> list[int]:
        """The same, and they are marked no more: what a hypervisor does again and again.

        Nothing is lost that the backend marks meanwhile. For a log of whole words.
        """
        with memoryview(self._map) as whole, whole[self.offset :] as bits:
            found = fetch_and_clear(bits)
        return [page - self.guest.memory.gpa_offset // PAGE_LEN for page in found]

    def clear(self) -> None:
        self._map[:] = bytes(len(self._map))

    def outside(self) -> bytes:
        """What lies in the file before the log; nobody is to write there."""
        return self._map[: self.offset]

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)
