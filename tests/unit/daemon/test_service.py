"""The systemd unit: it starts what there is to start, and leaves the switch little else."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vswitch.cli.main import cli, start

UNIT = Path(__file__).parents[3] / "config" / "vswitch.service"
EXPOSURE_MAX = 2.5
PLAIN = os.environ | {"SYSTEMD_COLORS": "0", "SYSTEMD_URLIFY": "0", "LC_ALL": "C"}


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
        env=PLAIN,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nknown" not in done.stderr, "a key that systemd does not know"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_its_filter_leaves_what_postcopy_takes(service: configparser.SectionProxy) -> None:
    """A process is started, makes a userfaultfd and confines itself further."""
    left = system_calls(service["SystemCallFilter"])
    assert {"userfaultfd", "pidfd_open", "vfork", "execve", "prctl", "mmap", "ioctl"} <= left


def test_the_names_in_what_systemd_prints() -> None:
    """systemd 255 underlines and colours them, into a pipe as well."""
    plain = "@io-event\n    # Event loop system calls\n    @timer\n    poll\n\n    epoll_ctl\n"
    coloured = (
        "\x1b[0;1;39m@io-event\x1b[0m\n    \x1b[38;5;245m# Event loop system calls\x1b[0m\n"
        "    \x1b[0;34m@timer\x1b[0m\n    poll\n\n    \x1b[0;4;39mepoll_ctl\x1b[0m\n"
    )
    assert names_in(plain) == names_in(coloured) == {"@timer", "poll", "epoll_ctl"}


def names_in(said: str) -> set[str]:
    """System calls and other groups in what systemd-analyze says of a group."""
    lines = re.sub("\x1b\\[[0-9;]*m", "", said).splitlines()
    names = [line.strip() for line in lines[1:]]
    return {name for name in names if name and name[0] != "#"}


def system_calls(group: str) -> set[str]:
    """Those of a group of systemd's, and of the groups in it."""
    done = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter", group],
        capture_output=True,
        text=True,
        check=True,
        env=PLAIN,
    )
    names = names_in(done.stdout)
    groups = {name for name in names if name[0] == "@"}
    return (names - groups).union(*map(system_calls, groups))
