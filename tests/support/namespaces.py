"""Network namespaces of the tests' own, and sockets in them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Self, TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
DEADLINE_S = 60.0


class Namespace:
    """A network namespace that lives as long as a process in it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
        self.pid = self._process.pid
        path = f"/proc/{self.pid}/ns/net"
        ours = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + DEADLINE_S
        while os.readlink(path) == ours:
            assert time.monotonic() < deadline, "no namespace"
            time.sleep(0.001)  # between two looks
        self._fd = os.open(path, os.O_RDONLY)
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> str:
        command = ["nsenter", "--target", str(self.pid), "--net", "ip", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def inside(self, action: Callable[[], T]) -> T:
        """Do something in the namespace; sockets that are made there stay there."""
        result: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                if ctypes.CDLL(None, use_errno=True).setns(self._fd, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
                result.append(action())
            except BaseException as exc:
                errors.append(exc)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return result[0]

    def close(self) -> None:
        os.close(self._fd)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
