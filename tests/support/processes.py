"""Programs of this checkout, run by tests as processes of their own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**extra: str) -> dict[str, str]:
    """What `python -m` and `-c` need to find vswitch and tests of this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **extra}


def sockets(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]
