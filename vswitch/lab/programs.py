"""Which programs are started: what is installed, never what lies in the current directory.

That directory may be anybody's, and whoever starts the lab in it may be root. Uses the standard
library only: `vswitch.lab.requirements` runs before there is anything else.
"""

from __future__ import annotations

import os
import shutil
import sys

_SYSTEM = ("/usr/sbin", "/sbin")


def installed_path() -> str:
    """PATH without its relative and empty entries, which stand for the current directory.

    The system's default where nothing else is left: an empty PATH is one empty entry.
    """
    entries = os.environ.get("PATH", "").split(os.pathsep)
    return os.pathsep.join(filter(os.path.isabs, entries)) or os.defpath


def only_installed() -> None:
    """Let this process and those that it starts look only where `installed_path` does."""
    os.environ["PATH"] = installed_path()


def find(name: str, *places: str) -> str | None:
    """The program called `name` on `installed_path`, then in `places` and the system's folders."""
    return shutil.which(name, path=os.pathsep.join([installed_path(), *places, *_SYSTEM]))


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of what is installed beside this interpreter.

    With `-m` alone the current directory would come first, whatever lies there.
    """
    return [sys.executable, "-P", "-m", module, *arguments]
