"""Listening Unix sockets that have the right owner and permissions from their first moment.

Used for vhost-user ports in server mode and for the control socket.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from vswitch.bounds import SUN_PATH_LEN_MAX
from vswitch.errors import SocketError
from vswitch.host.accounts import find_gid, find_uid

_SO_PASSRIGHTS = 83
_SO_PEERPIDFD = 77

LOCK_PATIENCE_S = 0.2
"""How long another process may keep us from a directory; a switch needs microseconds."""


class FileId(NamedTuple):
    """Which file a path led to, to tell later whether it still does."""

    dev: int
    ino: int


class ListeningSocket(socket.socket):
    """A listening, non-blocking Unix stream socket that knows its place in the file system."""

    __slots__ = ("file_id", "path", "refuses_rights")

    path: Path
    file_id: FileId
    refuses_rights: bool
    """Nobody who is connected can send descriptors; the sender gets EPERM."""


class InUseError(SocketError):
    """A process answers on the path."""


def listen(
    path: Path | str,
    *,
    mode: int | None,
    owner: str | None,
    group: str | None,
    backlog: int = 16,
    rights: bool = True,
) -> ListeningSocket:
    """Create a socket at `path` and listen on it; the caller closes and unlinks it.

    `mode` has permission bits (None: what the umask leaves), `owner` and `group` names or numbers.
    The socket comes into being with no permissions at all and gets its own after its owner, so
    nobody can connect who may not later. A stale socket, one on which nobody listens, is replaced;
    any other file is left alone. Of several switches that start at once one gets the path. Raises
    SocketError; InUseError if somebody listens. Without `rights` nobody may send descriptors, where
    the kernel can refuse them: see `ListeningSocket.refuses_rights`.

    Sets the process's umask for the duration of bind(), which can only narrow the rights of a file
    that another thread creates meanwhile.
    """
    path = Path(path)
    _check_len(path)
    uid = -1 if owner is None else _find("user", owner)
    gid = -1 if group is None else _find("group", group)
    with _only_switch_in(path.parent):
        _remove_stale(path)
        return _bind(path, uid, gid, mode, backlog, owner, group, rights)


def _bind(
    path: Path,
    uid: int,
    gid: int,
    mode: int | None,
    backlog: int,
    owner: str | None,
    group: str | None,
    rights: bool,
) -> ListeningSocket:
    sock = ListeningSocket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.path = path
    sock.refuses_rights = not rights and refuse_rights(sock)
    try:
        umask = os.umask(0o777)
        try:
            sock.bind(str(path))
        finally:
            os.umask(umask)
    except OSError as exc:
        sock.close()
        raise _bind_error(path, exc) from exc

    try:
        # First, so that a socket on which one may connect is one on which somebody listens.
        sock.listen(backlog)
        sock.file_id = _hand_over(path, uid, gid, 0o777 & ~umask if mode is None else mode)
    except OSError as exc:
        sock.close()
        if exc.errno != errno.EBUSY:  # then it is somebody else's by now
            with contextlib.suppress(OSError):
                path.unlink()
        raise _ownership_error(path, exc, owner, group) from exc
    return sock


def refuse_rights(sock: socket.socket) -> bool:
    """Let nobody send descriptors to a socket, nor to those it accepts; False before Linux 6.16.

    Such a descriptor may make whoever closes it, or the socket that it waits in, sleep for long.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


def unlink_if_ours(path: Path | str, sock_or_id: ListeningSocket | FileId) -> bool:
    """Remove a socket that `listen` created, unless the path has another file by now.

    Returns whether it was removed. Never raises OSError: this is for cleaning up.
    """
    ours = sock_or_id.file_id if isinstance(sock_or_id, ListeningSocket) else sock_or_id
    path = Path(path)
    try:
        status = path.lstat()
        if FileId(status.st_dev, status.st_ino) != ours:
            return False
        path.unlink()
    except OSError:
        return False
    return True


