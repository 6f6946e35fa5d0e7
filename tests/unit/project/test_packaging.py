"""What is handed out: a source distribution of the whole tree, and a package with its examples."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path, PurePath

import pytest

from vswitch import __version__

ROOT = Path(__file__).parents[3]
EXAMPLES = Path("vswitch/examples")
"""A link to config/, so that packages have what is in there."""
MADE_BY_SETUPTOOLS = re.compile(r"PKG-INFO|setup\.cfg|vswitch\.egg-info/.*")

# What is compiled for a package, said by setup.py itself; nothing is.
PRINT_EXTENSIONS = """
import runpy, setuptools, sys
setuptools.setup = lambda ext_modules, **_: print(*[each.name for each in ext_modules])
sys.argv = ["setup.py", "egg_info"]
runpy.run_path("setup.py")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree with all that was built in it, for setuptools to write into."""
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    leave = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", ".cache", "build")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=leave)
    # As `vswitch start --config config/demo.toml` leaves it, and an older setup.py.
    (copy / "config/run").mkdir(exist_ok=True)
    (copy / "config/run/control.sock.rings").touch()
    egg_info = copy / "vswitch.egg-info"
    egg_info.mkdir(exist_ok=True)
    (egg_info / "SOURCES.txt").write_text("vswitch/fastpath/main/engine.c\n")
    return copy


def setup(tree: Path, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *words],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def cloned() -> set[PurePath]:
    """The files that a clone would have if this tree were committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {PurePath(name) for name in listed.split("\0") if name and (ROOT / name).exists()}
    config = {path for path in found if path.parts[0] == "config"}
    return found - {EXAMPLES} | {EXAMPLES.joinpath(*path.parts[1:]) for path in config}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what belongs in it is told by git")
def test_a_source_distribution_is_the_whole_tree_and_nothing_generated(
    tree: Path, tmp_path: Path
) -> None:
    assert list(tree.glob("vswitch/fastpath/main/engine.*.so")), "this test is to see built files"
    setup(tree, "sdist", "--dist-dir", str(tmp_path))
    name = f"vswitch-{__version__}"
    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        members = [member for member in archive if not member.isdir()]
    assert [member.name for member in members if not member.isreg()] == []
    paths = {PurePath(member.name).relative_to(name) for member in members}
    made = {path for path in paths if MADE_BY_SETUPTOOLS.fullmatch(str(path))}
    assert sorted(paths - made) == sorted(cloned())


def test_the_package_has_its_examples_and_its_unit(tree: Path, tmp_path: Path) -> None:
    setup(tree, "build_py", "--build-lib", str(tmp_path))
    installed = tmp_path / EXAMPLES
    config = {path.name: path.read_text() for path in (ROOT / "config").iterdir() if path.is_file()}
    assert {path.name: path.read_text() for path in installed.iterdir()} == config
    assert "vswitch.service" in config
    assert not installed.is_symlink()


def test_a_package_has_nothing_of_tests_and_benchmarks(tree: Path, tmp_path: Path) -> None:
    """Their Cython modules were built in this tree, too."""
    assert list(tree.glob("tests/native/scribble.*.so"))
    assert list(tree.glob("benchmarks/native/probe.*.so"))
    setup(tree, "build_py", "--build-lib", str(tmp_path), "install_lib", "--skip-build",
          "--build-dir", str(tmp_path), "--install-dir", str(tmp_path / "installed"))  # fmt: skip
    assert [path.name for path in (tmp_path / "installed").iterdir()] == ["vswitch"]
    said = subprocess.run(
        [sys.executable, "-c", PRINT_EXTENSIONS], cwd=tree, capture_output=True, text=True,
        check=True,
    ).stdout.split()  # fmt: skip
    assert "vswitch.fastpath.main.engine" in said
    assert [name for name in said if not name.startswith("vswitch.")] == []


def test_examples_are_found(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vswitch", "examples"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).resolve() == ROOT / "config"
