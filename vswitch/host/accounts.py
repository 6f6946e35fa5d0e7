"""Users and groups of this machine, by name or number."""

from __future__ import annotations

import grp
import pwd


def find_uid(owner: str) -> int | None:
    """The uid of a user given by name or number; None if there is no such user."""
    if owner.isascii() and owner.isdigit():
        return int(owner) if int(owner) < 2**32 - 1 else None
    try:
        return pwd.getpwnam(owner).pw_uid
    except (KeyError, ValueError):
        return None


def find_gid(group: str) -> int | None:
    """The gid of a group given by name or number; None if there is no such group."""
    if group.isascii() and group.isdigit():
        return int(group) if int(group) < 2**32 - 1 else None
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        return None
