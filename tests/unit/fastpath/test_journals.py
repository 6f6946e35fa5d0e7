"""Journal files and the journals that frontends keep."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.journal import SLOT_LEN
from vswitch.fastpath.main.port import MAX_VRINGS
from vswitch.fastpath.main.ring import Ring
from vswitch.ports.journals import Journals, make_shared, open_shared


def test_a_journal_is_made_kept_and_forgotten(tmp_path: Path) -> None:
    journals = Journals(tmp_path / "rings")
    assert journals.open("vm1", 4) is not None
    file = tmp_path / "rings" / "vm1.rings"
    assert file.stat().st_size == 4 * SLOT_LEN
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "rings").stat().st_mode & 0o777 == 0o700
    file.write_bytes(b"x" * 4 * SLOT_LEN)
    assert journals.open("vm1", 4) is not None
    assert file.read_bytes() == b"x" * 4 * SLOT_LEN
    journals.forget("vm1")
    assert not (tmp_path / "rings").exists()
    journals.forget("vm1")


def test_a_journal_of_another_size_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "vm1.rings").write_bytes(b"x" * 100)
    assert Journals(tmp_path).open("vm1", 2) is not None
    assert (tmp_path / "vm1.rings").read_bytes() == bytes(2 * SLOT_LEN)


@pytest.mark.parametrize("what", ["link", "directory", "pipe", "no directory"])
def test_what_cannot_be_a_journal_is_done_without(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "vm1.rings"
    if what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    directory = tmp_path / "a" / "b" if what == "no directory" else tmp_path
    assert Journals(directory).open("vm1", 2) is None
    assert "port vm1: no journal" in caplog.text
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("others may write", "mode is 0757, so that others may write to it: chmod 700"),
        ("its group may write", "mode is 0770, so that others may write to it: chmod 700"),
        ("sticky", "mode is 1777, so that others may write"),
        ("somebody else's", "belongs to uid"),
        ("a link", "Not a directory"),
        ("a file", "File exists"),
    ],
)
def test_a_directory_that_others_may_change_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    what: str, why: str,
) -> None:  # fmt: skip
    directory = tmp_path / "rings"
    ours = Journals(directory)
    assert ours.open("vm1", 2) is not None
    modes = {"others may write": 0o757, "its group may write": 0o770, "sticky": 0o1777}
    if what in modes:
        directory.chmod(modes[what])
    elif what == "somebody else's":
        somebody = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: somebody)
    else:
        directory.rename(tmp_path / "elsewhere")
        if what == "a link":
            directory.symlink_to(tmp_path / "elsewhere")
        else:
            directory.touch()
    assert ours.open("vm1", 2) is None
    assert why in caplog.text
    assert "port vm1: no journal" in caplog.text
    ours.forget("vm1")
    kept = tmp_path / ("rings" if what in modes or "else" in what else "elsewhere")
    assert (kept / "vm1.rings").exists()


def mapped(path: Path) -> bool:
    """Whether a file, deleted or not, is mapped by this process."""
    return str(path) in Path("/proc/self/maps").read_text()


def test_a_journal_lets_go_of_its_file_whoever_has_it(tmp_path: Path) -> None:
    journals = Journals(tmp_path / "rings")
    path = tmp_path / "rings" / "vm1.rings"
    journal = journals.open("vm1", MAX_VRINGS)
    assert journal is not None
    assert mapped(path)
    engine = Engine()
    port = engine.add_port("vm1")
    port.use_journal(journal)
    ring = Ring(port, 0)
    engine.remove_port(port)
    engine.forget(port)
    assert not mapped(path)
    before = path.read_bytes()
    ring.forget_journal()  # somebody who has not heard of it yet harms nothing
    assert path.read_bytes() == before


def test_shared_journals_come_back_and_nothing_else_does() -> None:
    fd, size = make_shared(4)
    try:
        assert open_shared(fd, size, 0, 4).size == 4
        for wrong in ((size - 1, 0), (size, 4096), (2**64 - 1, 0)):
            with pytest.raises(OSError, match=f"are not {4 * SLOT_LEN} and 0"):
                open_shared(fd, *wrong, 4)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_shared_journal_must_be_sealed_and_whole(sealed: bool) -> None:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 100 if sealed else 4 * SLOT_LEN)
        if sealed:
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(OSError, match="not the one from GET_INFLIGHT_FD"):
            open_shared(fd, 4 * SLOT_LEN, 0, 4)
    finally:
        os.close(fd)
