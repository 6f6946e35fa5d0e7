"""A directory of somebody who lies in wait for programs that look where they are started."""

from __future__ import annotations

from pathlib import Path

MODULES = (
    *("vswitch", "uvloop", "click", "msgpack", "pydantic", "rich", "tomlkit", "benchmarks", "pip"),
    # The standard library's, as they come first.
    *("asyncio", "argparse", "ctypes", "json", "shutil", "socket", "struct", "subprocess", "venv"),
)
PROGRAMS = (
    *("vswitch", "vswitchctl", "python", "python3", "setpriv", "ip", "ldd", "zstd", "busybox"),
    *("apt-get", "apt-cache", "dpkg-deb", "sudo", "git", "perf", "qemu-system-x86_64"),
)
FIRMWARE = ("bios.bin", "bios-256k.bin", "efi-virtio.rom", "kvmvapic.bin", "linuxboot_dma.bin")
"""What QEMU opens by name, in its current directory first."""


class Traps:
    """Modules, programs and firmware in `directory`, which is made, and what ran of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._prey = directory / "ran"
        self._prey.mkdir(parents=True)
        for name in MODULES:
            package = directory / name
            package.mkdir()
            package.joinpath("__init__.py").write_text(
                f"open({str(self._prey / name)!r} + '.py', 'w').close()\n"
                f"raise ImportError('the {name} of another directory')\n"
            )
        for name in PROGRAMS:
            # A program and a package may have one name.
            program = directory / "bin" / name if name in MODULES else directory / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/bin/sh\n: >{self._prey / name}\nexit 1\n")
            program.chmod(0o755)
        for name in FIRMWARE:
            directory.joinpath(name).write_bytes(b"no firmware at all")

    def first(self, path: str) -> str:
        """A PATH on which this directory, as the current one, comes before and behind `path`."""
        return f".::bin:./bin:{path}:"

    def sprung(self) -> list[str]:
        """What of it was run or imported."""
        return sorted(path.name for path in self._prey.iterdir())
