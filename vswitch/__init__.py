"""A software switch that wires virtual machines into a lab network over vhost-user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswitch._version import __version__
from vswitch.errors import VswitchError

if TYPE_CHECKING:
    from vswitch.control.client import Client

__all__ = ["Client", "VswitchError", "__version__"]


def __getattr__(name: str) -> object:
    # Lazy, because the fast path and the software guest import this package without the client.
    if name == "Client":
        from vswitch.control.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
