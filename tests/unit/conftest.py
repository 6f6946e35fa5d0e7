"""Fixtures for the tests of the control plane."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.controlled import Controlled


@pytest.fixture
def controlled(tmp_path: Path) -> Iterator[Controlled]:
    running = Controlled(tmp_path / "control.sock")
    yield running
    running.close()


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """A directory that other users can write to.

    Not one of pytest's: it closes them to others whenever another session of it begins.
    """
    with tempfile.TemporaryDirectory(prefix="vswitch-") as name:
        Path(name).chmod(0o777)
        yield Path(name)
