"""What the switch and its relay say to each other, as in wire.h."""

from __future__ import annotations

import enum
import struct

MAX_FDS = 8
"""Descriptors that are passed on with one piece of a message."""
FDS_UNKNOWN = (1 << 32) - 1
PATH_LEN = 112
_TEXT_LEN = 84
GROUPS_MAX = 256

ORDER = struct.Struct(f"=IIQ{PATH_LEN}s")
"""Kind, mode, source and path."""
REPORT = struct.Struct("=IiQQIIII")
"""Kind, error, source, number, and the peer's pid, uid, gid and number of groups, which follow."""
SAY = struct.Struct("=II")
"""Kind and count."""
FOUND = struct.Struct(f"=IIQQQI{_TEXT_LEN}s")
"""Kind, id, size, st_dev, st_ino, st_blksize and what it is in words."""
ASK = struct.Struct("=IIQQQ")
"""Kind, id, user address, st_dev and st_ino."""

REPORT_LEN_MAX = REPORT.size + 4 * GROUPS_MAX
PACKET_LEN_MAX = SAY.size + MAX_FDS * FOUND.size + 4096


class Order(enum.IntEnum):
    LISTEN = 1
    CLOSE = 2
    CONNECT = 3
    QUIT = 4


class Mode(enum.IntEnum):
    """What a connection carries."""

    VHOST_USER = 0
    """Whole messages, and descriptors that were looked at."""
    PLAIN = 1
    """Bytes. Who sends a descriptor is disconnected."""


class Report(enum.IntEnum):
    READY = 1
    NEW = 2
    FAILED = 3
    STUCK = 4
    CROWDED = 5


class Say(enum.IntEnum):
    DATA = 1
    SHARING = 2
    HERE = 3


class Ask(enum.IntEnum):
    SEND = 1
    RELEASE = 2
    SHARING = 3
    HERE = 4
    END = 5


class Kind(enum.IntEnum):
    """What a descriptor is. The last two are not passed on."""

    EVENTFD = 1
    MEMORY = 2
    """A regular file of tmpfs or hugetlbfs."""
    SOCKET = 3
    """A Unix stream socket; what is passed on is another one, that leads to it."""
    FILE = 4
    """A regular file of another file system."""
    OTHER = 5
