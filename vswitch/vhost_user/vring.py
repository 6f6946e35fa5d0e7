"""What a frontend has said about one virtqueue, and the descriptors that belong to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from vswitch.relay.wire import Kind
from vswitch.vhost_user.datapath import RingLog, RingSetup, ring_areas
from vswitch.vhost_user.descriptors import close_fd, found_of
from vswitch.vhost_user.protocol import Feature, MalformedError


@dataclass(slots=True)
class Vring:
    """One virtqueue as set up by SET_VRING_*; descriptors are -1 where there is none."""

    index: int
    wanted: bool = False
    """What SET_VRING_ENABLE said last; it counts only with PROTOCOL_FEATURES, see `enabled`."""
    started: bool = False
    retired: bool = False
    """It was disabled after it had been enabled: its driver may be gone, with its memory."""
    homeless: bool = False
    """It ran, and lies in no memory of the present table: it waits for either to change."""
    size: int = 0
    desc_uva: int = 0
    used_uva: int = 0
    avail_uva: int = 0
    placed: bool = False
    """SET_VRING_ADDR has come."""
    log_gpa: int | None = None
    """Where writes to the used ring are logged, None if they are not to be."""
    base: int = 0
    kickable: bool = False
    """SET_VRING_KICK has come, with a descriptor or without."""
    kick_fd: int = -1
    call_fd: int = -1
    relayed: bool = False
    """`call_fd` is our own eventfd: calls are passed on as messages."""
    callable: bool = False
    """SET_VRING_CALL has come, with a descriptor or without."""
    err_fd: int = -1

    @property
    def complete(self) -> bool:
        """Nothing is missing for it to run, save memory."""
        return self.size > 0 and self.placed and self.kickable

    def enabled(self, features: Feature) -> bool:
        """ "Ring states": without PROTOCOL_FEATURES rings are enabled from their start.

        QEMU sends SET_VRING_ENABLE before SET_FEATURES, so what it said is kept until it counts.
        """
        return self.wanted or Feature.PROTOCOL_FEATURES not in features

    def areas(self, features: Feature) -> list[tuple[int, int]]:
        """User address and length in bytes of each of its parts."""
        packed = Feature.RING_PACKED in features
        return ring_areas(packed, self.size, self.desc_uva, self.avail_uva, self.used_uva)

    def setup(self, features: Feature) -> RingSetup:
        return RingSetup(
            size=self.size,
            desc_uva=self.desc_uva,
            used_uva=self.used_uva,
            avail_uva=self.avail_uva,
            base=self.base,
            features=features,
            enabled=self.enabled(features),
            kick_fd=self.kick_fd,
            call_fd=self.call_fd,
            logged=self.logged(features),
            quiet=self.retired and not self.enabled(features),
        )

    def logged(self, features: Feature) -> RingLog | None:
        """What is to be logged of it."""
        return RingLog(self.log_gpa) if Feature.LOG_ALL in features else None

    def forget_kick(self) -> None:
        """As after GET_VRING_BASE: the ring needs a new SET_VRING_KICK to start again."""
        self.kickable = self.retired = self.homeless = False
        self.kick_fd = close_fd(self.kick_fd)

    def reset(self) -> None:
        """As if nothing had been said of it, except for where to signal calls and errors.

        QEMU says that once a connection, not once a start of the device. `base` stays too: QEMU 7.2
        sets status 0 first and asks for it then.
        """
        self.forget_kick()
        self.wanted = self.placed = False
        self.log_gpa = None
        self.size = self.desc_uva = self.used_uva = self.avail_uva = 0

    def stop_relaying(self) -> None:
        """Calls are no longer messages; the eventfd stays, to be closed."""
        if self.relayed:
            asyncio.get_running_loop().remove_reader(self.call_fd)
            self.relayed = False

    def close(self) -> None:
        self.stop_relaying()
        self.kickable = self.callable = False
        self.kick_fd = close_fd(self.kick_fd)
        self.call_fd = close_fd(self.call_fd)
        self.err_fd = close_fd(self.err_fd)


def check_eventfd(name: str, fd: int) -> None:
    """Raise MalformedError unless `fd` is an eventfd.

    A worker signals it or waits for it: a pipe or a file would fail there. Whether it blocks is the
    frontend's to say, at any time, and does not matter (`Datapath.signal`).
    """
    found = found_of(fd)
    if found is None or found.kind is not Kind.EVENTFD:
        what = "of an unknown kind" if found is None else found.text
        raise MalformedError(f"{name}: the file descriptor is no eventfd but {what}")
