"""The QEMU of another release of Debian, unpacked beside the system's with its own libraries.

What a user's machine has may be years newer than what the tests run on, and both have to work. A
program of a newer release runs here through the loader and the C library that it was made for; its
data is looked for beside it. Packages come from the mirror that the system's come from, and are
believed by the same keys.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vswitch.lab.errors import LabError
from vswitch.lab.qemu.packages import Packages, has_apt

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PROGRAM = "qemu-system-x86_64"

_KEPT = ("lib", "zlib1g", "qemu-system-", "seabios")
"""How the names of packages begin that have something for QEMU; the rest are their scripts'."""

_STARTER = f"""#!/bin/sh
here=${{0%/*}}
export QEMU_MODULE_DIR="$here/usr/lib/x86_64-linux-gnu/qemu"
exec "$here/usr/lib64/ld-linux-x86-64.so.2" --argv0 {PROGRAM} \\
    --library-path "$here/usr/lib/x86_64-linux-gnu" \\
    "$here/usr/bin/{PROGRAM}" -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" "$@"
"""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Distribution:
    """A release of Debian: `codename` as its archive has it, `name` as people say it."""

    name: str
    codename: str

    def packages(self, cache: Path) -> Packages:
        """Its packages as apt knows them, with lists of their own below `cache`."""
        root = cache / self.codename / "apt"
        hint = (
            f"{self.name}'s packages are fetched through apt from the mirror that the system's "
            "come from; name another with VSWITCH_DEBIAN_MIRROR=URL, and see that it can be reached"
        )
        if platform.machine() != "x86_64":
            raise LabError(f"{self.name}'s QEMU runs on x86-64, this is {platform.machine()}")
        if not has_apt():
            raise LabError(
                f"{self.name}'s packages cannot be had: there is no apt here",
                hint="install apt and dpkg, or leave these tests out",
            )
        if not KEYRING.exists():
            raise LabError(
                f"{self.name}'s packages cannot be had: {KEYRING} is not there to check them with",
                hint="install debian-archive-keyring",
            )
        config, fresh = root / "apt.conf", Packages(root / "apt.conf", hint=hint)
        if not config.exists():
            mirror, security = _mirrors()
            shutil.rmtree(root, ignore_errors=True)
            for folder in ("etc", "lists/partial", "archives/partial"):
                (root / folder).mkdir(parents=True)
            (root / "status").touch()
            (root / "etc" / "debian.sources").write_text(
                _source(mirror, self.codename, f"{self.codename}-updates")
                + _source(security, f"{self.codename}-security")
            )
            config.write_text(
                f'Dir::State::status "{root}/status";\n'
                f'Dir::State::lists "{root}/lists";\n'
                f'Dir::Cache "{root}";\n'
                f'Dir::Etc::sourcelist "{root}/etc/none";\n'
                f'Dir::Etc::sourceparts "{root}/etc";\n'
                f'Dir::Etc::preferences "{root}/etc/none";\n'
                f'Dir::Etc::preferencesparts "{root}/etc";\n'
                'APT::Architecture "amd64";\nAPT::Architectures { "amd64"; };\n'
                'Acquire::Languages "none";\nAPT::Sandbox::User "root";\n'
            )
            try:
                fresh.update()
            except BaseException:
                config.unlink()
                raise
        return fresh

    def qemu(self, cache: Path, progress: Progress) -> Path:
        """A program that is its qemu-system-x86_64. Raises LabError where that cannot be had."""
        target = cache / self.codename / "qemu"
        if not target.exists():
            progress(f"downloading {self.name}'s QEMU")
            packages = self.packages(cache)
            wanted = [
                name for name in packages.to_install("qemu-system-x86") if name.startswith(_KEPT)
            ]
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as scratch:
                root = Path(scratch) / "root"
                archives = packages.download(wanted, Path(scratch))
                progress(f"unpacking {len(archives)} packages")
                for archive in archives:
                    packages.unpack(archive, root)
                for unused in ("doc", "locale", "man"):
                    shutil.rmtree(root / "usr" / "share" / unused, ignore_errors=True)
                starter = root / PROGRAM
                starter.write_text(_STARTER)
                starter.chmod(0o755)
                # All at once: a later run must never see half of it.
                root.rename(target)
        return target / PROGRAM


DEBIAN_13 = Distribution("Debian 13", "trixie")


def _source(mirror: str, *suites: str) -> str:
    return (
        f"Types: deb\nURIs: {mirror}\nSuites: {' '.join(suites)}\nComponents: main\n"
        f"Signed-By: {KEYRING}\n\n"
    )


def _mirrors() -> tuple[str, str]:
    """Where Debian's packages come from, and its security updates."""
    if chosen := os.environ.get("VSWITCH_DEBIAN_MIRROR"):
        chosen = chosen.rstrip("/")
        return chosen, f"{chosen}-security"
    release = Path("/etc/os-release")
    if "ID=debian" in (release.read_text().splitlines() if release.exists() else ()):
        listed = subprocess.run(
            [
                "apt-get",
                "indextargets",
                "--format",
                "$(REPO_URI) $(RELEASE)",
                "Created-By: Packages",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        ).stdout
        rows = [line.split() for line in listed.splitlines() if "debian" in line]
        security = [uri for uri, suite in rows if suite.endswith("-security")]
        main = [uri for uri, suite in rows if "-" not in suite]
        if main and security:
            return main[0], security[0]
    raise LabError(
        "no mirror of Debian is known here",
        hint="name one with VSWITCH_DEBIAN_MIRROR=URL; its security updates are looked for at "
        "URL-security",
    )
