"""`make roots` leaves nothing mounted and deletes nothing that is; it is too long to run here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.roots.roots import ASKED_FOR, COMMANDS, RELEASES, Roots

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"

# In a mount namespace of its own, so that a failure leaves nothing mounted either.
REMOVE = """
import subprocess, sys
from pathlib import Path
from tests.roots.roots import RootsError, _remove
root, precious = Path(sys.argv[1]), Path(sys.argv[2])
subprocess.run(["mount", "--bind", precious, root / "mnt"], check=True)
try:
    _remove(root)
except RootsError as error:
    print(error)
subprocess.run(["umount", root / "mnt"], check=True)
_remove(root)
print(root.exists())
"""


def mounts() -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


@pytest.mark.root("mounts")
def test_nothing_is_deleted_through_a_mount(tmp_path: Path) -> None:
    root, precious = tmp_path / "root", tmp_path / "precious"
    (root / "mnt").mkdir(parents=True)
    precious.mkdir()
    (precious / "file").write_text("of somebody else")
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", REMOVE, str(root), str(precious)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    refused, exists = done.stdout.splitlines()
    assert refused == f"{root} is not deleted: {root}/mnt is mounted; umount it first"
    assert exists == "False"
    assert (precious / "file").read_text() == "of somebody else"


@pytest.mark.root("mounts")
def test_what_goes_wrong_inside_leaves_nothing_mounted(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for place in ("proc", "sys", "run", "dev", "etc", "root"):
        (root / place).mkdir(parents=True)
    (root / "etc/hostname").write_text("no-system\n")
    before, name = mounts(), Path("/proc/sys/kernel/hostname").read_text()
    log = tmp_path / "log"
    with log.open("w") as file:
        # There is not even a shell.
        assert Roots(tmp_path, keep=False)._inside(root, "demo", file) == 127
    assert "/bin/bash" in log.read_text()
    assert mounts() == before
    assert Path("/proc/sys/kernel/hostname").read_text() == name
    assert (root / ".outside").is_dir(), "it came as far as to the new root"
    assert list((root / "dev").iterdir()) == list((root / "proc").iterdir()) == []


def test_unknown_words_are_refused() -> None:
    for words in (["debian-99"], ["--commands", "demo,nothing"]):
        done = subprocess.run(
            [sys.executable, "-m", "tests.roots.roots", *words],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "is none of" in done.stderr


def test_it_does_what_the_readme_says() -> None:
    text = " ".join(README.read_text().split())
    assert "with Python 3.11 or newer, git and make" in text
    assert ASKED_FOR == ("python3", "git", "make")
    for release in RELEASES:
        assert release.name.replace("-", " ").split()[1] in text
    for command in COMMANDS[:2]:
        assert f"$ make {command} " in text
