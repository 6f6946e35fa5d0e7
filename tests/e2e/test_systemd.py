"""The unit under a real systemd, booted in namespaces over a copy-on-write view of this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "systemd"
SYSTEMD = Path("/lib/systemd/systemd")
PATIENCE_S = 280.0
CONFIGURATION = """
[[port]]
name = "vm1"
socket = "/run/vswitch/vm1.sock"

[[port]]
name = "vm2"
socket = "/run/vswitch/vm2.sock"

[uplink]
type = "tap"
name = "vswitch0"
"""


def what_is_missing() -> str | None:
    """Why systemd cannot be booted here, or None."""
    if not SYSTEMD.exists():
        return "systemd is not installed"
    if Path("/run/systemd/system").exists():
        return "this machine is run by systemd, and is left alone"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    for program in ("unshare", "findmnt", "useradd", "pivot_root"):
        if not shutil.which(program):
            return f"no {program}"
    have = Path("/proc/filesystems").read_text().split()
    if not {"overlay", "cgroup2"} <= set(have):
        return "the kernel has no overlay or cgroup2"
    # The service may not look into /root, where the interpreter of a test may be.
    version = subprocess.run(
        ["/usr/bin/python3", "-c", "import sys, venv; print(*sys.version_info[:2])"],
        capture_output=True,
        text=True,
    ).stdout.split()
    if version != [str(number) for number in sys.version_info[:2]]:
        return "/usr/bin/python3 is not of the version that vswitch is built for"
    return None


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of everything in systemd/driver.py."""
    if missing := what_is_missing():
        pytest.skip(missing)
    work = tmp_path_factory.mktemp("systemd")
    configuration = work / "ports.toml"
    configuration.write_text(CONFIGURATION)
    done = subprocess.run(
        [
            str(HERE / "boot.sh"), str(work), sysconfig.get_path("purelib"), str(ROOT / "vswitch"),
            str(configuration), str(HERE / "driver.py"),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip
    said = work / "out" / "result.json"
    log = work / "out" / "log"
    trail = f"{done.stdout}{done.stderr}{log.read_text() if log.exists() else ''}"
    assert said.exists(), trail
    found: dict[str, Any] = json.loads(said.read_text())
    assert "error" not in found, f"{found['error']}\n{trail}"
    return found


pytestmark = [
    pytest.mark.root("boots systemd"),
    pytest.mark.slow,
    pytest.mark.timeout(int(PATIENCE_S) + 20),
]


def test_it_starts_and_says_so(result: dict[str, Any]) -> None:
    assert result["started"] == ["active", "running", "2 ports, 1 uplink"]


def test_it_has_no_more_rights_than_it_needs(result: dict[str, Any]) -> None:
    process = result["process"]
    assert process["Uid"].split()[0] != "0"
    net_admin = 1 << 12
    for kind in ("CapPrm", "CapEff", "CapBnd"):
        assert int(process[kind], 16) == net_admin
    for kind in ("CapInh", "CapAmb"):
        assert int(process[kind], 16) == 0
    assert process["NoNewPrivs"] == "1"
    assert process["Seccomp"] == "2"


def test_guests_exchange_frames(result: dict[str, Any]) -> None:
    """And no system call is made for it that the unit's filter refuses: that would be the end."""
    assert result["arrived"] == result["arrived after that"] == 100
    assert result["uplink"] == "up"


def test_the_watchdog(result: dict[str, Any]) -> None:
    assert result["alive for"] >= 6.0, "three periods"
    assert result["restarts while well"] == "0"
    assert result["hung"] == "watchdog"


def test_crashes_and_the_end(result: dict[str, Any]) -> None:
    assert result["killed"] == "signal"
    assert result["stopped"] == ["inactive", "success", "0"]
    # The journals.
    assert result["left behind"] == ["control.sock.rings"]
