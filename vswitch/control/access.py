"""Who a control client is, and what it may do with the switch."""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import struct
from typing import NamedTuple

_SO_PEERGROUPS = 59
_GROUPS_MAX = 256  # more than that do not fit into what getsockopt() of Python returns


class Peer(NamedTuple):
    """Who connected: SO_PEERCRED and, for permissions of the socket's group, SO_PEERGROUPS."""

    pid: int
    uid: int
    gids: frozenset[int]

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """The credentials a peer had when it called connect()."""
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = struct.unpack("=iII", raw)
        gids = {gid}
        with contextlib.suppress(OSError):  # before Linux 4.13
            groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _GROUPS_MAX)
            gids.update(struct.unpack(f"={len(groups) // 4}I", groups))
        return cls(pid, uid, frozenset(gids))


class Access(enum.IntEnum):
    """What a client may do with the switch."""

    NONE = 0
    READ = 1
    """Look at it: the methods in `methods.READ_ONLY`."""
    ALL = 2


def access_of(peer: Peer, status: os.stat_result | None) -> Access:
    """All for our user, root and the socket's owner and group, looking for anybody else it lets in.

    The owner, the group and others need the permission to write to the socket for that. `status` is
    that of the socket's file; None if it is gone, when only the first two are left.
    """
    if peer.uid in (0, os.geteuid()):
        return Access.ALL
    if status is None:
        return Access.NONE
    if peer.uid == status.st_uid:
        return Access.ALL if status.st_mode & 0o200 else Access.NONE
    if status.st_gid in peer.gids:
        return Access.ALL if status.st_mode & 0o020 else Access.NONE
    return Access.READ if status.st_mode & 0o002 else Access.NONE
