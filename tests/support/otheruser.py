"""A call made by another user, in a process of its own.

Not in a forked child: where this process has threads, one of them may hold a lock that the child
would wait for for ever, which Python 3.12 warns of.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgpack

from tests.support.processes import environment

NOBODY = 65534


def call_as(uid: int, gids: list[int], function: Callable[..., object], *args: object) -> object:
    """What a module's function returns to a user without any rights but those of `gids`."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=pickle.dumps((uid, gids, function, args)),
        env=environment(),
        stdout=subprocess.PIPE,
        check=True,
    )
    return pickle.loads(done.stdout)


def as_nobody(function: Callable[..., object], *args: object, **options: object) -> str:
    """What `function` returns or raises, as text."""
    return str(call_as(NOBODY, [], _said_by, function, args, options))


def _said_by(
    function: Callable[..., object], args: tuple[object, ...], options: dict[str, object]
) -> str:
    try:
        return repr(function(*args, **options))
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"


def ask(path: Path, method: str, *params: object) -> object:
    """What a request on a control socket gives: its result, an error's code, or an errno's name."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            with contextlib.suppress(BrokenPipeError):  # there may be an answer all the same
                client.sendall(msgpack.packb([0, 77, method, params]))
            unpacker = msgpack.Unpacker()
            while data := client.recv(65536):
                unpacker.feed(data)
                for _, _, error, result in unpacker:
                    return result or error["code"]
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    return None


def main() -> None:
    # All that it takes is imported while it may be read, and what is imported at the call, too.
    importlib.import_module("vswitch.config.settings")
    uid, gids, function, args = pickle.load(sys.stdin.buffer)
    os.setgroups(gids[1:])
    os.setgid(gids[0] if gids else uid)
    os.setuid(uid)
    sys.stdout.buffer.write(pickle.dumps(function(*args)))


if __name__ == "__main__":
    main()
