"""Fixtures for the tests of the control plane."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from controlled import Controlled


@pytest.fixture
def controlled(tmp_path: Path) -> Iterator[Controlled]:
    running = Controlled(tmp_path / "control.sock")
    yield running
    running.close()
