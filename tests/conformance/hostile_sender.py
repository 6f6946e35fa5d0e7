"""A process that sends descriptors which make whoever gets them wait, for as long as it likes.

`python hostile_sender.py KIND FORM PATH`. KIND is what is sent: `tcp` lingers in close() over
unsent data; a file on a FUSE mount of its own does not answer when it is closed (`flush`), or when
it is looked at (`statfs`, `getattr`). FORM is what with: see `FORMS`. Prints `sent` or
why not, then keeps everything until its stdin ends.
"""

from __future__ import annotations

import array
import ctypes
import os
import select
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

KINDS = ("tcp", "flush", "statfs", "getattr")

_HEADER = struct.Struct("<III")
_KICK = _HEADER.pack(12, 1, 8)  # SET_VRING_KICK for vring 0
_KICK_PAYLOAD = struct.pack("<Q", 0)
_BAD = _HEADER.pack(1, 7, 0)  # of a version that nobody knows
_REQUEST = b"\x94\x00\x01\xa4ping\x90"  # of the control socket: [0, 1, "ping", []]


def lingering_socket() -> int:
    """A TCP socket with unsent data whose last close() takes an hour."""
    listening = socket.create_server(("127.0.0.1", 0))
    sock = socket.create_connection(listening.getsockname())
    peer, _ = listening.accept()
    os.dup(listening.fileno())
    os.dup(peer.fileno())
    sock.setblocking(False)
    try:
        while True:
            sock.send(b"x" * 65536)
    except BlockingIOError:
        pass
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
    return sock.detach()


# linux/fuse.h
_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _STATFS, _RELEASE, _FLUSH, _INIT, _BATCH_FORGET = (
    1, 2, 3, 14, 17, 18, 25, 26, 42,
)  # fmt: skip
_SIZE = 1 << 20


def _attributes(node: int) -> bytes:
    mode = 0o40755 if node == 1 else 0o100666
    return struct.pack(
        "<QQQQQQIIIIIIIIII", node, _SIZE, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
    )


def _serve(fuse: int, about: str, begin: int) -> None:
    """Answer what it takes to open a file; nothing of one kind from when `begin` is readable.

    Until stdin ends: with the last descriptor of the connection all who wait for it go on.
    """
    code_of = {"flush": _FLUSH, "statfs": _STATFS, "getattr": _GETATTR}
    silent = -1
    while True:
        ready, _, _ = select.select([fuse, sys.stdin, *([begin] if silent < 0 else [])], [], [])
        if sys.stdin in ready:
            os._exit(0)
        if begin in ready:
            silent = code_of[about]
        if fuse not in ready:
            continue
        raw = os.read(fuse, 1 << 17)
        _, code, unique, node, *_ = _IN.unpack_from(raw)
        if code in (silent, _FORGET, _BATCH_FORGET):
            continue
        answer, error = b"", 0
        if code == _INIT:
            answer = struct.pack(
                "<IIIIHHIIHHI7I", 7, 31, 1 << 16, 0, 8, 8, 1 << 16, 1, 0, 0, 0, *[0] * 7
            )
        elif code == _LOOKUP:
            answer = struct.pack("<QQQQII", 2, 0, 0, 0, 0, 0) + _attributes(2)
        elif code == _GETATTR:
            answer = struct.pack("<QII", 0, 0, 0) + _attributes(node)  # true for no time at all
        elif code == _OPEN:
            answer = struct.pack("<QII", 1, 0, 0)
        elif code == _STATFS:
            answer = struct.pack("<QQQQQIIII6I", 0, 0, 0, 0, 0, 4096, 255, 4096, 0, *[0] * 6)
        elif code not in (_FLUSH, _RELEASE):
            error = -38  # ENOSYS
        os.write(fuse, _OUT.pack(_OUT.size + len(answer), error, unique) + answer)


def silent_file(about: str) -> int:
    """A file on a FUSE mount that does not answer when it is asked about that."""
    libc = ctypes.CDLL(None, use_errno=True)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    where = tempfile.mkdtemp(prefix="vswitch-fuse-")
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other"
    if libc.mount(b"silent", where.encode(), b"fuse", 0, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")
    begin, begins = os.pipe()
    # A process of its own: whoever has the file waits for itself when it ends.
    if os.fork() == 0:
        _serve(fuse, about, begin)
    os.close(fuse)
    try:
        fd = os.open(f"{where}/file", os.O_RDWR)
    finally:
        libc.umount2(where.encode(), 2)  # MNT_DETACH
        Path(where).rmdir()
    os.write(begins, b"!")
    return fd


def send(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def received(sock: socket.socket, fd: int) -> None:
    """It belongs to a message, which is complete."""
    send(sock, _KICK + _KICK_PAYLOAD, [fd])


def unread(sock: socket.socket, fd: int) -> None:
    """It lies in the queue of a connection that ends for what came before."""
    sock.sendall(_BAD)
    send(sock, _KICK, [fd])


def without_room(sock: socket.socket, fd: int) -> None:
    """It is one of more than there may be."""
    other = os.eventfd(0)
    send(sock, _KICK + _KICK_PAYLOAD, [other] * 200 + [fd])


def in_the_midst(sock: socket.socket, fd: int) -> None:
    """Its message is not complete."""
    send(sock, _KICK[:1], [fd])


def control(sock: socket.socket, fd: int) -> None:
    """It comes with a request on the control socket."""
    send(sock, _REQUEST, [fd])


FORMS: dict[str, Callable[[socket.socket, int], None]] = {
    one.__name__: one for one in (received, unread, without_room, in_the_midst, control)
}


def main(kind: str, form: str, path: str) -> None:
    fd = lingering_socket() if kind == "tcp" else silent_file(kind)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    try:
        FORMS[form](sock, fd)
    except PermissionError:
        print("refused", flush=True)
    except ConnectionError:
        print("turned away", flush=True)
    else:
        print("sent", flush=True)
    if kind == "tcp":
        # Its receiver's close is to be the last. That of a file on FUSE asks at each.
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
    sys.stdin.read()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    finally:
        os._exit(0)
