"""Requests about guest memory: which there is, what is in flight in it, what was written to it."""

from __future__ import annotations

from vswitch.vhost_user import protocol
from vswitch.vhost_user.connection import Message
from vswitch.vhost_user.datapath import DatapathError
from vswitch.vhost_user.descriptors import close_fd
from vswitch.vhost_user.postcopy_requests import Postcopy, PostcopyRequests
from vswitch.vhost_user.protocol import MalformedError, MemRegion, Request
from vswitch.vhost_user.vring import Vring, check_eventfd


class MemoryRequests(PostcopyRequests):
    """SET_MEM_TABLE and memory slots, INFLIGHT_SHMFD, LOG_SHMFD."""

    # Memory

    async def _set_mem_table(self, message: Message) -> bytes | None:
        regions = protocol.decode_mem_table(message.payload)
        if len(regions) != len(message.fds):
            raise MalformedError(
                f"SET_MEM_TABLE: {len(regions)} regions came with {len(message.fds)} "
                "file descriptors"
            )
        running = await self._stop(self._running())
        self.regions = []
        self._repeated.clear()
        await self._memory_comes()
        await self._datapath.set_memory(regions, message.fds)
        answer = None
        if self._postcopy is Postcopy.LISTENING:
            # As long as what it answers: QEMU compares.
            try:
                bases = await self._with_bases(regions, message.fds)
            except DatapathError:
                await self._datapath.set_memory([], [])
                raise
            answer = protocol.encode_mem_table(bases).ljust(len(message.payload), b"\0")
        self.regions = regions
        stopped = [vring for vring in self.vrings.values() if vring.homeless]
        await self._start_again(running + stopped)
        # Some frontends set up rings first.
        await self._start(
            [v for v in self.vrings.values() if v.complete and not v.started and not v.homeless]
        )
        return answer

    async def _get_max_mem_slots(self, _: Message) -> bytes:
        return protocol.encode_u64(self._datapath.memory_slots)

    async def _add_mem_reg(self, message: Message) -> bytes | None:
        region = protocol.decode_mem_region(message.payload)
        if region in self.regions:
            # QEMU before 9.0 says everything once for each queue pair, and so it will take back.
            known = _identity(region)
            if known not in self._repeated and len(self._repeated) >= self._datapath.memory_slots:
                raise DatapathError("more regions were said twice than there are memory slots")
            self._repeated[known] += 1
            await self._memory_comes()
            return await self._base(region, message)
        await self._memory_comes()
        await self._datapath.add_memory(region, message.fds[0])
        self.regions.append(region)
        waiting: list[Vring] = []
        try:
            answer = await self._base(region, message)
            # Those that wait for this: not set up before there was memory, or stopped with it.
            waiting = [vring for vring in self.vrings.values() if self._is_waiting(vring)]
            await self._start(waiting)
        except DatapathError:
            # Who is refused a region does not take it away again.
            await self._stop(waiting)
            await self._datapath.remove_memory(region)
            self.regions.remove(region)
            raise
        return answer

    async def _base(self, region: MemRegion, message: Message) -> bytes | None:
        """The answer to ADD_MEM_REG in postcopy."""
        if self._postcopy is not Postcopy.LISTENING:
            return None
        [based] = await self._with_bases([region], message.fds)
        answer = self._answered[region] = protocol.encode_mem_region(based)
        return answer

    async def _rem_mem_reg(self, message: Message) -> None:
        wanted = _identity(protocol.decode_mem_region(message.payload))
        for region in self.regions:
            if _identity(region) == wanted:
                break
        else:
            if self._repeated[wanted] == 0:
                gpa, size, uva = wanted
                raise DatapathError(
                    f"no region with guest address {gpa:#x}, size {size:#x} "
                    f"and user address {uva:#x}"
                )
            self._repeated[wanted] -= 1
            if not self._repeated[wanted]:
                del self._repeated[wanted]
            return
        # QEMU takes a region away and adds a part of it when the guest's memory layout changes: the
        # rings in it stop, and go on as soon as all of their memory is there again.
        # Behind an IOMMU these are no user addresses, and the datapath sees to it.
        await self._stop(
            [
                vring
                for vring in self._running()
                if not self.behind_iommu
                and any(
                    uva < region.uva + region.size and region.uva < uva + length
                    for uva, length in vring.areas(self.features)
                )
            ]
        )
        await self._datapath.remove_memory(region)
        self.regions.remove(region)

    # What is in flight

    async def _get_inflight_fd(self, message: Message) -> None:
        """The reply carries a descriptor, so it is sent from here."""
        asked = protocol.decode_inflight(message.payload)
        fd, size = self._datapath.make_inflight()
        try:
            answer = asked._replace(mmap_size=size, mmap_offset=0)
            await self._reply(Request.GET_INFLIGHT_FD, protocol.encode_inflight(answer), [fd])
        finally:
            close_fd(fd)

    async def _set_inflight_fd(self, message: Message) -> None:
        told = protocol.decode_inflight(message.payload)
        running = await self._stop(self._running())
        self._datapath.use_inflight(message.fds[0], told.mmap_size, told.mmap_offset)
        await self._start(running)

    # Dirty page logging

    async def _set_log_base(self, message: Message) -> bytes | None:
        area = protocol.decode_log(message.payload)
        await self._datapath.set_dirty_log(message.fds[0], area)
        # With LOG_SHMFD there is always a reply. QEMU sends no NEED_REPLY here and waits for one
        # all the same, whose payload nobody has defined: others send none.
        return None if self._wants_ack(message) else b""

    async def _set_log_fd(self, message: Message) -> None:
        check_eventfd("SET_LOG_FD", message.fds[0])
        close_fd(self._log_fd)
        self._log_fd = message.take_fd()


def _identity(region: MemRegion) -> tuple[int, int, int]:
    """What REM_MEM_REG names a region by; the mmap offset is ignored."""
    return region.gpa, region.size, region.uva