def connect_error(
    path: Path | str, exc: OSError, mode: Literal["client", "control"] = "client"
) -> SocketError:
    """Why connect() failed, for a port in client mode or for a client of the control socket."""
    if mode == "control":
        start = "start the switch with `vswitch start --config FILE`, or name its socket with "
        start += "--socket PATH"
        nobody = missing = start
        rights = "run as the user who started the switch, or as root"
    else:
        nobody = (
            "start the frontend; if it runs: do both ends connect? One end has to listen "
            '(QEMU: -chardev socket,...,server=on; here: mode = "server")'
        )
        missing = (
            "start the frontend, which creates the socket (QEMU: -chardev socket,...,server=on), "
            'or let the switch listen with mode = "server"'
        )
        rights = "let the switch's user write to the socket and search its directories"
    match exc.errno:
        case _ if len(os.fsencode(path)) > SUN_PATH_LEN_MAX:
            what = f"the path is {len(os.fsencode(path))} bytes long, "
            what += f"a Unix socket has at most {SUN_PATH_LEN_MAX}"
            hint = "correct the path"
        case errno.ECONNREFUSED:
            what, hint = "nobody listens there", nobody
        case errno.ENOENT:
            what, hint = "no such socket", missing
        case errno.EACCES | errno.EPERM:
            what, hint = f"permission denied to {_me()}", rights
        case errno.ENOTDIR:
            what, hint = "one of its directories is a file", "correct the path"
        case errno.EPROTOTYPE:
            what, hint = "is not a stream socket", "correct the path"
        case errno.EAGAIN:
            what, hint = "the listener has too many connections waiting", "try again later"
        case _ if isinstance(exc, TimeoutError):
            what, hint = "no answer in time", "is the other end stopped or overloaded?"
        case _:
            what, hint = exc.strerror or str(exc), ""
    return SocketError(f"cannot connect to {path}: {what}", hint=hint)


def _check_len(path: Path) -> None:
    len_bytes = len(os.fsencode(path))
    if len_bytes > SUN_PATH_LEN_MAX:
        raise SocketError(
            f"cannot listen on {path}: the path is {len_bytes} bytes long, "
            f"a Unix socket has at most {SUN_PATH_LEN_MAX}",
            hint="use a shorter directory, e.g. below /run or $XDG_RUNTIME_DIR",
        )


def _find(kind: Literal["user", "group"], name: str) -> int:
    # Imported here: the client side of this module needs neither the databases nor pydantic.
    number = find_uid(name) if kind == "user" else find_gid(name)
    if number is None:
        raise SocketError(
            f'no such {kind} "{name}" to own a socket',
            hint=f"`getent {'passwd' if kind == 'user' else 'group'}` lists those there are",
        )
    return number


