"""The files in which the journals of ports outlive the switch: one a port, in one directory.

They hold what is needed to go on with the rings of guests that keep running while the switch is
restarted or was killed. Losing them costs, at worst, what was in the switch at that moment, and for
a guest with packed rings its link until it is reset.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vswitch.fastpath.main.journal import SLOT_LEN, Journal

log = logging.getLogger("vswitch.journal")


SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def make_shared(rings: int) -> tuple[int, int]:
    """A journal for a frontend to keep for us: a descriptor, the caller's, and its size in bytes.

    Sealed, so that nobody can take the memory away while we write to it. Raises OSError.
    """
    fd = os.memfd_create("vswitch-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, rings * SLOT_LEN)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd, rings * SLOT_LEN


def open_shared(fd: int, size: int, offset: int, rings: int) -> Journal:
    """The journal that a frontend kept. Raises OSError for what make_shared did not make."""
    expected = rings * SLOT_LEN
    if (size, offset) != (expected, 0):
        raise OSError(
            errno.EINVAL, f"mmap size {size}, mmap offset {offset} are not {expected} and 0"
        )
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & SEALS != SEALS or os.fstat(fd).st_size != expected:
        raise OSError(errno.EINVAL, "the file is not the one from GET_INFLIGHT_FD")
    return Journal(rings, fd)


class Journals:
    """Opens the journal of each port in `directory`, which is made when it is needed.

    It must be the switch's own, and nobody else may write to it: who can put another file in the
    place of one decides what guests are given back.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, port: str, rings: int, used: int | None = None) -> Journal | None:
        """The journal of a port with so many rings, as an earlier switch left it or a new one.

        Only the first `used` of them are ever written; there is room on the disk for these.

        None, with a warning in the log, if there can be none: the switch works without.
        """
        path = self._path(port)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            with self._opened() as directory:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(path.name, flags, 0o600, dir_fd=directory)
            try:
                self._check(fd)
                if os.fstat(fd).st_size != rings * SLOT_LEN:
                    os.ftruncate(fd, 0)
                    os.ftruncate(fd, rings * SLOT_LEN)
                # A page that there is no room for would be a SIGBUS when a worker writes to it.
                os.posix_fallocate(fd, 0, (rings if used is None else used) * SLOT_LEN)
                return Journal(rings, fd)
            finally:
                os.close(fd)
        except OSError as exc:
            log.warning(
                "port %s: no journal %s (%s): after a crash its guest may need a reset",
                port, path, exc.strerror or exc,
            )  # fmt: skip
            return None

    def has(self, port: str) -> bool:
        """Whether there is a file for this port, of whatever kind."""
        return os.path.lexists(self._path(port))

    def forget(self, port: str) -> None:
        """Remove the journal of a port that is gone for good."""
        with contextlib.suppress(OSError), self._opened() as directory:
            os.unlink(self._path(port).name, dir_fd=directory)
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of the directory. Raises OSError if it is not ours alone."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._directory, flags)
        try:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid():
                raise OSError(
                    errno.EPERM,
                    f"the directory belongs to uid {status.st_uid} and the switch runs as uid "
                    f"{os.geteuid()}: remove it, and the switch makes its own",
                )
            if status.st_mode & 0o022:
                raise OSError(
                    errno.EPERM,
                    f"the directory's mode is {stat.S_IMODE(status.st_mode):04o}, so that others "
                    f"may write to it: chmod 700 {self._directory}",
                )
            yield fd
        finally:
            os.close(fd)

    def _path(self, port: str) -> Path:
        return self._directory / f"{port}.rings"

    @staticmethod
    def _check(fd: int) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "it is not a file of ours")
