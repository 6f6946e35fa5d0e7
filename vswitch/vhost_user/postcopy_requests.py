"""Requests about postcopy migration: the guest runs before its memory has come (PAGEFAULT)."""

from __future__ import annotations

import enum

from vswitch.vhost_user import protocol
from vswitch.vhost_user.connection import Message
from vswitch.vhost_user.datapath import DatapathError
from vswitch.vhost_user.device import Device
from vswitch.vhost_user.protocol import MalformedError, MemRegion, Request

_ACKNOWLEDGING = {0, Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.REM_MEM_REG}
"""How a frontend calls the message by which it says that it knows all regions. QEMU leaves in it
what it sent last, and 0 if that was nothing."""
_ADVICES_MAX = 256
"""More than there are queue pairs, for each of which QEMU says everything."""


class Postcopy(enum.Enum):
    """How far it has gone."""

    OFF = enum.auto()
    ADVISED = enum.auto()
    """It may come."""
    LISTENING = enum.auto()
    """Pages may be missing from now on."""


class PostcopyRequests(Device):
    """POSTCOPY_ADVISE, LISTEN and END, and what is different between the last two."""

    _postcopy = Postcopy.OFF
    _advices = 0
    """How often POSTCOPY_ADVISE came, and so how often the others will."""
    _late_ends = 0
    """POSTCOPY_ENDs that are still to come after the first."""
    _awaits_ack = False
    """Regions were answered with their addresses; the frontend has not said that it has them."""
    _answered: dict[MemRegion, bytes]
    """What each ADD_MEM_REG was answered with since POSTCOPY_LISTEN."""

    async def _postcopy_advise(self, _: Message) -> None:
        """The reply carries the userfaultfd, so it is sent from here; none if there is none."""
        uffd: list[int] = []
        try:
            if self._postcopy is Postcopy.LISTENING:
                raise DatapathError("it comes after POSTCOPY_LISTEN and before POSTCOPY_END")
            if self._advices >= _ADVICES_MAX:
                raise DatapathError(f"it came {_ADVICES_MAX} times already")
            # The descriptor of the last one counts: QEMU's last is that of the queue pair which is
            # the first to give memory.
            await self._leave_postcopy()
            uffd.append(await self._datapath.advise_postcopy())
            self._postcopy = Postcopy.ADVISED
            self._advices += 1
        except DatapathError as exc:
            self._log.error("port %s: POSTCOPY_ADVISE: %s", self._name, exc)
        await self._reply(Request.POSTCOPY_ADVISE, b"", uffd)

    async def _postcopy_listen(self, _: Message) -> None:
        if self._postcopy is Postcopy.OFF:
            raise DatapathError("there was no POSTCOPY_ADVISE before it")
        if self._postcopy is Postcopy.LISTENING:
            return
        if self.regions:
            raise DatapathError(
                f"{len(self.regions)} memory regions were given before it, none may be"
            )
        self._datapath.listen_postcopy()
        self._postcopy = Postcopy.LISTENING
        self._answered = {}

    async def _postcopy_end(self, _: Message) -> bytes:
        if self._postcopy is Postcopy.LISTENING:
            # All memory is there: rings go on with it as any others.
            running = await self._stop(self._running())
            await self._leave_postcopy()
            await self._start(running)
            # Those that had to wait for this, see Datapath.listen_postcopy.
            await self._start([vring for vring in self.vrings.values() if self._is_waiting(vring)])
            self._late_ends, self._advices = self._advices - 1, 0
        elif self._late_ends:
            self._late_ends -= 1
        else:
            self._log.error("port %s: POSTCOPY_END: there was no POSTCOPY_LISTEN", self._name)
            return protocol.encode_u64(1)
        return protocol.encode_u64(0)

    async def _leave_postcopy(self) -> None:
        """No ring may be running."""
        if self._postcopy is not Postcopy.OFF:
            self._postcopy = Postcopy.OFF
            self._awaits_ack = False
            await self._datapath.end_postcopy()

    async def _release(self) -> None:
        await self._stop(self._running())
        await self._leave_postcopy()
        await super()._release()

    # Answers ahead of their requests, which a type of device may have to give, see net.py

    async def _pay_ahead(self, request: Request) -> None:
        """After each request: answer what its frontend waits for and has not sent."""

    def _was_paid(self, answer: bytes) -> bool:  # noqa: ARG002
        """Whether an answer was sent ahead; it counts once."""
        return False

    # Memory

    async def _memory_comes(self) -> None:
        """Before a region is added or all are replaced."""
        if self._postcopy is Postcopy.ADVISED:
            # The guest runs, and nobody has said that anything is missing: it came by precopy.
            await self._leave_postcopy()
            self._advices = 0
        elif self._postcopy is Postcopy.LISTENING:
            self._datapath.allow_faults(False)

    async def _with_bases(self, regions: list[MemRegion], fds: list[int]) -> list[MemRegion]:
        """Regions as they are answered in postcopy: with addresses of faults for those of users."""
        found = []
        for region, fd in zip(regions, fds, strict=True):
            found.append(region._replace(uva=await self._datapath.fault_base(region, fd)))
        self._awaits_ack = True
        return found

    def _take_ack(self, message: Message) -> bool:
        """Whether a message is not what it says, but that the frontend knows all addresses now."""
        number, _, size = message.header
        if (
            self._postcopy is not Postcopy.LISTENING
            or number not in _ACKNOWLEDGING
            or size not in (0, 8)
            or message.fds
            # A table without regions looks the same.
            or (number == Request.SET_MEM_TABLE and not self._awaits_ack)
        ):
            return False
        value = protocol.decode_u64(message.payload) if size else 0
        if value:
            raise MalformedError(
                f"{protocol.request_name(number)}: the acknowledgement of addresses in postcopy "
                f"is u64 {value:#x}, not 0"
            )
        self._awaits_ack = False
        self._datapath.allow_faults(True)
        return True
