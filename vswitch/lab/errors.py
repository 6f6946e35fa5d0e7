"""Errors of the lab: a guest that does not boot, a kernel that cannot be had."""

from __future__ import annotations

from vswitch.errors import VswitchError


class LabError(VswitchError):
    """Something the lab needs is missing or did not work."""

    code = "lab"


class MachineError(LabError):
    """A virtual machine did not do what it was asked; the message carries the end of its logs."""

    code = "machine"
