"""Fresh Debian and Ubuntu systems, and in each the README's two commands.

`make roots` as root. For each release a root is made with debootstrap in build/roots, gets what the
README asks for (python3, git, make), a clone of what is committed here, and runs `make demo` and
`make test` in namespaces of its own, then both as a normal user. Whatever is mounted is mounted in
there, and is gone with the last process: nothing is deleted through a mount. Standard library only.

A mirror near you: DEBIAN_MIRROR, DEBIAN_SECURITY_MIRROR, UBUNTU_MIRROR; proxies and pip's index as
always (http_proxy, PIP_INDEX_URL). Certificates in /usr/local/share/ca-certificates are passed on.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).resolve().parent
CLONE = HERE.parents[1]
OWN_CERTIFICATES = Path("/usr/local/share/ca-certificates")
KEYRINGS = Path("/usr/share/keyrings")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
ASKED_FOR = ("python3", "git", "make")
"""What the README says is there."""


class RootsError(Exception):
    """For people: what happened and what to do."""


@dataclass(frozen=True)
class Release:
    """A distribution's release, as debootstrap and apt want it named."""

    name: str
    suite: str
    mirror: str
    sources: tuple[str, ...]
    """What stands in apt's list besides `deb MIRROR SUITE`."""
    components: str
    script: str
    """debootstrap's own, by a name that older versions of it know as well."""
    keyring: str
    keyring_package: str


def _debian(version: int, suite: str) -> Release:
    mirror = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
    security = os.environ.get("DEBIAN_SECURITY_MIRROR", "http://deb.debian.org/debian-security")
    sources = (f"{mirror} {suite}-updates", f"{security} {suite}-security")
    keyring = "debian-archive-keyring.gpg"
    package = "debian-archive-keyring"
    return Release(f"debian-{version}", suite, mirror, sources, "main", "sid", keyring, package)


def _ubuntu(version: str, suite: str) -> Release:
    mirror = os.environ.get("UBUNTU_MIRROR", "http://archive.ubuntu.com/ubuntu")
    sources = tuple(f"{mirror} {suite}-{pocket}" for pocket in ("updates", "security"))
    keyring, package = "ubuntu-archive-keyring.gpg", "ubuntu-keyring"
    components = "main,universe"
    return Release(
        f"ubuntu-{version}", suite, mirror, sources, components, "gutsy", keyring, package
    )


RELEASES = (_debian(13, "trixie"), _ubuntu("24.04", "noble"), _ubuntu("26.04", "resolute"))
COMMANDS = ("demo", "test", "user")


@dataclass
class Result:
    """How a command ended in a root."""

    release: str
    command: str
    code: int
    seconds: float
    closing: str
    """The last line that says what came of it."""


