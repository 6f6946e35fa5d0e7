"""What is handed out: a package with its examples."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EXAMPLES = Path("vswitch/examples")
"""A link to config/, so that packages have what is in there."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree with all that was built in it, for setuptools to write into."""
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    leave = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", ".cache", "build")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=leave)
    return copy


def setup(tree: Path, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *words],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_has_its_examples_and_its_unit(tree: Path, tmp_path: Path) -> None:
    setup(tree, "build_py", "--build-lib", str(tmp_path))
    installed = tmp_path / EXAMPLES
    config = {path.name: path.read_text() for path in (ROOT / "config").iterdir() if path.is_file()}
    assert {path.name: path.read_text() for path in installed.iterdir()} == config
    assert "vswitch.service" in config
    assert not installed.is_symlink()


def test_examples_are_found(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vswitch", "examples"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).resolve() == ROOT / "config"
