"""Threads of a running switch, and how to make one stand still."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from tests.support.running import RunningSwitch

PTRACE_DETACH = 17
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
WALL = 0x40000000


@contextlib.contextmanager
def held(tid: int) -> Iterator[None]:
    """One thread of another process stands still, wherever it is; the others go on."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

    def ptrace(request: int) -> None:
        if libc.ptrace(request, tid, None, None) < 0:
            raise OSError(ctypes.get_errno(), "ptrace")

    ptrace(PTRACE_SEIZE)
    ptrace(PTRACE_INTERRUPT)
    os.waitpid(tid, WALL)
    try:
        yield
    finally:
        try:
            ptrace(PTRACE_DETACH)
        except ProcessLookupError:
            os.waitpid(tid, WALL)  # killed, and its process does not end before we know


def workers_of(switch: RunningSwitch) -> list[int]:
    """Thread ids of the workers, by their numbers."""
    found = {}
    for task in Path(f"/proc/{switch.process.pid}/task").iterdir():
        name = (task / "comm").read_text().strip()
        if name.startswith("vs-worker-"):
            found[name] = int(task.name)
    return [found[name] for name in sorted(found)]
