"""The `vswitch` command line, as far as no switch has to run for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import environment
from vswitch import __version__


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vswitch", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_version_and_help_do_not_need_the_heavy_parts() -> None:
    assert run("--version").stdout == f"vswitch {__version__}\n"
    code = (
        "import sys\nfrom vswitch.cli.main import cli\n"
        "cli.main(['--help'], standalone_mode=False)\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert "demo" in done.stdout
    assert "start" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert loaded.isdisjoint(
        {"pydantic", "rich", "uvloop", "vswitch.lab.qemu.demo", "vswitch.daemon.process"}
    )


@pytest.mark.parametrize("words", [["--help"], ["list-ports"], ["add-port", "a", "b"], ["stats"]])
def test_a_call_of_vswitchctl_loads_what_it_needs(words: list[str], tmp_path: Path) -> None:
    """Without a switch it gets as far as connecting to one."""
    code = (
        f"import sys\nsys.argv = {['vswitchctl', '-s', str(tmp_path / 'none'), *words]}\n"
        "from vswitch.cli.ctl import main\ntry:\n    main()\nfinally:\n    print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if words == ["--help"] else 3)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {"click", "vswitch.cli.ctl"} <= loaded
    heavy = {"asyncio", "dataclasses", "json", "pydantic", "rich", "shutil", "uvloop"}
    # A column for each counter: `stats` has to know them.
    heavy |= set() if words == ["stats"] else {"vswitch.api"}
    if words == ["--help"]:
        heavy.remove("shutil")  # click's own
        heavy |= {"socket", "msgpack", "vswitch.control.client", "vswitch.cli.ports"}
    if words[0] != "add-port":
        heavy.add("vswitch.config.keys")
    assert loaded & heavy == set()


def test_check_says_what_is_in_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('[[port]]\nname = "vm1"\nsocket = "vm1"\n')
    done = run("start", "--config", str(path), "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{path}: good: 1 port(s), 0 uplink(s)\n"
    assert list(tmp_path.iterdir()) == [path]


def test_every_mistake_of_a_file_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(
        "[switch]\nworkers = 0\ncolour = 1\n"
        '[[port]]\nname = "a"\nsocket = "s"\nmode = "both"\n'
        '[[port]]\nname = "a"\nsocket = "s"\npermissions = "0888"\n'
        '[uplink]\nname = "far-too-long-for-an-interface"\n'
    )
    done = run("start", "--config", str(path), "--check")
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.removeprefix("vswitch: ").splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    for key in ("switch.workers", "switch.colour", "mode", "name", "socket", "permissions"):
        assert any(f"{key}: " in line for line in lines), key
    assert sum("name: " in line for line in lines) == 2
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["start", "--check"], 2, "--config FILE"),
        (["start", "--config", "/nonexistent/x.toml"], 1, "No such file"),
        (["start", "--config", "/"], 1, "cannot be read"),
        (["start", "--log-level", "loud"], 2, "'loud' is not one of"),
        (["start", "--control", "/" + "x" * 120], 1, "at most 107"),
        (["frobnicate"], 2, "No such command"),
        (["start", "extra"], 2, "unexpected extra argument"),
    ],
)
def test_wrong_usage(arguments: list[str], code: int, text: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["-s", "/a"], "1 sockets given"), (["--size", "7"], "7 is not in the range")],
)
def test_wrong_usage_is_json_where_json_is_asked_for(arguments: list[str], text: str) -> None:
    done = run("bench", "--json", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    error = json.loads(done.stderr)["error"]
    assert error["code"] == "usage"
    assert text in error["message"]


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('[[port]]\nname = "a\n')
    done = run("start", "--config", str(path))
    assert done.returncode == 1
    assert f"{path}: line 2" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    done = run("completion", shell)
    assert done.returncode == 0
    assert "_VSWITCH_COMPLETE" in done.stdout
