"""A software switch that wires virtual machines into a lab network over vhost-user."""

from vswitch._version import __version__
from vswitch.errors import VswitchError

__all__ = ["VswitchError", "__version__"]
