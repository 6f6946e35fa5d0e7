"""What a vhost-user device is made of, and how its rings start and stop.

`MemoryRequests`, `RingRequests` and `Backend` build on it; each takes a part of the messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable

from vswitch.errors import ProtocolError
from vswitch.relay.link import Link
from vswitch.vhost_user import protocol
from vswitch.vhost_user.backend_channel import BackendChannel
from vswitch.vhost_user.connection import Connection, Message
from vswitch.vhost_user.datapath import Datapath, DatapathError, TranslationPending
from vswitch.vhost_user.descriptors import close_fd
from vswitch.vhost_user.pace import Pace
from vswitch.vhost_user.protocol import (
    FLAG_REPLY,
    BackendRequest,
    Feature,
    MalformedError,
    MemRegion,
    ProtocolFeature,
    VringState,
)
from vswitch.vhost_user.vring import Vring


class Device:
    """The state of one port's device, for as long as one frontend is connected.

    It has `virtqueues` at most. `changed` is called, without arguments, whenever rings start or
    stop.
    """

    def __init__(
        self,
        name: str,
        connection: Connection,
        datapath: Datapath,
        virtqueues: int,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.connection = connection
        self.virtqueues = virtqueues
        self.features = Feature(0)
        self.protocol_features = ProtocolFeature(0)
        self.regions: list[MemRegion] = []
        self.vrings: dict[int, Vring] = {}
        self.has_run = False
        """Whether a ring has ever started."""
        self._channel: BackendChannel | None = None
        self._log_fd = -1
        self._repeated: Counter[tuple[int, int, int]] = Counter()
        self._translates = True
        self._datapath = datapath
        self._changed = changed
        self._log = logging.getLogger("vswitch.vhost_user")
        self._name = name

    @property
    def peer_pid(self) -> int | None:
        return self.connection.peer_pid

    @property
    def link(self) -> Link:
        return self.connection.link

    @property
    def has_placed(self) -> bool:
        return any(vring.placed for vring in self.vrings.values())

    def signal_error(self, index: int) -> None:
        """Tell the frontend that a virtqueue is broken (SET_VRING_ERR, BACKEND_VRING_ERR)."""
        vring = self.vrings.get(index)
        if vring is None:
            return
        if vring.err_fd < 0 and self._inband and self._channel is not None:
            self._channel.post(BackendRequest.VRING_ERR, one_vring(index))
        self._signal(vring.err_fd)

    def _signal(self, fd: int) -> None:
        if fd >= 0:
            self._datapath.signal(fd)

    def _wants_ack(self, message: Message) -> bool:
        return message.header.need_reply and ProtocolFeature.REPLY_ACK in self.protocol_features

    async def _reply(self, request: int, payload: bytes, fds: list[int] | None = None) -> None:
        try:
            await self.connection.send(protocol.encode(request, payload, flags=FLAG_REPLY), fds)
        except ConnectionError as exc:
            raise ProtocolError("the frontend went away without its reply") from exc

    @property
    def behind_iommu(self) -> bool:
        """Whether addresses are I/O virtual.

        A frontend that negotiated ACCESS_PLATFORM and has no channel to be asked by cannot mean
        that: some pass the bit on for guests whose memory is protected, and translate nothing. Of
        others that is known from their name.
        """
        return (
            self._translates
            and Feature.ACCESS_PLATFORM in self.features
            and ProtocolFeature.BACKEND_REQ in self.protocol_features
        )

    # Rings

    def _vring(self, name: str, index: int) -> Vring:
        if index >= self.virtqueues:
            raise MalformedError(
                f"{name}: vring index {index}, the port has {self.virtqueues} vrings"
            )
        if index not in self.vrings:
            self.vrings[index] = Vring(index)
        return self.vrings[index]

    def _running(self) -> list[Vring]:
        return [vring for vring in self.vrings.values() if vring.started]

    async def _change(self, vring: Vring, **new: int) -> None:
        """Change what a ring runs with; a running ring is stopped for that and goes on."""
        running = await self._stop([vring])
        for name, value in new.items():
            setattr(vring, name, value)
        if "size" in new and (running or vring.homeless):
            await self._start_again([vring])  # its addresses may be about to change as well
        elif running or (vring.complete and self.regions):
            await self._start([vring])

    def _is_waiting(self, vring: Vring) -> bool:
        """Whether a stopped ring has all it needs to run, its memory included.

        Behind an IOMMU the datapath knows, and says.
        """
        if not vring.complete or vring.started or not self.regions:
            return False
        return self._has_memory(vring)

    def _has_memory(self, vring: Vring) -> bool:
        """Whether the memory table holds all of a ring, as far as that is to be seen from here."""
        return self.behind_iommu or all(
            any(r.uva <= uva and uva + length <= r.uva + r.size for r in self.regions)
            for uva, length in vring.areas(self.features)
        )

    async def _start_again(self, vrings: list[Vring]) -> None:
        """Let rings go on that ran before a change, those that still lie in memory.

        Others wait: a driver that is set up anew gives memory, sizes, bases and addresses in any
        order, and between two messages a ring may be nowhere.
        """
        for vring in vrings:
            vring.homeless = not self._has_memory(vring)
        await self._start([vring for vring in vrings if not vring.homeless])

    async def _start(self, vrings: list[Vring]) -> None:
        if vrings:
            self._datapath.use_iotlb(self.behind_iommu)
        pace = Pace()
        for vring in vrings:
            await pace.step()  # a port may have 256 of them
            if self._inband and not vring.callable and not vring.relayed:
                self._relay_calls(vring)
            setup = vring.setup(self.features)
            # Before, not after: whoever is cancelled in the call has to stop it again.
            vring.started, vring.homeless = True, False
            try:
                base = await self._datapath.start_ring(vring.index, setup)
            except TranslationPending:
                vring.started = False
                continue
            except DatapathError:
                vring.started = False
                raise
            if base & 0xFFFF != vring.base & 0xFFFF:
                self._log.info(
                    "port %s: vring %d goes on from %d, where the used ring is, not from %d",
                    self._name, vring.index, base, vring.base,
                )  # fmt: skip
            vring.base = base
            self.has_run = True
            # The driver may wait for what happened before: to be woken once too often is harmless.
            if not setup.quiet:
                self._signal(vring.call_fd)
        if vrings:
            self._changed()

    async def _stop(self, vrings: list[Vring]) -> list[Vring]:
        """Stop those that run and note where; returns them."""
        running = [vring for vring in vrings if vring.started]
        if not running:
            return []
        bases = await self._datapath.stop_rings([vring.index for vring in running])
        for vring, base in zip(running, bases, strict=True):
            vring.started = False
            vring.base = base
        if Feature.LOG_ALL in self.features:
            self._signal(self._log_fd)
        self._changed()
        return running

    async def _release(self) -> None:
        await self._stop(self._running())
        for vring in self.vrings.values():
            vring.close()
        self.vrings.clear()
        self.regions = []
        self._log_fd = close_fd(self._log_fd)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        await self._datapath.set_memory([], [])

    # In-band notifications

    @property
    def _inband(self) -> bool:
        return ProtocolFeature.INBAND_NOTIFICATIONS in self.protocol_features

    def _relay_calls(self, vring: Vring) -> None:
        """Give a ring without SET_VRING_CALL an eventfd that becomes BACKEND_VRING_CALL."""
        vring.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        vring.relayed = True
        asyncio.get_running_loop().add_reader(vring.call_fd, self._pass_call_on, vring)

    def _pass_call_on(self, vring: Vring) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(vring.call_fd)
        if self._channel is not None:
            self._channel.post(BackendRequest.VRING_CALL, one_vring(vring.index))


def one_vring(index: int) -> bytes:
    """The payload of a notification about a vring; its number is reserved."""
    return protocol.encode_vring_state(VringState(index, 0))
