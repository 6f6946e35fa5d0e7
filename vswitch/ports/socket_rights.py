"""Who may connect to a listening socket, as far as its file and its directory say."""

from __future__ import annotations

import grp
import pwd
import stat
from pathlib import Path


def only_owner(path: Path) -> str | None:
    """Who alone, root aside, may connect to the socket at `path`; None if others may as well.

    A group counts as others unless it is root's or its owner's own. Only the directory that the
    socket is in is looked at, not those above it.
    """
    try:
        places = ((path.lstat(), stat.S_IWOTH), (path.parent.stat(), stat.S_IXOTH))
    except OSError:
        return None
    for status, right in places:
        owner, group = _user(status.st_uid), _group(status.st_gid)
        to_others = status.st_mode & right
        to_a_group = status.st_mode & right << 3 and group not in {"root", owner}
        if not to_others and not to_a_group:
            return owner
    return None


def mode_of(path: Path) -> str:
    """Owner, group and permissions of a file, for people: `root:root 0755`."""
    status = path.lstat()
    mode = stat.S_IMODE(status.st_mode)
    return f"{_user(status.st_uid)}:{_group(status.st_gid)} {mode:04o}"


def advice(path: Path) -> str | None:
    """What to say of a socket that nobody but its owner and root may connect to; None: nothing."""
    owner = only_owner(path)
    if owner is None:
        return None
    who = owner if owner == "root" else f"{owner} and root"
    return (
        f"only {who} may connect to {path} ({mode_of(path)}, its directory "
        f"{mode_of(path.parent)}). A hypervisor of another user, such as libvirt's, waits for "
        'ever: give the port a group that it is in, group = "kvm" and permissions = "0660" '
        "(add-port --group kvm --permissions 0660), in a directory that the group may enter"
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
