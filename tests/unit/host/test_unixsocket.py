"""Listening sockets: who may connect and from when on, and what may stand in the way."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.otheruser import NOBODY, as_nobody
from vswitch.errors import SocketError
from vswitch.host import unixsocket
from vswitch.host.unixsocket import InUseError, ListeningSocket, connect_error, unlink_if_ours

Listen = Callable[..., ListeningSocket]


@pytest.fixture
def listen() -> Iterator[Listen]:
    made: list[ListeningSocket] = []

    def function(path: Path | str, **options: Any) -> ListeningSocket:
        arguments: dict[str, Any] = {"mode": None, "owner": None, "group": None, **options}
        made.append(unixsocket.listen(path, **arguments))
        return made[-1]

    yield function
    for sock in made:
        sock.close()


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def test_it_listens_and_leaves_nothing_else_behind(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "s"
    sock = listen(path, mode=0o600)
    assert connects(path)
    assert sock.getblocking() is False
    assert not os.get_inheritable(sock.fileno())
    assert sock.getsockname() == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    peer, _ = sock.accept()
    peer.close()


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777, 0o000])
def test_permissions_do_not_depend_on_the_umask(tmp_path: Path, listen: Listen, mode: int) -> None:
    path = tmp_path / "s"
    before = os.umask(0o027)
    try:
        listen(path, mode=mode)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_without_a_mode_the_umask_decides(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "s"
    before = os.umask(0o027)
    try:
        listen(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


@pytest.mark.root("becomes another user")
def test_owner_and_group(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "s"
    listen(path, mode=0o640, owner=str(NOBODY), group="1")
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (NOBODY, 1, 0o640)
    with pytest.raises(SocketError, match=r'no such user "no\.body"'):
        listen(tmp_path / "t", owner="no.body")
    with pytest.raises(SocketError, match=r'no such group "no\.body"'):
        listen(tmp_path / "t", group="no.body")


@pytest.mark.root("becomes another user")
def test_nobody_has_rights_before_the_owner_is_set(
    tmp_path: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    chown, chmod = os.chown, Path.chmod

    def note(name: str) -> None:
        seen.append((name, stat.S_IMODE((tmp_path / "s").stat().st_mode)))

    def noted_chown(*arguments: Any) -> None:
        note("chown")
        chown(*arguments)

    def noted_chmod(*arguments: Any) -> None:
        note("chmod")
        chmod(*arguments)

    monkeypatch.setattr(os, "chown", noted_chown)
    monkeypatch.setattr(Path, "chmod", noted_chmod)
    listen(tmp_path / "s", mode=0o660, owner=str(NOBODY))
    assert seen == [("chown", 0), ("chmod", 0)]


@pytest.mark.root("becomes another user")
def test_a_failed_chown_leaves_no_socket(public_dir: Path) -> None:
    text = as_nobody(unixsocket.listen, public_dir / "s", mode=0o600, owner="root", group=None)
    assert f'cannot give {public_dir}/s to user "root": uid {NOBODY} may not' in text
    assert "hint: run as root" in text
    assert not (public_dir / "s").exists()


def test_a_path_in_use(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "s"
    first = listen(path)
    with pytest.raises(InUseError, match=f"cannot listen on {path}: ") as caught:
        listen(path)
    assert f"process {os.getpid()} (" in caught.value.message
    assert "server=on" in caught.value.hint
    assert 'mode = "client"' in caught.value.hint
    peer, _ = first.accept()  # the probe
    peer.close()
    assert connects(path)


def test_a_full_backlog_is_in_use(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "s"
    listen(path, backlog=0)
    fillers = []
    while True:
        filler = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        fillers.append(filler)
        if filler.connect_ex(str(path)) == errno.EAGAIN:
            break
    with pytest.raises(InUseError):
        listen(path)
    for filler in fillers:
        filler.close()


def test_a_datagram_socket_is_in_use(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(InUseError):
            listen(path)
    listen(path)


def test_a_stale_socket_is_replaced(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "s"
    stale = listen(path, mode=0o600)
    stale.close()
    assert path.exists()
    sock = listen(path, mode=0o600)
    assert connects(path)
    assert sock.file_id.ino == path.stat().st_ino
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_socket_that_replaced_the_stale_one_meanwhile_keeps_its_name(
    tmp_path: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    listen(path).close()
    check = unixsocket._check_nobody_listens
    winners = []

    def lose_the_race(probed: Path) -> None:
        check(probed)
        path.rename(tmp_path / "old")  # keeps the inode number taken
        with socket.socket(socket.AF_UNIX) as winner:
            winner.bind(str(path))
            winner.listen()
            winners.append(winner.dup())

    monkeypatch.setattr(unixsocket, "_check_nobody_listens", lose_the_race)
    with pytest.raises(InUseError):
        listen(path)
    assert connects(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "s"]
    winners[0].close()


# Listens where and when it is told to, until the next line.
CONTENDER = """
import sys, time
from pathlib import Path
from vswitch.host import unixsocket
print("ready", flush=True)
while line := sys.stdin.readline():
    path, _, at_ns = line.rpartition(" ")
    sock = None
    while time.monotonic_ns() < int(at_ns):
        pass
    try:
        sock = unixsocket.listen(Path(path), mode=0o600, owner=None, group=None)
        print("listens", flush=True)
    except Exception as exc:
        print(type(exc).__name__, flush=True)
    sys.stdin.readline()
    if sock is not None:
        sock.close()
