"""CONTRIBUTING.md names files that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDERS = ("vswitch/", "tests/", "docs/", "config/")


def test_every_path_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = {word for word in re.findall(r"`([\w./-]+)`", text) if word.startswith(FOLDERS)}
    assert len(named) > 20
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_target_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", text)) <= targets
