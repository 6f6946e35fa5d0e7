"""A software guest: a vhost-user frontend with the driver side of virtio-net, without a VM.

Demo, tests and benchmarks share it. It knows nothing of the switch and works with any
vhost-user-net backend.
"""

from vswitch.guest.errors import (
    BackendClosedError,
    BackendRefusedError,
    BackendTimeoutError,
    DeviceError,
    GuestError,
)
from vswitch.guest.frontend import Frontend, Listener
from vswitch.guest.guest import (
    DEFAULT_FEATURES,
    DEFAULT_PROTOCOL_FEATURES,
    SoftwareGuest,
)
from vswitch.guest.memory import GuestMemory, Region, plain_layout, scattered_layout
from vswitch.guest.vnet import VnetHeader

__all__ = [
    "DEFAULT_FEATURES",
    "DEFAULT_PROTOCOL_FEATURES",
    "BackendClosedError",
    "BackendRefusedError",
    "BackendTimeoutError",
    "DeviceError",
    "Frontend",
    "GuestError",
    "GuestMemory",
    "Listener",
    "Region",
    "SoftwareGuest",
    "VnetHeader",
    "plain_layout",
    "scattered_layout",
]
