"""Words for kinds of ports, which settings say and `show` prints; plain Python, like keys.py.

Each has a factory of its own in `vswitch.ports`, registered under its word.
"""

from __future__ import annotations

from typing import Literal, get_args

GuestKind = Literal["vhost-user"]
"""What a `[[port]]` may be."""
UplinkKind = Literal["tap"]
"""What an `[uplink]` may be."""
PortKind = Literal[GuestKind, UplinkKind]
UPLINK_KINDS: frozenset[str] = frozenset(get_args(UplinkKind))