@contextlib.contextmanager
def _only_switch_in(directory: Path) -> Iterator[None]:
    """Keep other switches from opening sockets in a directory meanwhile, as far as that can be.

    One that has bound a socket and does not listen yet looks as if it had crashed. The lock is
    advisory and anybody who may read the directory can hold it: that is not waited for.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield  # whatever is wrong with it has a better message from bind()
        return
    try:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.001)
                    continue
            except OSError:
                pass  # a file system without locks
            break
        yield
    finally:
        os.close(fd)


def _remove_stale(path: Path) -> None:
    """Make room at `path` if a socket without a listener is there; SocketError if another file."""
    try:
        before = path.lstat()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise _bind_error(path, exc) from exc
    if not stat.S_ISSOCK(before.st_mode):
        raise SocketError(
            f"cannot listen on {path}: the path exists and is {_kind(before.st_mode)}",
            hint="choose another path, or remove the file if it is yours",
        )
    _check_nobody_listens(path)
    # Moved aside first and looked at again: another process may have replaced it meanwhile, and
    # that one's socket must get its name back.
    aside = path.with_name(f".{path.name[:64]}.{os.getpid()}.stale")
    try:
        path.rename(aside)
        now = aside.lstat()
        if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
            os.link(aside, path, follow_symlinks=False)
            aside.unlink()
            raise _in_use(path)
        aside.unlink()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise SocketError(
            f"cannot listen on {path}: a stale socket is there and cannot be removed: "
            f"{exc.strerror}",
            hint=f"remove it as its owner: rm {path}",
        ) from exc


def _check_nobody_listens(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except PermissionError as exc:
            raise SocketError(
                f"cannot listen on {path}: a socket of another user is there "
                f"and {_me()} may not find out whether it is in use",
                hint="choose another path, or remove the socket as its owner",
            ) from exc
        except OSError as exc:
            # EAGAIN: its queue is full. EPROTOTYPE: a datagram socket that somebody has bound.
            if exc.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise _bind_error(path, exc) from exc
        else:
            if _listener_is_gone(probe):
                return
            raise _in_use(path, _listener_of(probe))
    raise _in_use(path)


def _listener_is_gone(connected: socket.socket) -> bool:
    """Whether the process that called listen() has ended and something else holds its socket open.

    That is a relay of a switch before us, killed while it waits for what somebody left in a queue.
    """
    try:
        raw = connected.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
    except OSError as exc:
        if exc.errno != errno.ENOPROTOOPT:
            return exc.errno in (errno.ESRCH, errno.EINVAL)  # it has been reaped
    else:
        pidfd = struct.unpack("=i", raw)[0]
        try:
            return bool(select.select([pidfd], [], [], 0)[0])
        finally:
            os.close(pidfd)
    # Before Linux 6.5. Should its number belong to another process by now, the socket is in use.
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid = struct.unpack("=iII", raw)[0]
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except FileNotFoundError:
        return bool(pid)  # 0: of another PID namespace
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] in ("Z", "X")


def _in_use(path: Path, listener: str = "") -> InUseError:
    who = listener or "another process"
    find = "that process" if listener else f"that process (`ss -xlp src {path}` names it)"
    return InUseError(
        f"cannot listen on {path}: {who} listens on it already",
        hint=f"stop {find}, or choose another path; if it is the guest's QEMU with server=on, "
        'both ends listen: let the switch connect with mode = "client" '
        "(`vswitchctl add-port --client`)",
    )


def _listener_of(connected: socket.socket) -> str:
    """`process 4711 (qemu-system-x86)`, who called listen(); empty if that cannot be told."""
    try:
        raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid = struct.unpack("=iII", raw)[0]
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""  # it ended, or lives in another PID namespace
    return f"process {pid} ({name})"


def _hand_over(path: Path, uid: int, gid: int, mode: int) -> FileId:
    """Give the fresh socket its owner and permissions, without following a link put in its way."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        fresh = stat.S_ISSOCK(status.st_mode) and not stat.S_IMODE(status.st_mode) & 0o777
        if not fresh or status.st_uid != os.geteuid():
            raise OSError(errno.EBUSY, "another process replaced the socket meanwhile")
        # An O_PATH descriptor takes no fchmod(), but its link in /proc leads to the same inode.
        magic = f"/proc/self/fd/{fd}"
        if uid != -1 or gid != -1:
            os.chown(magic, uid, gid)
        Path(magic).chmod(mode)
        return FileId(status.st_dev, status.st_ino)
    finally:
        os.close(fd)


def _bind_error(path: Path, exc: OSError) -> SocketError:
    parent = path.parent
    match exc.errno:
        case errno.EADDRINUSE:
            return _in_use(path)
        case errno.ENOENT:
            what, hint = f"no such directory {parent}", f"create it: mkdir -p {parent}"
        case errno.ENOTDIR:
            what, hint = f"{parent} is not a directory", "correct the path"
        case errno.EACCES | errno.EPERM:
            what = f"permission denied to {_me()} in {parent}"
            hint = "choose a directory of your own, e.g. $XDG_RUNTIME_DIR, or give this user rights"
        case errno.EROFS:
            what, hint = f"{parent} is on a read-only file system", "choose another directory"
        case _:
            what, hint = exc.strerror or str(exc), ""
    return SocketError(f"cannot listen on {path}: {what}", hint=hint)


def _ownership_error(path: Path, exc: OSError, owner: str | None, group: str | None) -> SocketError:
    if exc.errno == errno.EPERM and (owner is not None or group is not None):
        to = " ".join(
            [f'user "{owner}"'] * (owner is not None) + [f'group "{group}"'] * (group is not None)
        )
        return SocketError(
            f"cannot give {path} to {to}: {_me()} may not",
            hint="run as root, or give only a group that this user belongs to",
        )
    return SocketError(f"cannot listen on {path}: {exc.strerror or exc}")


def _me() -> str:
    return f"uid {os.geteuid()}"


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return name
    return "not a socket"
