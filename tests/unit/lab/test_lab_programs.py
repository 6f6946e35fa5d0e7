"""Nothing is run that merely lies in the current directory: each way in which programs start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.errors import MissingError
from benchmarks.machine import program
from tests.support.traps import Traps
from vswitch.lab import programs
from vswitch.lab.qemu.switch_process import SwitchProcess

ROOT = Path(__file__).parents[3]


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Traps:
    """The current directory."""
    laid = Traps(tmp_path / "elsewhere")
    monkeypatch.chdir(laid.directory)
    monkeypatch.setenv("PATH", laid.first(os.environ["PATH"]))
    return laid


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_traps_work(traps: Traps) -> None:
    """Else nothing below means anything."""
    subprocess.run(["ip"], check=False)
    subprocess.run([sys.executable, "-c", "import uvloop"], capture_output=True, check=False)
    assert traps.sprung() == ["ip", "uvloop.py"]


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        (".:/usr/bin::bin:/bin:", "/usr/bin:/bin"),
        ("", os.defpath),
        (".", os.defpath),
        (None, os.defpath),
    ],
)
def test_relative_entries_of_path_are_left_out(
    monkeypatch: pytest.MonkeyPatch, path: str | None, kept: str
) -> None:
    if path is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", path)
    assert programs.installed_path() == kept
    monkeypatch.setenv("PATH", path or "")  # so that it comes back after the test
    programs.only_installed()
    assert os.environ["PATH"] == kept


def test_programs_are_those_installed(traps: Traps, monkeypatch: pytest.MonkeyPatch) -> None:
    assert programs.find("python3") not in (None, "./python3", "python3")
    monkeypatch.setenv("PATH", "")
    assert programs.find("no-such-program") is None
    (traps.directory / "only-here").write_text("#!/bin/sh\n")
    (traps.directory / "only-here").chmod(0o755)
    assert shutil.which("only-here", path=".") is not None
    assert programs.find("only-here") is None
    with pytest.raises(MissingError):
        program("only-here")


@pytest.mark.parametrize("module", ["vswitch", "vswitch.cli.ctl", "vswitch.lab.requirements"])
def test_our_own_modules(traps: Traps, module: str) -> None:
    assert "usage: " in run(*programs.python(module, "--help")).lower()
    assert traps.sprung() == []


def test_python_m_vswitch(traps: Traps) -> None:
    """As a user may write it: Python itself finds our package, and we find what it needs."""
    shutil.rmtree(traps.directory / "vswitch")
    for name in ("asyncio", "argparse"):  # not yet imported, unlike what runpy needs
        assert (traps.directory / name).exists()
    run(sys.executable, "-m", "vswitch", "start", "--help")
    config = traps.directory / "ports.toml"
    config.write_text("")
    assert "good" in run(sys.executable, "-m", "vswitch", "start", "--check", "-c", "ports.toml")
    assert traps.sprung() == []


@pytest.mark.parametrize("name", ["vswitch", "vswitchctl"])
def test_console_scripts(traps: Traps, name: str) -> None:
    run(str(Path(sys.executable).with_name(name)), "--help")
    assert traps.sprung() == []


def test_the_lab_s_switch(traps: Traps, tmp_path: Path) -> None:
    config, control = tmp_path / "ports.toml", tmp_path / "control.sock"
    config.write_text(f'[switch]\ncontrol = "{control}"\n')
    programs.only_installed()
    with SwitchProcess(config, control, tmp_path / "log") as switch:
        assert Path(f"/proc/{switch.pid}/cwd").readlink() == traps.directory
        run(*programs.python("vswitch.cli.ctl", "--socket", str(control), "show"))
    assert traps.sprung() == []


def test_what_make_installs(traps: Traps, tmp_path: Path) -> None:
    """With the `apt-get` that is installed, though the current directory comes first."""
    tool, real = tmp_path / "tool", tmp_path / "installed" / "apt-get"
    real.parent.mkdir()
    real.write_text(f'#!/bin/sh\ncase "$*" in *install*) : >{tool};; esac\n')
    real.chmod(0o755)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import os, pathlib; os.geteuid = lambda: 0\n"
        "from vswitch.lab import requirements\n"
        f"tool = requirements.Requirement('it', 'it', pathlib.Path({str(tool)!r}).exists)\n"
        "requirements.GROUPS['build'] = (tool,)\n"
        "sys.argv[1:] = ['--install', 'build']\n"
        "raise SystemExit(requirements.main())\n"
    )
    environment = {"PATH": traps.first(f"{real.parent}:/usr/bin:/bin")}
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tool.exists()
    assert traps.sprung() == []
