"""What is missing on a machine: found, named, installed where that is possible."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vswitch.lab import requirements
from vswitch.lab.errors import LabError
from vswitch.lab.requirements import Requirement

PackageManager = Callable[[str], Path]


@pytest.fixture
def apt_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackageManager:
    """Put an `apt-get` on PATH that writes down how it was called and then runs a script."""

    def create(script: str) -> Path:
        program, calls = tmp_path / "bin" / "apt-get", tmp_path / "calls"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\necho "$@" >>{calls}\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        return calls

    return create


def as_user(monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    monkeypatch.setattr(requirements.os, "geteuid", lambda: uid)


def file_requirement(path: Path) -> Requirement:
    return Requirement("the tool", "tool-package", path.exists)


def test_nothing_is_done_where_nothing_is_missing(apt_get: PackageManager) -> None:
    calls = apt_get("exit 1")
    requirements.ensure([file_requirement(Path("/"))])
    assert not calls.exists()


def test_root_installs_what_is_missing(
    apt_get: PackageManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, said = tmp_path / "tool", list[str]()
    calls = apt_get(f'echo "Get:1 archive"; case "$*" in *install*) touch {tool};; esac')
    as_user(monkeypatch, 0)
    requirements.ensure([file_requirement(tool), file_requirement(tool)], said.append)
    update, install = calls.read_text().splitlines()
    assert update.endswith("update")
    assert install.endswith("install --yes --no-install-recommends tool-package")
    assert said[0] == "installing tool-package"
    assert "Get:1 archive" in said


def test_others_are_told_what_to_install(
    apt_get: PackageManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = apt_get("exit 0")
    as_user(monkeypatch, 1000)
    with pytest.raises(LabError, match="missing: the tool; only root may install it") as caught:
        requirements.ensure([file_requirement(tmp_path / "tool")])
    assert caught.value.hint == "sudo apt-get update && sudo apt-get install tool-package"
    assert not calls.exists()


def test_without_apt_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match="there is no apt here") as caught:
        requirements.ensure([file_requirement(tmp_path / "tool")])
    assert "tool-package" in caught.value.hint


def test_apt_that_fails_is_quoted(
    apt_get: PackageManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt_get('echo "E: Could not resolve the mirror" >&2; exit 100')
    as_user(monkeypatch, 0)
    with pytest.raises(LabError, match="failed with 100: E: Could not resolve the mirror"):
        requirements.ensure([file_requirement(tmp_path / "tool")])


def test_apt_that_succeeds_without_effect_is_an_error(
    apt_get: PackageManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt_get("exit 0")
    as_user(monkeypatch, 0)
    with pytest.raises(LabError, match="these are still missing: the tool"):
        requirements.ensure([file_requirement(tmp_path / "tool")])


def test_runs_without_anything_installed() -> None:
    """`make` calls it before there is a virtual environment: standard library only."""
    root = Path(requirements.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c",
         f"import sys; sys.path.insert(0, {str(root)!r}); import vswitch.lab.requirements"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
