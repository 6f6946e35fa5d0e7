"""What the README says a normal user can do, by one who has nothing set in the environment."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.frames import frame, mac
from vswitch.control.protocol import default_socket_paths, is_own, temporary_directory
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.guest.packets import format_mac

EXAMPLE = Path(__file__).parents[2] / "config" / "user.toml"
UID = os.geteuid() or 54321
DEADLINE_S = 30.0

# What is imported may lie where only root can read, as in a clone in root's home.
BECOME = f"""
import os, sys, uvloop, vswitch.config.read, vswitch.config.write, vswitch.daemon.process
import vswitch.switch
import concurrent.futures.thread, importlib, json, pkgutil, unicodedata, vswitch.control.client
import vswitch.cli
from vswitch.cli import ctl, main
for module in pkgutil.iter_modules(vswitch.cli.__path__, "vswitch.cli."):
    importlib.import_module(module.name)
from vswitch.relay.process import hold_program
hold_program()
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid({UID}, {UID}, {UID})
    os.setresuid({UID}, {UID}, {UID})
os.environ.clear()
os.umask(0o022)
"""


class User:
    """Runs commands in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.parent.chmod(0o755)
        directory.mkdir()
        os.chown(directory, UID, UID)
        self._switch: subprocess.Popen[str] | None = None

    def _popen(self, command: str, *arguments: str) -> subprocess.Popen[str]:
        code = f"{BECOME}\n{command}.main()"
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code, *arguments],
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start(self, *arguments: str) -> str:
        """`vswitch start`; the line that says it is ready."""
        self._switch = self._popen("main", "start", *arguments)
        assert self._switch.stderr is not None
        said = []
        for line in self._switch.stderr:
            said.append(line)
            if line.startswith("vswitch: ready"):
                return line
        raise AssertionError("".join(said))

    def stop(self) -> int:
        assert self._switch is not None
        self._switch.terminate()
        self._switch.communicate(timeout=DEADLINE_S)
        return self._switch.returncode

    def refused(self, *arguments: str) -> str:
        """What `vswitch start` says that cannot start."""
        process = self._popen("main", "start", *arguments)
        said = process.communicate(timeout=DEADLINE_S)[1]
        assert process.returncode == 1
        return said

    def ctl(self, *words: str) -> Any:
        process = self._popen("ctl", "--json", *words)
        out, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, said
        return json.loads(out)

    def close(self) -> None:
        if self._switch is not None and self._switch.poll() is None:
            self._switch.kill()
            self._switch.communicate()


@pytest.fixture
def user(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[User]:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    control = default_socket_paths(UID)[0]
    if control.exists():
        pytest.skip(f"a switch of this user has {control}")
    existed = control.parent.exists()
    one = User(run_dir / tmp_path.name[-8:])
    shutil.copy(EXAMPLE, one.directory / EXAMPLE.name)
    yield one
    one.close()
    if not existed:
        shutil.rmtree(control.parent, ignore_errors=True)


def exchange(directory: Path) -> None:
    with SoftwareGuest(mac(1)) as a, SoftwareGuest(mac(2)) as b:
        a.connect(directory / "vm1.sock")
        b.connect(directory / "vm2.sock")
        for sender, receiver in ((a, b), (b, a)):
            sent = frame(format_mac(receiver.mac), format_mac(sender.mac), 60, 1)
            sender.send([sent])
            assert receiver.recv(1) == [sent]


def test_the_lab_of_the_readme(user: User) -> None:
    control = default_socket_paths(UID)[0]
    assert f"2 ports, control socket {control}" in user.start("--config", "user.toml")
    assert is_own(control.parent, UID)
    assert control.stat().st_uid == UID
    assert control.stat().st_mode & 0o777 == 0o600
    exchange(user.directory)
    user.ctl("add-port", "vm3", "vm3.sock")
    assert [port["name"] for port in user.ctl("show")] == ["vm1", "vm2", "vm3"]
    assert (user.directory / "vm3.sock").stat().st_uid == UID
    frames = {one["name"]: one["ingress_frames"] for one in user.ctl("stats")}
    assert frames == {"vm1": 1, "vm2": 1, "vm3": 0}
    assert user.stop() == 0
    assert not control.exists()


def test_a_switch_without_a_configuration(user: User) -> None:
    assert "0 ports" in user.start()
    for name in ("vm1", "vm2"):
        user.ctl("add-port", name, f"{name}.sock")
    exchange(user.directory)
    user.ctl("stop")


@pytest.mark.parametrize(
    "whose",
    [
        "anybody's",
        pytest.param("another's", marks=pytest.mark.root("makes a directory of another user")),
        "a link's target",
    ],
)
def test_where_others_may_write_no_socket_is_made(user: User, whose: str) -> None:
    """/tmp is anybody's: a directory with our name may have been made by another user."""
    directory = temporary_directory(UID)
    if default_socket_paths(UID)[0].parent != directory:
        pytest.skip("this user has a runtime directory")
    # One that this user has of an earlier switch.
    aside = directory.with_name(f"{directory.name}-aside")
    if directory.exists():
        directory.rename(aside)
    if whose == "a link's target":
        directory.symlink_to(user.directory)
    else:
        directory.mkdir()
        os.chown(directory, UID + (whose == "another's"), -1)
        directory.chmod(0o777)
    try:
        assert "is somebody else's" in user.refused("--config", "user.toml")
        # Nor does a client talk to whoever listens there.
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "control.sock"))
            listener.listen()
            with pytest.raises(AssertionError, match=r"connect to /run/vswitch/control\.sock"):
                user.ctl("show")
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
    finally:
        if directory.is_symlink():
            directory.unlink()
        else:
            shutil.rmtree(directory)
        if aside.exists():
            aside.rename(directory)
