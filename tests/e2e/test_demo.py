"""`vswitch demo`, which is `make demo` after the build."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.testbed import PATIENCE_S, wait_until
from tests.support.namespaces import Namespace
from tests.support.traps import Traps
from vswitch.lab.qemu import process

VSWITCH = Path(sys.executable).with_name("vswitch")


@dataclass
class Place:
    """Where a demo runs."""

    environment: dict[str, str]
    enter: tuple[str, ...] = ()
    """What is put before a command, so that it runs in the network namespace of this place."""

    def demo(self, *options: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.enter, VSWITCH, "demo", *options],
            env=self.environment | ({} if path is None else {"PATH": str(path)}),
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )


@pytest.fixture
def interfaces_stay() -> Iterator[tuple[str, ...]]:
    """What enters a network namespace in which no interface may come to stay.

    One of the tests' own, as interfaces of the host come and go as others like, other demos among
    them. Nobody but root can make one, namespace or interface.
    """
    if os.geteuid() != 0:
        yield ()
        return
    nsenter = shutil.which("nsenter")
    assert nsenter is not None
    with Namespace() as namespace:
        before = namespace.inside(socket.if_nameindex)
        yield (nsenter, f"--target={namespace.pid}", "--net")
        assert namespace.inside(socket.if_nameindex) == before


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interfaces_stay: tuple[str, ...]
) -> Iterator[Place]:
    """A place whose temporary files go to an empty directory, which must stay empty.

    Its current directory is of somebody who would have the demo run other programs.
    """
    # Not tmp_path itself: with the demo's own names below it, its socket paths would be too long.
    scratch = tmp_path / "t"
    scratch.mkdir()
    traps = Traps(tmp_path / "elsewhere")
    monkeypatch.chdir(traps.directory)
    path = traps.first(os.environ["PATH"])
    yield Place(
        os.environ | {"TMPDIR": str(scratch), "COLUMNS": "120", "PATH": path}, interfaces_stay
    )
    assert traps.sprung() == []
    assert list(scratch.iterdir()) == []
    assert processes_that_mention(scratch) == []


def processes_that_mention(path: Path) -> list[str]:
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(path) in words:
            found.append(words)
    return found


def matrix(output: str) -> dict[str, list[str]]:
    """Row -> cells of the ping matrix in what the demo printed."""
    rows = re.findall(r"^│ (\S+)\s+10\.77\.\d+\.\d+ +│(.*)│$", output, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("│")] for name, cells in rows}


@pytest.mark.parametrize("kind", ["qemu", "software"])
def test_every_pair_answers(place: Place, kind: str) -> None:
    done = place.demo("--guests", kind)
    assert done.returncode == 0, done.stdout + done.stderr
    pings = matrix(done.stdout)
    # Only root can make a TAP interface.
    stations = ["vm1", "vm2", "vm3"] + ["host"] * (os.geteuid() == 0)
    assert list(pings) == stations
    for number, cells in enumerate(pings.values()):
        assert cells.pop(number) == "-"
        assert len(cells) == len(stations) - 1
        assert all(float(cell) > 0 for cell in cells)
    for port in ("vm1", "vm2", "vm3"):
        learned = rf"^52:54:00:77:00:0\d +0 +default +{port} +learned"
        assert re.search(learned, done.stdout, re.MULTILINE)
        assert re.search(rf"^{port} +[1-9]\d* ", done.stdout, re.MULTILINE)
    pairs = len(stations) * (len(stations) - 1)
    assert f"all {pairs} pings were answered" in done.stdout


def test_software_guests_where_qemu_and_apt_are_missing(place: Place, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    done = place.demo(path=programs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no QEMU guests: missing: qemu-system-x86_64, busybox" in done.stdout
    assert "hint: " in done.stdout
    assert "using the built-in software guests instead" in done.stdout
    assert "3 software guests are up" in done.stdout
    # `ip` is missing as well, and with it the uplink.
    assert "no TAP uplink, so this host takes no part" in done.stdout
    assert list(matrix(done.stdout)) == ["vm1", "vm2", "vm3"]
    assert "all 6 pings were answered" in done.stdout


def test_qemu_guests_asked_for_and_missing_is_an_error(place: Place, tmp_path: Path) -> None:
    done = place.demo("--guests", "qemu", path=tmp_path)
    assert done.returncode == 1
    assert "missing: qemu-system-x86_64" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_nothing_behind(
    place: Place, tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "demo.log"
    # A job in the background of a shell ignores it, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [*place.enter, str(VSWITCH), "demo", "--guests", "qemu"]
    demo = process.start(command, log=log, env=place.environment)
    try:
        wait_until("guests boot", lambda: b"waiting for vm1 to boot" in log.read_bytes())
        assert any("qemu-system" in line for line in processes_that_mention(tmp_path / "t"))
        demo.send_signal(number)
        assert demo.wait(PATIENCE_S) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
        process.kill(demo)