class Roots:
    """The roots in `directory`; what a run makes there beside the bases goes at its end."""

    def __init__(self, directory: Path, *, keep: bool) -> None:
        self._directory = directory
        self._keep = keep

    def run(self, release: Release, commands: Sequence[str]) -> Iterator[Result]:
        """Each command in one fresh root, one after the other."""
        base = self._base(release)
        root = self._directory / f"{release.name}.root"
        _remove(root)
        _say(f"{release.name}: copying the base")
        _run("cp", "-a", "--reflink=auto", str(base), str(root))
        try:
            self._prepare(release, root)
            for command in commands:
                log = self._directory / f"{release.name}-{command}.log"
                _say(f"{release.name}: {command}, log in {log}")
                start = time.monotonic()
                with log.open("w") as file:
                    code = self._inside(root, command, file)
                closing = _closing(log.read_text(errors="replace"))
                yield Result(release.name, command, code, time.monotonic() - start, closing)
        finally:
            if not self._keep:
                _remove(root)

    def _base(self, release: Release) -> Path:
        base = self._directory / f"{release.name}.base"
        if base.exists():
            return base
        keyring = self._keyring(release)
        new = self._directory / f"{release.name}.new"
        _remove(new)
        _say(f"{release.name}: debootstrap from {release.mirror}")
        # It mounts in there, too, and may be interrupted.
        _run(
            "unshare", "--mount", "--pid", "--fork", "--kill-child",
            "debootstrap", "--variant=minbase", f"--components={release.components}",
            f"--keyring={keyring}", "--force-check-gpg", release.suite, str(new), release.mirror,
            release.script, log=self._directory / f"{release.name}-debootstrap.log",
        )  # fmt: skip
        # A release as it is today, not as it was on its first day.
        entries = (f"{release.mirror} {release.suite}", *release.sources)
        components = release.components.replace(",", " ")
        lists = "".join(f"deb {entry} {components}\n" for entry in entries)
        (new / "etc/apt/sources.list").write_text(lists)
        new.rename(base)
        return base

    def _keyring(self, release: Release) -> Path:
        """What the release's archive is signed with: installed here, or from Debian's archive."""
        installed = KEYRINGS / release.keyring
        if installed.exists():
            return installed
        kept = self._directory / release.keyring
        if kept.exists():
            return kept
        debian = RELEASES[0]
        if release.name == debian.name:
            raise RootsError(
                f"{installed} is missing, and what debootstrap fetches cannot be checked; "
                f"apt-get install {release.keyring_package}"
            )
        _say(f"{release.name}: taking {release.keyring_package} from {debian.name}")
        scratch = self._directory / "keyring.root"
        _remove(scratch)
        _run("cp", "-a", "--reflink=auto", str(self._base(debian)), str(scratch))
        try:
            self._prepare(debian, scratch)
            code = self._inside(scratch, f"keyring {release.keyring_package}", sys.stdout)
            if code:
                raise RootsError(f"{release.keyring_package} cannot be had, see above")
            shutil.copy(scratch / "root/keyring/usr/share/keyrings" / release.keyring, kept)
        finally:
            _remove(scratch)
        return kept

    def _prepare(self, release: Release, root: Path) -> None:
        (root / "etc/resolv.conf").unlink(missing_ok=True)
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        (root / "etc/hostname").write_text(f"{release.name}\n")
        (root / "etc/hosts").write_text(f"127.0.0.1 localhost {release.name}\n")
        for certificate in OWN_CERTIFICATES.glob("*.crt"):
            place = root / OWN_CERTIFICATES.relative_to("/")
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(certificate, place)
        _run("git", "clone", "--quiet", "--no-hardlinks", str(CLONE), str(root / "root/vswitch"))

    def _inside(self, root: Path, command: str, log: TextIO) -> int:
        """Run a word of inside.sh in namespaces over `root`; its exit code."""
        certificates = [one.name for one in OWN_CERTIFICATES.glob("*.crt")]
        passed = {name: value for name in PASSED_ON if (value := os.environ.get(name))}
        passed |= {"CERTIFICATES": " ".join(certificates), "ASKED_FOR": " ".join(ASKED_FOR)}
        process = subprocess.Popen(
            [
                "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child",
                "env", "-i", f"PATH={PATH}", "HOME=/root", "LANG=C.UTF-8", "TERM=dumb",
                *(f"{name}={value}" for name, value in passed.items()),
                "/bin/bash", str(HERE / "inside.sh"), str(root), *command.split(),
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
            return process.wait()
        finally:
            # Its first process goes with it, and all others with that one.
            process.kill()
            process.wait()


def _closing(text: str) -> str:
    """pytest's last line or the demo's, else the last line at all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if re.search(r"\d+ passed|pings were answered", line):
            return line.strip("= ")
    return lines[-1] if lines else ""


def _remove(root: Path) -> None:
    """Delete a root, in which nothing may be mounted: what is belongs to somebody else."""
    if not root.exists():
        return
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    if inside := [place for place in mounted if Path(place).is_relative_to(root.resolve())]:
        raise RootsError(f"{root} is not deleted: {inside[0]} is mounted; umount it first")
    _run("rm", "-rf", "--one-file-system", "--", str(root))


def _run(*command: str, log: Path | None = None) -> None:
    with log.open("w") if log else nullcontext() as file:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
        )
    if done.returncode:
        where = f"see {log}" if log else "see above"
        raise RootsError(f"`{' '.join(command)}` ended with {done.returncode}, {where}")


def _say(text: str) -> None:
    print(f"roots: {text}", flush=True)


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RootsError(f"another run works in {directory}") from None
        yield


def _check(releases: Sequence[Release]) -> None:
    if os.geteuid():
        raise RootsError("only root can make roots: run `make roots` as root")
    programs = ("debootstrap", "unshare", "gpgv", "git")
    if lacking := [name for name in programs if shutil.which(name) is None]:
        raise RootsError(
            f"missing: {', '.join(lacking)}; apt-get update && "
            "apt-get install --no-install-recommends debootstrap util-linux gpgv git"
        )
    changed = subprocess.run(
        ["git", "-C", str(CLONE), "status", "--porcelain", "--untracked-files=no"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    if changed:
        _say("what is not committed is left out:")
        print(changed, end="", flush=True)
    _say(f"in {', '.join(release.name for release in releases)}")


def main() -> int:
    """Exit code 0: every command did what it should in every root."""
    names = [release.name for release in RELEASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--commands",
        default=",".join(COMMANDS),
        help="of demo (make demo), test (make test) and user (both as a normal user, and a lab of "
        "the user's own); default: %(default)s",
    )
    parser.add_argument("--keep", action="store_true", help="keep the roots to look into them")
    parser.add_argument("--directory", type=Path, default=CLONE / "build" / "roots")
    arguments = parser.parse_args()
    commands = arguments.commands.split(",")
    for known, asked in ((names, arguments.releases), (COMMANDS, commands)):
        if unknown := [name for name in asked if name not in known]:
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    releases = [one for one in RELEASES if one.name in (arguments.releases or names)]
    results: list[Result] = []
    try:
        _check(releases)
        directory = arguments.directory.absolute()
        with _only_one(directory):
            roots = Roots(directory, keep=arguments.keep)
            for release in releases:
                for result in roots.run(release, commands):
                    results.append(result)
                    _say(f"{result.release}: {result.command} {_verdict(result)}")
    except RootsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for result in results:
            _say(f"{result.release:14} {result.command:6} {_verdict(result)}")
    return int(any(result.code for result in results))


def _verdict(result: Result) -> str:
    how = "ok" if result.code == 0 else f"FAILED with {result.code}"
    return f"{how} in {result.seconds:.0f} s: {result.closing}"


if __name__ == "__main__":
    sys.exit(main())
