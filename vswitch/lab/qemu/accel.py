"""Which QEMU accelerator works here, found out by booting a guest rather than by looking.

A /dev/kvm that can be opened says little: nested virtualisation may offer one on which a kernel
hangs. So the lab's own kernel is booted once, with a short deadline; the answer is kept until the
machine boots again.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal

from vswitch.lab import requirements
from vswitch.lab.errors import LabError
from vswitch.lab.qemu import process
from vswitch.lab.qemu.distribution import PROGRAM as QEMU
from vswitch.lab.qemu.image import GuestImage, cache_dir

PROBE_TIMEOUT_S = 4.0
"""A guest with working KVM reaches /init in well under one second."""

Accelerator = Literal["kvm", "tcg"]


@cache
def qemu_version(qemu: str = QEMU) -> tuple[int, int]:
    """Major and minor version of a QEMU, by default the installed one. Raises LabError."""
    try:
        text = subprocess.run(
            [qemu, "--version"], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except FileNotFoundError:
        hint = requirements.installing("qemu-system-x86")
        raise LabError(f"{qemu} is not installed", hint=hint) from None
    found = re.search(r"version (\d+)\.(\d+)", text)
    if not found:
        raise LabError(f"`{qemu} --version` says {text.strip()!r}, which has no version in it")
    return int(found.group(1)), int(found.group(2))


def accelerator(image: GuestImage) -> Accelerator:
    """`kvm` if a guest boots with it here, else `tcg`. `$VSWITCH_ACCEL` overrides the probe."""
    match os.environ.get("VSWITCH_ACCEL", ""):
        case "kvm":
            return "kvm"
        case "tcg":
            return "tcg"
        case "":
            pass
        case other:
            raise LabError(f"VSWITCH_ACCEL={other}: not an accelerator", hint="use kvm or tcg")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    major, minor = qemu_version(image.qemu)
    answer = cache_dir() / f"accelerator-{boot_id}-qemu{major}.{minor}"
    if answer.exists():
        return "kvm" if answer.read_text() == "kvm" else "tcg"
    works: Accelerator = "kvm" if _boots_with_kvm(image) else "tcg"
    for old in cache_dir().glob("accelerator-*"):
        if boot_id not in old.name:
            old.unlink(missing_ok=True)
    answer.write_text(works)
    return works


def _boots_with_kvm(image: GuestImage) -> bool:
    with tempfile.TemporaryDirectory(prefix="vswitch-") as directory:
        console = Path(directory) / "console"
        probe = process.start(
            [
                image.qemu, "-accel", "kvm", "-cpu", "host", "-m", "192", "-nodefaults",
                "-display", "none", "-no-reboot",
                "-chardev", f"file,id=console,path={console}", "-serial", "chardev:console",
                "-kernel", str(image.kernel), "-initrd", str(image.initrd),
                "-append", "console=ttyS0 quiet panic=-1 lab.probe=1",
            ],
            log=Path(directory) / "qemu.log",
            cwd=Path(directory),
        )  # fmt: skip
        try:
            probe.wait(PROBE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return False
        finally:
            process.kill(probe)
        return "probe reached /init" in process.tail(console)
