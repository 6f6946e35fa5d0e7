"""Where what is said to people goes: to stderr, and never any slower than its reader is.

A pipe that nobody reads, a terminal that was stopped, a service manager that hangs: write(2) to
them waits, and O_NONBLOCK is not ours to set, for other processes have the same file open. So what
is said goes into a pipe of our own, without waiting, and a thread takes it from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import signal
import threading
import time
from collections.abc import Callable

from vswitch.fastpath.main.pump import pump

HELD_LEN = 1 << 20
"""Bytes of the pipe, as far as the system lets it grow."""


class Outlet(io.TextIOBase):
    """A text stream to a descriptor. Until `start` whoever writes also waits."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._pipe = -1
        self._rest = b""
        """What of the last text did not fit any more. Further ones are counted meanwhile."""
        self._left_out = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, prepare: Callable[[], object] = lambda: None) -> None:
        """Wait for nobody any more; the thread calls `prepare` before anything else."""
        source, self._pipe = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._pipe, False)
        with contextlib.suppress(OSError):  # a limit of this user
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, HELD_LEN)
        self._thread = threading.Thread(
            target=_take, args=(source, self._fd, prepare), name="log", daemon=True
        )
        self._thread.start()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, text: str) -> int:
        """Take whole lines, from any thread."""
        data = text.encode(errors="backslashreplace")
        with self._lock:
            if self._pipe < 0:
                self._wait(data)
            else:
                self._push()
                if self._rest:
                    self._left_out += text.count("\n")
                else:
                    self._rest = data
                    self._push()
        return len(text)

    def flush(self) -> None:
        """Say what there was no room for, if there is some now. Call it now and then."""
        with self._lock:
            self._push()

    def finish(self, patience_s: float) -> bool:
        """Wait until all is written, at most for this time; whether it is. The stream ends."""
        if self._thread is None:
            return True
        until = time.monotonic() + patience_s
        with self._lock:
            self._push()
            while self._rest and time.monotonic() < until:
                time.sleep(0.01)
                self._push()
            if self._pipe >= 0:
                os.close(self._pipe)
                self._pipe = -1
                self._fd = -1
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive() and not self._rest

    def _push(self) -> None:
        while self._rest or self._left_out:
            if not self._rest:
                self._rest = _left_out(self._left_out)
                self._left_out = 0
            try:
                self._rest = self._rest[os.write(self._pipe, self._rest) :]
            except BlockingIOError:
                return
            except OSError:
                self._rest = b""  # it is over: nobody is left to hear anything

    def _wait(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while data:
                data = data[os.write(self._fd, data) :]


def _take(source: int, sink: int, prepare: Callable[[], object]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
    prepare()
    try:
        pump(source, sink)
    finally:
        os.close(source)


def _left_out(count: int) -> bytes:
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime())
    return (
        f"{now},000 WARNING left out {count} lines: whoever reads this log was too slow\n"
    ).encode()
