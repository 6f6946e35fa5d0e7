"""Packages of a distribution, fetched through apt and unpacked, not installed; needs no root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from vswitch.lab.errors import LabError


def has_apt() -> bool:
    return all(shutil.which(name) for name in ("apt-get", "apt-cache", "dpkg-deb"))


@dataclass(frozen=True, slots=True)
class Packages:
    """The system's packages, or, with another `config` (a file as apt.conf(5) has it), others."""

    config: Path | None = None
    hint: str = field(
        default="run `apt-get update` as root if apt's package lists are old or empty", kw_only=True
    )

    def dependencies(self, package: str) -> list[str]:
        """What a package depends on, with all alternatives; nothing if apt does not know it."""
        listed = subprocess.run(
            ["apt-cache", "depends", "--no-recommends", "--no-suggests", package],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=self._environment(),
        ).stdout
        return re.findall(r"^\s+\|?(?:Pre)?Depends: (\S+)", listed, re.MULTILINE)

    def to_install(self, package: str) -> list[str]:
        """A package and all that it needs beside what this configuration has installed."""
        said = self.apt_get("--simulate", "--no-install-recommends", "install", package)
        return re.findall(r"^Inst (\S+) ", said, re.MULTILINE)

    def update(self) -> None:
        """Fetch the lists of packages, whose signatures are checked."""
        # An archive that cannot be reached is but a warning otherwise.
        self.apt_get("-o", "APT::Update::Error-Mode=any", "update")

    def download(self, packages: list[str], directory: Path) -> list[Path]:
        """Fetch packages into a directory."""
        # apt as root would hand the download to a user who may not write here, and complain.
        as_root = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        self.apt_get(*as_root, "download", *packages, cwd=directory)
        return sorted(directory.glob("*.deb"))

    def unpack(self, archive: Path, root: Path) -> None:
        self._run("dpkg-deb", "-x", str(archive), str(root))

    def apt_get(self, *arguments: str, cwd: Path | None = None) -> str:
        """What `apt-get ARGUMENTS` prints; raises LabError when it fails."""
        return self._run("apt-get", "-q", *arguments, cwd=cwd)

    def _environment(self) -> dict[str, str]:
        environment = os.environ | {"LC_ALL": "C.UTF-8"}
        return (
            environment if self.config is None else environment | {"APT_CONFIG": str(self.config)}
        )

    def _run(self, *argv: str, cwd: Path | None = None) -> str:
        result = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=600,
            check=False,
            env=self._environment(),
        )
        if result.returncode:
            reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
            raise LabError(
                f"`{' '.join(argv)}` failed: {' '.join(reason) or result.returncode}",
                hint=self.hint,
            )
        return result.stdout
