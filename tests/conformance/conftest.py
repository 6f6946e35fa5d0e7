"""What the conformance tests share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def run_dir() -> Iterator[Path]:
    """A directory with a path short enough for sockets (107 bytes is the limit)."""
    with tempfile.TemporaryDirectory(prefix="vswitch-") as path:
        yield Path(path)
