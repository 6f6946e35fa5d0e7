"""What is missing on a machine: found, named, installed where that is possible."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vswitch.lab import programs, requirements
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
    monkeypatch.setattr(os, "geteuid", lambda: uid)


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
    install = "apt-get install --no-install-recommends tool-package"
    # The PATH has what is installed here: sudo or not.
    assert caught.value.hint in (
        f"sudo apt-get update && sudo {install}",
        f"as root: apt-get update && {install}",
    )
    assert not calls.exists()


@pytest.mark.parametrize("sudo", [True, False])
def test_the_printed_command_can_be_typed(
    apt_get: PackageManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sudo: bool
) -> None:
    apt_get("exit 0")
    as_user(monkeypatch, 1000)
    found = "/usr/bin/sudo" if sudo else None
    monkeypatch.setattr(programs, "find", lambda _: found)
    said = requirements.installing("one", "two")
    install = "apt-get install --no-install-recommends one two"
    if sudo:
        assert said == f"sudo apt-get update && sudo {install}"
    else:
        assert said == f"as root: apt-get update && {install}"
    as_user(monkeypatch, 0)
    assert requirements.installing("one", "two") == f"apt-get update && {install}"


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


@pytest.mark.parametrize(
    ("target", "groups"),
    [
        ("setup", "build test"),
        ("test", "build test"),
        ("test-all", "build test"),
        ("demo", "--without demo build"),
        ("check", "build"),
    ],
)
def test_make_says_all_that_is_missing_before_it_builds(
    tmp_path: Path, target: str, groups: str
) -> None:
    calls, python = tmp_path / "calls", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>{calls}\nexit 1\n')
    python.chmod(0o755)
    makefile = Path(requirements.__file__).parents[2] / "Makefile"
    done = subprocess.run(
        ["make", "-j", "4", "-f", str(makefile), target, f"PYTHON={python}"],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert calls.read_text() == f"-m vswitch.lab.requirements --install {groups}\n"


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["requirements", *words])
    return requirements.main()


def test_all_groups_are_named_at_once(
    apt_get: PackageManager, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apt_get("exit 0")
    as_user(monkeypatch, 1000)
    groups: dict[str, tuple[Requirement, ...]] = {
        name: (Requirement(f"the {name}", f"{name}-package", lambda: False),)
        for name in ("build", "test", "demo")
    }
    monkeypatch.setattr(requirements, "GROUPS", groups)
    assert run_main(monkeypatch, "--install", "build", "test") == 1
    said = capsys.readouterr().err
    assert "missing: the build, the test; only root may install it" in said
    assert said.rstrip().endswith("build-package test-package")
    assert run_main(monkeypatch, "--install", "--without", "demo", "build") == 1
    said = capsys.readouterr().err
    assert said.rstrip().endswith("build-package demo-package")
    groups["build"] = ()
    assert run_main(monkeypatch, "--install", "--without", "demo", "build") == 0
    said = capsys.readouterr().err
    assert "missing, but not needed: the demo" in said
    assert said.rstrip().endswith("demo-package")


@pytest.mark.parametrize("lacking", ["compiler", "headers"])
def test_setup_says_what_it_needs_before_it_compiles(tmp_path: Path, lacking: str) -> None:
    """In two lines; `pip install .` prints what setup.py says."""
    root = Path(requirements.__file__).parents[2]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    if lacking == "compiler":
        environment["CC"] = "no-such-compiler -O2"
    else:
        code = (
            "import sys, sysconfig, runpy; get = sysconfig.get_path\n"
            f"there = {str(tmp_path)!r}\n"
            "sysconfig.get_path = lambda name: there if name == 'include' else get(name)\n"
            "runpy.run_path('setup.py')"
        )
        command[1:2] = ["-c", code]
    command += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "objects")]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: missing: ")
    assert {"compiler": "a C compiler", "headers": "Python's headers"}[lacking] in error
    assert {"compiler": "gcc", "headers": "-dev"}[lacking] in hint
    assert not (tmp_path / "objects").exists()
