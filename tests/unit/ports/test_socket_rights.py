"""Who may connect to a socket, and what is said when nobody but its owner may."""

from __future__ import annotations

import grp
import logging
import os
import pwd
import time
from pathlib import Path

import pytest

from vswitch.config.settings import PortSettings
from vswitch.ports import diagnosis as port_diagnosis
from vswitch.ports import socket_rights
from vswitch.ports.diagnosis import PortDiagnosis

ME = pwd.getpwuid(os.geteuid()).pw_name
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to others, as only root may")


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an earlier test has made of the logs of vswitch."""
    monkeypatch.setattr(logging.getLogger("vswitch"), "propagate", True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    path = tmp_path / "vm1.sock"
    path.touch()
    path.chmod(0o755)
    return path


def test_what_the_umask_leaves_lets_nobody_else_in(path: Path) -> None:
    assert socket_rights.only_owner(path) == ME
    path.chmod(0o777)
    assert socket_rights.only_owner(path) is None
    path.parent.chmod(0o700)
    assert socket_rights.only_owner(path) == ME
    path.unlink()
    assert socket_rights.only_owner(path) is None


@needs_root
def test_groups(path: Path) -> None:
    other = next(entry for entry in grp.getgrall() if entry.gr_name not in {"root", ME})
    path.chmod(0o770)
    os.chown(path, 0, 0)
    assert socket_rights.only_owner(path) == "root"
    os.chown(path, 0, other.gr_gid)
    assert socket_rights.only_owner(path) is None
    path.chmod(0o750)
    assert socket_rights.only_owner(path) == "root"
    os.chown(path, 4_000_000, 4_000_000)
    assert socket_rights.only_owner(path) == "4000000"


def settings(path: Path, mode: str = "server") -> PortSettings:
    return PortSettings.model_validate({"name": "vm1", "socket": path, "mode": mode})


def test_it_is_said_at_the_start_and_when_nobody_has_come_for_a_while(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with caplog.at_level("INFO", logger="vswitch"):
        diagnosis = PortDiagnosis(settings(path))
        diagnosis.opened()
    who = ME if ME == "root" else f"{ME} and root"
    assert f"only {who} may connect to {path} ({ME}:" in caplog.text
    assert diagnosis.nobody_may is None
    now[0] += port_diagnosis.NOBODY_S
    said = diagnosis.nobody_may or ""
    assert f"only {who} may connect to {path}" in said
    assert 'group = "kvm" and permissions = "0660"' in said
    assert "--group kvm --permissions 0660" in said
    diagnosis.connected(None)  # type: ignore[arg-type]  # whoever it was
    assert diagnosis.nobody_may is None


def test_nothing_is_said_of_sockets_that_are_open_or_not_ours(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = PortDiagnosis(settings(path, "client"))
    client.opened()
    path.chmod(0o777)
    opened = PortDiagnosis(settings(path))
    opened.opened()
    for diagnosis in (client, opened):
        diagnosis._opened -= port_diagnosis.NOBODY_S
        assert diagnosis.nobody_may is None
    assert caplog.text == ""
