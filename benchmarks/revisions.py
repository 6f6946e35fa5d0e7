"""Builds of single revisions of this repository, beside each other and ready to be run.

Each is a wheel made of that revision's files, installed into a virtual environment that has nothing
else of its own: whatever a revision starts is that revision's, and both sides of a comparison were
built by one compiler with one Python.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import BenchmarkError
from vswitch.lab import programs, requirements

ROOT = Path(__file__).parents[1]
BUILDS = ROOT / "build" / "revisions"
WORKING_TREE = "working tree"
"""Names the tracked files as they are, committed or not."""
_BUILD_TIMEOUT_S = 900


@dataclass(frozen=True, slots=True)
class Revision:
    """A commit by the name that was asked for, and its full hash."""

    name: str
    commit: str

    @property
    def title(self) -> str:
        return f"{self.name} ({self.commit[:10]})"


@dataclass(frozen=True, slots=True)
class Build:
    """An installed revision; `program` is its `vswitch`."""

    revision: Revision
    program: Path


def find(name: str, root: Path = ROOT) -> Revision:
    """The commit that git knows by this name; BenchmarkError if there is none.

    For WORKING_TREE it is a commit of no branch, or HEAD where nothing is changed.
    """
    if name == WORKING_TREE:
        changed = _git(root, "stash", "create")
        return Revision(name, changed or _git(root, "rev-parse", "HEAD"))
    try:
        commit = _git(
            root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"
        )
    except BenchmarkError:
        raise BenchmarkError(
            f"git knows no revision {name!r}",
            hint="give a commit, a tag or a branch of this repository, like HEAD~5",
        ) from None
    return Revision(name, commit)


def build(revision: Revision, root: Path = ROOT, builds: Path = BUILDS) -> Build:
    """Build and install it, unless that was done before. Takes about a minute.

    Raises BenchmarkError with the end of what the build said.
    """
    home = builds / revision.commit
    done = Build(revision, home / "bin" / "vswitch")
    if done.program.exists():
        return done
    builds.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="source-", dir=builds) as folder:
        source = Path(folder)
        archive = source / "revision.tar"
        _git(root, "archive", "--format=tar", f"--output={archive}", revision.commit)
        with tarfile.open(archive) as tar:
            # Python 3.11.2, as in Debian 12, has no filters; git made this archive.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(source)  # noqa: S202
        shutil.rmtree(home, ignore_errors=True)
        try:
            venv.create(home, symlinks=True)
            _share_packages(home)
            _install(home, source, revision)
        except BaseException:
            # Half a build must not pass for one next time.
            shutil.rmtree(home, ignore_errors=True)
            raise
    return done


def _share_packages(home: Path) -> None:
    """Let it see what is installed here: Cython to build with, and what vswitch depends on.

    A path in a .pth file comes behind the environment's own packages, and .pth files that lie there
    are not read: the vswitch that is installed here for editing stays out of sight.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = home / "lib" / version / "site-packages"
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")


def _install(home: Path, source: Path, revision: Revision) -> None:
    command = programs.python("pip", "--python", str(home / "bin" / "python"))
    command += ["install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", str(source)]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_BUILD_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"building {revision.title} took too long") from None
    if ran.returncode:
        end = "\n".join((ran.stdout + ran.stderr).strip().splitlines()[-15:])
        raise BenchmarkError(f"{revision.title} cannot be built:\n{end}")


def _git(root: Path, *arguments: str) -> str:
    try:
        ran = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        hint = requirements.installing("git")
        raise BenchmarkError("git is not installed", hint=hint) from None
    if ran.returncode:
        said = ran.stderr.strip() or f"exit code {ran.returncode}"
        raise BenchmarkError(f"git {arguments[0]}: {said}")
    return ran.stdout.strip()
