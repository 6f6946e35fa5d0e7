"""Descriptors that frontends handed over, by number, and what the relay knows of them.

Whoever owns one closes it with `close_fd` and not otherwise: the relay, which has another, hears of
that and closes its own, which may take as long as the frontend likes. Whoever maps it keeps its
`Found` for as long as it is mapped.
"""

from __future__ import annotations

import itertools
import os

from vswitch.relay.link import Found

_found: dict[int, Found] = {}
_nowhere = itertools.count(2)


def adopt(found: Found) -> int:
    """A number for it from now on: its descriptor, or a negative one if it was not passed on."""
    number = found.fd if found.fd >= 0 else -next(_nowhere)
    _found[number] = found
    return number


def found_of(fd: int) -> Found | None:
    """What is known of a descriptor; None for those of the switch's own."""
    return _found.get(fd)


def close_fd(fd: int) -> int:
    """Close a descriptor if there is one; -1, to put in its place."""
    if fd >= 0:
        os.close(fd)
    _found.pop(fd, None)
    return -1
