"""A software guest: a vhost-user frontend with the driver side of virtio-net, without a VM.

Demo, tests and benchmarks share it. It knows nothing of the switch and works with any
vhost-user-net backend.
"""

from vswitch.lab.guest.errors import (
    BackendClosedError,
    BackendRefusedError,
    BackendTimeoutError,
    DeviceError,
    GuestError,
)
from vswitch.lab.guest.frontend import Frontend, Listener
from vswitch.lab.guest.guest import SoftwareGuest
from vswitch.lab.guest.memory import GuestMemory, Region, plain_layout, scattered_layout
from vswitch.lab.guest.options import DEFAULT_FEATURES, DEFAULT_PROTOCOL_FEATURES, Wanted
from vswitch.lab.guest.shapes import BufferOptions
from vswitch.lab.guest.vnet import VnetHeader

__all__ = [
    "DEFAULT_FEATURES",
    "DEFAULT_PROTOCOL_FEATURES",
    "BackendClosedError",
    "BackendRefusedError",
    "BackendTimeoutError",
    "BufferOptions",
    "DeviceError",
    "Frontend",
    "GuestError",
    "GuestMemory",
    "Listener",
    "Region",
    "SoftwareGuest",
    "VnetHeader",
    "Wanted",
    "plain_layout",
    "scattered_layout",
]
