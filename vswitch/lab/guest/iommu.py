"""The virtual IOMMU of a software guest: what QEMU's does between a device and its guest.

The driver's addresses are I/O virtual. A thread answers the backend's misses, page by page; tests
unmap pages, protect them, and move them to other memory while the device uses them.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager

from vswitch.lab.guest.backend_requests import BackendRequests, Requested
from vswitch.lab.guest.errors import (
    BackendClosedError,
    BackendRefusedError,
    BackendTimeoutError,
    GuestError,
)
from vswitch.lab.guest.frontend import Frontend
from vswitch.lab.guest.memory import PAGE_LEN, GuestMemory
from vswitch.vhost_user import protocol
from vswitch.vhost_user.protocol import BackendRequest, IotlbEntry, IotlbType

GPA_OFFSET = 1 << 30
"""How far guest-physical addresses are above I/O virtual ones."""

READ, WRITE = 1, 2


class GuestIommu:
    """Page tables, by I/O virtual address, and the thread that looks them up for the backend."""

    def __init__(self, memory: GuestMemory) -> None:
        self.misses: list[IotlbEntry] = []
        """All that the backend asked for."""
        self.refused = 0
        """How many of them in vain."""
        self.access: dict[int, int] = {}
        """What may be done with a page, where it is not all: READ, WRITE or 0."""
        self._places: dict[int, int] = {}
        """Where in the files a page lies that was moved, as the address that was there first."""
        self._memory = memory
        self._frontend: Frontend | None = None
        self._requests: BackendRequests | None = None
        self._thread: threading.Thread | None = None
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._tables = threading.Condition()
        self.failure: Exception | None = None

    def connect(self, frontend: Frontend) -> None:
        """Answer the backend of this connection."""
        self.disconnect()
        self._frontend = frontend
        self._requests = BackendRequests()
        frontend.set_backend_req_fd(self._requests.theirs.fileno())
        self._thread = threading.Thread(target=self._run, args=(self._requests,), daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        return self._thread is not None

    def disconnect(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
            os.eventfd_read(self._stop_fd)
            self._thread = None
        if self._requests is not None:
            self._requests.close()
            self._requests = None

    def close(self) -> None:
        """Stop answering. What went wrong in the thread is raised here."""
        self.disconnect()
        os.close(self._stop_fd)
        if self.failure is not None:
            raise self.failure

    def hold(self) -> AbstractContextManager[object]:
        """Answer nothing as long as the context lasts."""
        return self._tables

    def wait_for_misses(self, iovas: Iterable[int], since: int = 0, timeout: float = 10.0) -> None:
        """Wait until the backend has asked for all these addresses' pages, and has its answers.

        Counts misses from the `since`th on. BackendTimeoutError when it does not ask.
        """
        wanted = {iova - iova % PAGE_LEN for iova in iovas}

        def all_asked() -> bool:
            return wanted <= {one.iova - one.iova % PAGE_LEN for one in self.misses[since:]}

        with self._tables:
            if not self._tables.wait_for(all_asked, timeout):
                raise BackendTimeoutError(f"no IOTLB miss for some of {len(wanted)} pages")

    def place(self, iova: int) -> int:
        """The address whose memory a page has: another one's after a `move`, else its own."""
        page = iova - iova % PAGE_LEN
        return self._places.get(page, page)

    def entry(self, iova: int) -> IotlbEntry:
        """The mapping of a page, as an update has it. GuestError where there is none."""
        page = iova - iova % PAGE_LEN
        uva = self._memory.uva(self.place(iova))
        access = self.access.get(page, READ | WRITE)
        return IotlbEntry(page, PAGE_LEN, uva, access, IotlbType.UPDATE)

    def invalidate(self, iova: int = 0, size: int = 0) -> None:
        """Make the backend forget a range (size 0: everything)."""
        self._talk(IotlbEntry(iova, size, 0, 0, IotlbType.INVALIDATE))

    def protect(self, iova: int, access: int) -> None:
        """Allow the device READ, WRITE, both or nothing in a page from now on."""
        page = iova - iova % PAGE_LEN
        with self._tables:
            self.access[page] = access
            self.invalidate(page, PAGE_LEN)

    def move(self, iova: int, place: int) -> None:
        """Give a page other memory, that which lay at `place`, an address nobody uses."""
        page = iova - iova % PAGE_LEN
        with self._tables:
            self.invalidate(page, PAGE_LEN)
            self._memory.move(page, place)
            self._places[page] = place

    def _talk(self, entry: IotlbEntry) -> None:
        if self._frontend is None:
            raise GuestError("this guest's IOMMU is not connected")
        self._frontend.iotlb_msg(entry)

    def _run(self, requests: BackendRequests) -> None:
        poll = select.poll()
        poll.register(requests.socket, select.POLLIN)
        poll.register(self._stop_fd, select.POLLIN)
        try:
            while not any(fd == self._stop_fd for fd, _ in poll.poll()):
                requests.take(self._answer)
        except (BackendClosedError, ConnectionError):
            pass  # the connection ended: the guest's own thread tells
        except Exception as error:
            self.failure = error

    def _answer(self, requested: Requested) -> int:
        if requested.request is not BackendRequest.IOTLB_MSG:
            raise BackendRefusedError(f"the backend sent {requested.request.name}")
        miss = protocol.decode_iotlb(requested.payload)
        if miss.type is not IotlbType.MISS:
            raise BackendRefusedError(f"the backend sent an IOTLB message of type {miss.type}")
        with self._tables:
            try:
                entry = self.entry(miss.iova)
            except GuestError:
                entry = IotlbEntry(miss.iova, 0, 0, 0, IotlbType.UPDATE)
            if refused := miss.access & ~entry.access:
                self.refused += 1
            else:
                self._talk(entry)
            self.misses.append(miss)
            self._tables.notify_all()
        return refused