"""


@pytest.fixture(scope="module")
def contenders() -> Iterator[list[subprocess.Popen[str]]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for _ in range(5)
    ]
    assert [hear(process) for process in processes] == ["ready"] * 5
    yield processes
    for process in processes:
        process.communicate()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")


@pytest.mark.parametrize("stale", [False, True])
def test_of_several_that_start_at_once_one_gets_the_path(
    tmp_path: Path, stale: bool, contenders: list[subprocess.Popen[str]]
) -> None:
    """And whoever connects reaches that one: nobody's socket is taken for a stale one."""
    for round_ in range(20):
        path = tmp_path / str(round_)
        if stale:
            unixsocket.listen(path, mode=0o600, owner=None, group=None).close()
        at_ns = time.monotonic_ns() + 2_000_000  # when all have been told, more or less
        for process in contenders:
            tell(process, f"{path} {at_ns}")
        found = {process.pid: hear(process) for process in contenders}
        winners = [pid for pid, what in found.items() if what == "listens"]
        assert len(winners) == 1, found
        assert sorted(found.values()) == ["InUseError"] * 4 + ["listens"]
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            assert struct.unpack("=iII", raw)[0] == winners[0]
        for process in contenders:
            tell(process, "")


def test_a_directory_that_somebody_keeps_locked_is_not_waited_for(
    tmp_path: Path, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unixsocket, "LOCK_PATIENCE_S", 0.05)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        listen(tmp_path / "s")
        assert connects(tmp_path / "s")
    finally:
        os.close(fd)


def test_a_socket_that_another_took_the_place_of_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    hand_over = unixsocket._hand_over

    def lose_the_race(*arguments: Any) -> Any:
        path.unlink()
        path.write_text("somebody else's")
        return hand_over(*arguments)

    monkeypatch.setattr(unixsocket, "_hand_over", lose_the_race)
    with pytest.raises(SocketError, match="another process replaced the socket meanwhile"):
        unixsocket.listen(path, mode=0o600, owner=None, group=None)
    assert path.read_text() == "somebody else's"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda p: p.write_text("precious"), "a regular file"),
        (lambda p: p.mkdir(), "a directory"),
        (lambda p: p.symlink_to("elsewhere"), "a symbolic link"),
        (lambda p: os.mkfifo(p), "a pipe"),
    ],
)
def test_another_file_is_left_alone(
    tmp_path: Path, listen: Listen, make: Callable[[Path], object], kind: str
) -> None:
    path = tmp_path / "s"
    make(path)
    before = path.lstat()
    with pytest.raises(SocketError, match=f"{path}: the path exists and is {kind}"):
        listen(path)
    assert path.lstat().st_ino == before.st_ino


