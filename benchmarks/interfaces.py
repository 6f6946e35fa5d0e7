"""The host's network interfaces, by iproute2."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.machine import program


def interface_up(name: str) -> None:
    """Bring an interface up, quietly: the kernel must not send anything of its own through it."""
    with contextlib.suppress(OSError):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
    ip("link", "set", name, "up")


def ip(*arguments: str) -> None:
    done = subprocess.run(
        [program("ip", "/usr/sbin", "/sbin"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchmarkError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def remove_interface(name: str) -> None:
    """Delete an interface, if it is there."""
    with contextlib.suppress(BenchmarkError):
        ip("link", "del", name)
