"""What the process may do: which user it runs as, and which capabilities it keeps.

Started as root with `user` in the configuration, the switch becomes that user before it opens
anything but the directory of its control socket, with the three capabilities that setting up takes.
When it is ready it gives them back, all but CAP_NET_ADMIN where it has uplinks to manage. Threads
have capabilities of their own: those that read guest memory have none from their beginning.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
from typing import NamedTuple

from vswitch.errors import ConfigError, VswitchError
from vswitch.host.accounts import find_gid, find_uid

CAP_CHOWN = 0
CAP_FOWNER = 3
CAP_NET_ADMIN = 12

SET_UP = frozenset({CAP_CHOWN, CAP_FOWNER, CAP_NET_ADMIN})
"""For sockets that belong to others (their owner, then their mode), and for TAPs."""

_PR_SET_KEEPCAPS = 8
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


class Identity(NamedTuple):
    """Whom the switch is to run as; `groups` are the supplementary ones."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def identity(user: str | None, group: str | None) -> Identity | None:
    """Whom `user` and `group` of the configuration mean; None if the process is to stay who it is.

    Without `group` it is the user's own. Raises ConfigError where that takes root or is not known.
    """
    if user is None:
        return None
    uid = find_uid(user)
    if uid is None:
        raise ConfigError(f'switch.user: there is no user "{user}" on this machine')
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        entry = None
    gid = None if group is None else find_gid(group)
    if group is not None and gid is None:
        raise ConfigError(f'switch.group: there is no group "{group}" on this machine')
    if gid is None:
        if entry is None:
            raise ConfigError(
                f"switch.user: uid {uid} is in no password file, so it has no group",
                hint='say which: `group = "GROUP"` in the [switch] table',
            )
        gid = entry.pw_gid
    if os.geteuid() == uid:
        return None
    if os.geteuid() != 0:
        raise ConfigError(
            "switch.user: only root can run the switch as another user, "
            f"this is uid {os.geteuid()}",
            hint="start it as root, or take `user` out of the [switch] table",
        )
    groups = [] if entry is None else os.getgrouplist(entry.pw_name, gid)
    return Identity(uid, gid, tuple(groups))


def forbid_new_privileges() -> None:
    """No program that this process might start can have more rights than it, set-user-ID or not.

    Call it before there are other threads: it holds for this one and those it starts.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def use_all_descriptors() -> None:
    """Raise the limit of open files as far as this process may.

    The usual 1024 are a hundred ports, or one whose frontend sets up all of 128 queue pairs.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def become(who: Identity) -> None:
    """Be another user from now on, with the capabilities of SET_UP as far as root has them here.

    Call it before there are other threads, which would have none. Raises VswitchError.
    """
    try:
        _prctl(_PR_SET_KEEPCAPS, 1)
        os.setgroups(who.groups)
        os.setresgid(who.gid, who.gid, who.gid)
        os.setresuid(who.uid, who.uid, who.uid)
        _prctl(_PR_SET_KEEPCAPS, 0)
    except OSError as exc:
        raise VswitchError(
            f"cannot become uid {who.uid}, gid {who.gid}: {exc.strerror}",
            hint="in a container: it takes CAP_SETUID and CAP_SETGID",
        ) from exc
    limit_capabilities(SET_UP)


def limit_capabilities(kept: frozenset[int]) -> frozenset[int]:
    """Give up all capabilities of the calling thread but those; returns what is left of them."""
    header = _Header(_CAPABILITY_VERSION_3, 0)
    data = (_Data * 2)()
    if _libc.capget(ctypes.byref(header), data):
        _fail("capget")
    left = frozenset(cap for cap in kept if data[cap // 32].permitted >> cap % 32 & 1)
    data = (_Data * 2)()
    for cap in left:
        data[cap // 32].permitted |= 1 << cap % 32
        data[cap // 32].effective |= 1 << cap % 32
    if _libc.capset(ctypes.byref(header), data):
        _fail("capset")
    return left


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        _fail("prctl")


def _fail(call: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{call}: {os.strerror(number)}")
