"""The systemd unit: it starts what there is to start, and leaves the switch little else."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from vswitch.cli.main import cli, start

UNIT = Path(__file__).parents[2] / "config" / "vswitch.service"
EXPOSURE_MAX = 2.5


@pytest.fixture
def service() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(UNIT.read_text())
    return unit["Service"]


def test_it_starts_the_switch(service: configparser.SectionProxy) -> None:
    program, command, *arguments = service["ExecStart"].split()
    assert Path(program).name == "vswitch"
    assert command in cli.commands
    context = start.make_context(command, arguments)
    assert context.params["config_path"] == Path("/etc/vswitch/ports.toml")
    # Where vswitchctl looks for it as root, in the directory that systemd makes.
    assert context.params["control"] == "/run/vswitch/control.sock"
    assert service["RuntimeDirectory"] == "vswitch"
    assert service["RuntimeDirectoryPreserve"] == "yes", "journals are to outlive a restart"


def test_it_is_told_of_readiness_and_life(service: configparser.SectionProxy) -> None:
    assert service["Type"] == "notify"
    assert service["NotifyAccess"] == "main"
    assert float(service["WatchdogSec"]) > 0
    assert service["Restart"] == "on-failure"


def test_it_has_one_capability_and_one_device(service: configparser.SectionProxy) -> None:
    assert service["User"] != "root"
    assert service["AmbientCapabilities"] == service["CapabilityBoundingSet"] == "CAP_NET_ADMIN"
    assert service["DeviceAllow"] == "/dev/net/tun rw"
    assert service["NoNewPrivileges"] == "yes"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_what_systemd_thinks_of_it() -> None:
    done = subprocess.run(
        [
            "systemd-analyze", "security", "--offline=yes", "--no-pager",
            f"--threshold={int(EXPOSURE_MAX * 10)}", str(UNIT),
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nknown" not in done.stderr, "a key that systemd does not know"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_its_filter_leaves_what_postcopy_takes(service: configparser.SectionProxy) -> None:
    """A process is started, makes a userfaultfd and confines itself further."""
    left = system_calls(service["SystemCallFilter"])
    assert {"userfaultfd", "pidfd_open", "vfork", "execve", "prctl", "mmap", "ioctl"} <= left


def system_calls(group: str) -> set[str]:
    """Those of a group of systemd's, and of the groups in it."""
    done = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter", group],
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line.strip() for line in done.stdout.splitlines()[1:]]
    found = {name for name in names if name and name[0] not in "@#"}
    return found.union(*(system_calls(name) for name in names if name.startswith("@")))
