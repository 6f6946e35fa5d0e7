"""What can go wrong between the software guest and the backend it talks to."""

from __future__ import annotations

from vswitch.errors import VswitchError


class GuestError(VswitchError):
    """The software guest cannot do what it was asked to do."""

    code = "guest"


class BackendClosedError(GuestError):
    """The backend closed the vhost-user connection."""

    code = "guest-disconnected"


class BackendTimeoutError(GuestError):
    """The backend did not answer, or did not take what was sent, before the deadline."""

    code = "guest-timeout"


class BackendRefusedError(GuestError):
    """The backend answered a request with an error, or with something that is no answer to it."""

    code = "guest-refused"


class DeviceError(GuestError):
    """The device broke a rule of the virtqueue; the text names queue, rule and value."""

    code = "guest-device"