def test_paths_that_cannot_be(tmp_path: Path, listen: Listen) -> None:
    with pytest.raises(SocketError, match=f"no such directory {tmp_path}/none") as caught:
        listen(tmp_path / "none" / "s")
    assert caught.value.hint == f"create it: mkdir -p {tmp_path}/none"
    (tmp_path / "file").touch()
    with pytest.raises(SocketError, match=f"{tmp_path}/file/s: "):
        listen(tmp_path / "file" / "s")
    with pytest.raises(SocketError, match=r"the path is 108 bytes long, .* at most 107"):
        listen("/" + "s" * 107)


def test_the_longest_path_works(listen: Listen, tmp_path: Path) -> None:
    directory = tmp_path / ("d" * (105 - len(str(tmp_path))))
    directory.mkdir()
    path = directory / "s"
    assert len(str(path)) == 108
    path = Path(str(directory)[:-1])
    directory.rename(path)
    path = path / "s"
    assert len(str(path)) == 107
    listen(path).close()
    listen(path)
    assert connects(path)


@pytest.mark.root("becomes another user")
def test_without_rights(tmp_path: Path) -> None:
    text = as_nobody(unixsocket.listen, "/root/s", mode=None, owner=None, group=None)
    assert text.startswith(
        f"SocketError: cannot listen on /root/s: permission denied to uid {NOBODY}"
    )
    text = as_nobody(unixsocket.listen, "/etc/s", mode=None, owner=None, group=None)
    assert f"permission denied to uid {NOBODY} in /etc" in text


def test_unlink_only_what_is_ours(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "s"
    first = listen(path)
    path.rename(tmp_path / "moved")
    second = listen(path)
    assert not unlink_if_ours(path, first)
    assert path.exists()
    assert unlink_if_ours(path, second.file_id)
    assert not path.exists()
    assert not unlink_if_ours(path, second)


def test_connect_errors_say_what_to_do(tmp_path: Path, listen: Listen) -> None:
    path = tmp_path / "s"

    def failure() -> OSError:
        with socket.socket(socket.AF_UNIX) as sock:
            number = sock.connect_ex(str(path))
        return OSError(number, os.strerror(number))

    missing = connect_error(path, failure())
    assert missing.message == f"cannot connect to {path}: no such socket"
    assert "start the frontend" in missing.hint
    listen(path).close()
    refused = connect_error(path, failure())
    assert refused.message == f"cannot connect to {path}: nobody listens there"
    assert "do both ends connect?" in refused.hint
    assert "vswitch start" in connect_error(path, failure(), "control").hint
    long = Path("/", "x" * 200)
    assert "201 bytes long" in connect_error(long, OSError("AF_UNIX path too long")).message
    denied = connect_error(path, PermissionError(errno.EACCES, "Permission denied"))
    assert "permission denied" in denied.message
    assert denied.hint
    assert "no answer in time" in str(connect_error(path, TimeoutError()))
    assert "strange" in str(connect_error(path, OSError(errno.EIO, "strange")))


def test_threads_keep_their_files_while_a_socket_is_made(tmp_path: Path, listen: Listen) -> None:
    """The umask is narrowed for bind() only and restored whatever happens."""
    before = os.umask(0o022)
    os.umask(before)
    with pytest.raises(SocketError):
        listen(tmp_path / "none" / "s")
    seen: list[int] = []

    def look() -> None:
        umask = os.umask(0o022)
        os.umask(umask)
        seen.append(umask)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


# Listens at its argument, gives the socket to whoever is on its stdin, and ends when told to.
LEAVER = """
import array, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.bind(sys.argv[1])
sock.listen()
heir = socket.socket(fileno=0)
heir.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))])
heir.recv(1)
"""


def test_a_socket_whose_listener_has_ended_is_stale_whoever_holds_it(tmp_path: Path) -> None:
    """As a relay that is stuck holds those of a switch that was killed."""
    path = tmp_path / "s"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        leaver = subprocess.Popen([sys.executable, "-c", LEAVER, str(path)], stdin=theirs.fileno())
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        with pytest.raises(InUseError, match="listens on it already"):
            unixsocket.listen(path, mode=0o600, owner=None, group=None)
        ours.send(b"!")
        leaver.wait()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))  # for it is still open
        unixsocket.listen(path, mode=0o600, owner=None, group=None).close()
        os.close(fds[0])
