"""Errors that are meant for people: what happened, why, and what to do about it."""

from __future__ import annotations

import reprlib


class VswitchError(Exception):
    """Something a user can understand and mend.

    `message` says what happened and why, in one sentence that names the port, the key or the path
    and the offending value. `hint` says what to do. `code` is a stable identifier for programs: it
    travels over the control socket and decides the exit code of `vswitchctl`.
    """

    code = "error"

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(VswitchError):
    """A configuration file or a setting given at run time is not acceptable."""

    code = "invalid-config"


class NotFoundError(VswitchError):
    """The named port, uplink or FDB entry does not exist."""

    code = "not-found"


class ExistsError(VswitchError):
    """The name or the path is already in use."""

    code = "exists"


class SocketError(VswitchError):
    """A socket path cannot be listened on or connected to."""

    code = "socket"


class UplinkError(VswitchError):
    """The TAP interface cannot be opened, configured or joined to its bridge."""

    code = "uplink"


class ProtocolError(VswitchError):
    """A peer broke the rules of its protocol; costs that peer its connection."""

    code = "protocol"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 100


def shorten(value: object) -> str:
    """A value from outside for a message: its repr, but never long and never deep."""
    return _SHORT.repr(value)
