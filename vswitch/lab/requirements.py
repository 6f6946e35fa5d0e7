"""What the build, the demo and the tests need from the system, and how to get it.

Uses the standard library only and runs before there is a virtual environment:
`python3 -m vswitch.lab.requirements --install build test`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vswitch.lab import programs
from vswitch.lab.errors import LabError

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Requirement:
    """One thing needed, how to see whether it is there, and the Debian package that has it.

    `package` may name several, with spaces between them, where releases differ.
    """

    what: str
    package: str
    present: Callable[[], bool]


def _program(name: str, package: str) -> Requirement:
    return Requirement(name, package, lambda: programs.find(name) is not None)


def _python_headers() -> bool:
    return Path(sysconfig.get_path("include"), "Python.h").exists()


def _c_library_headers() -> bool:
    return Path("/usr/include/stdio.h").exists()


def _versioned(package: str) -> str:
    """Debian's package of the running interpreter: python3.12-dev belongs to python3.12."""
    system = Path("/usr/bin/python3").resolve() == Path(sys.executable).resolve()
    if system:
        return f"python3-{package}"
    return f"python{sys.version_info.major}.{sys.version_info.minor}-{package}"


def _compiler() -> bool:
    """Whether what setuptools will call is there: `$CC`, else what Python was built with."""
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc"
    return programs.find(command.split()[0]) is not None


COMPILE = (
    Requirement("a C compiler", "gcc", _compiler),
    Requirement("Python's headers", _versioned("dev"), _python_headers),
    Requirement("the C library's headers", "libc6-dev", _c_library_headers),
)
"""For the Cython extensions; setup.py asks for it too."""

BUILD = (
    Requirement("Python's venv module", _versioned("venv"), lambda: bool(find_spec("ensurepip"))),
    *COMPILE,
)
"""For the virtual environment and the Cython extensions."""


def is_ubuntu() -> bool:
    try:
        return "ubuntu" in Path("/etc/os-release").read_text().lower()
    except OSError:
        return False


def _can_read_modules() -> bool:
    """Ubuntu compresses kernel modules with zstd; Debian does not."""
    return not is_ubuntu() or programs.find("zstd") is not None


def _has_uml() -> bool:
    """Ubuntu has no package of User Mode Linux; its tests are skipped there."""
    return is_ubuntu() or programs.find("linux.uml") is not None


DEMO = (
    _program("qemu-system-x86_64", "qemu-system-x86"),
    _program("busybox", "busybox-static"),
    Requirement("zstd", "zstd", _can_read_modules),
    _program("ip", "iproute2"),
)
"""For QEMU guests. The guests' kernel is downloaded by `vswitch.lab.qemu.image`, not installed."""

TEST = (
    *DEMO,
    # In dpdk-dev or, in older releases, in dpdk.
    _program("dpdk-testpmd", "dpdk-dev dpdk"),
    _program("ethtool", "ethtool"),
    _program("setpriv", "util-linux"),
    _program("spin", "spin"),
    Requirement("linux.uml", "user-mode-linux", _has_uml),
)
"""For `make test`: QEMU guests, DPDK and User Mode Linux as other frontends, a model checker."""

GROUPS = {"build": BUILD, "compile": COMPILE, "demo": DEMO, "test": TEST}


def missing(requirements: Iterable[Requirement]) -> list[Requirement]:
    """Those of `requirements` that are not there."""
    return [one for one in requirements if not one.present()]


def _packages(wanted: Iterable[Requirement]) -> list[str]:
    return list(dict.fromkeys(name for one in wanted for name in one.package.split()))


def has_apt() -> bool:
    return shutil.which("apt-get") is not None


def _may_install() -> bool:
    return has_apt() and os.geteuid() == 0


def advice(wanted: Iterable[Requirement]) -> str:
    """The exact command that installs `wanted`, or what to look for where there is no apt."""
    packages = _packages(wanted)
    if has_apt():
        return installing(*packages)
    return f"this system has no apt; install what Debian packages as: {' '.join(packages)}"


def installing(*packages: str) -> str:
    """What to type to install Debian packages, without the hundreds that these only recommend."""
    command = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() == 0:
        return f"apt-get update && {command}"
    if programs.find("sudo"):
        return f"sudo apt-get update && sudo {command}"
    return f"as root: apt-get update && {command}"


def ensure(requirements: Iterable[Requirement], progress: Progress = lambda _: None) -> None:
    """Install what is missing, as root through apt; raises LabError where that cannot be done.

    `progress` is given each line that apt prints.
    """
    wanted = missing(requirements)
    if not wanted:
        return
    names = ", ".join(one.what for one in wanted)
    if not _may_install():
        why = "only root may install it" if has_apt() else "there is no apt here to install it with"
        raise LabError(f"missing: {names}; {why}", hint=advice(wanted))
    packages = _packages(wanted)
    progress(f"installing {' '.join(packages)}")
    # Lists may be absent (fresh containers) or older than the archive, so they are always renewed.
    _apt(["update"], progress)
    _apt(["install", "--yes", "--no-install-recommends", *packages], progress)
    if still := missing(wanted):
        raise LabError(
            f"apt installed {' '.join(packages)}, but these are still missing: "
            + ", ".join(one.what for one in still),
            hint="look for them on PATH, or report it as a bug with the name of your distribution",
        )


def _apt(arguments: list[str], progress: Progress) -> None:
    command = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=120", *arguments]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    last = ""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                last = line.strip()
                progress(last)
    if process.returncode:
        raise LabError(
            f"`{' '.join(command)}` failed with {process.returncode}: {last}",
            hint="see whether the machine reaches its package mirror, then run the command by hand",
        )


def main() -> int:
    """`python3 -m vswitch.lab.requirements [--install] [--without GROUP] GROUP...`.

    Exit code 0: all is there, but for what can be done without.
    """
    programs.only_installed()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", action="store_true", help="install what is missing")
    parser.add_argument(
        "--without", choices=sorted(GROUPS), metavar="GROUP", help="what can be done without"
    )
    parser.add_argument("groups", nargs="+", choices=sorted(GROUPS), metavar="GROUP")
    arguments = parser.parse_args()
    needed = missing(one for name in arguments.groups for one in GROUPS[name])
    wished = missing(GROUPS[arguments.without]) if arguments.without else []
    wanted = [*needed, *(one for one in wished if one not in needed)]
    if not wanted:
        return 0
    if not arguments.install or (not needed and not _may_install()):
        _tell("missing" if needed else "missing, but not needed", wanted)
        return bool(needed)
    try:
        ensure(wanted, lambda line: print(f"  {line}", flush=True))
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _tell(how: str, wanted: list[Requirement]) -> None:
    print(f"{how}: {', '.join(one.what for one in wanted)}", file=sys.stderr)
    print(f"  hint: {advice(wanted)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
