"""Descriptors that a lying frontend sends along, by kind."""

from __future__ import annotations

import fcntl
import os
import select
import socket
from collections.abc import Callable

from vswitch.fastpath.main.port import MAX_VRINGS
from vswitch.ports.journals import make_shared

MEMORY_LEN = 1 << 20


def _memory(length: int = MEMORY_LEN) -> int:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, length)
    # Something to find there, for rings that start: small numbers of 16 bits.
    os.pwrite(fd, bytes(i % 7 if i % 2 == 0 else 0 for i in range(min(length, 1 << 14))), 0)
    return fd


def _sealed() -> int:
    fd = _memory()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return fd


def _read_only() -> int:
    fd = _memory()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def _end_of_pipe(which: int) -> int:
    pair = os.pipe()
    os.close(pair[1 - which])
    return pair[which]


def _socket() -> int:
    a, b = socket.socketpair()
    b.close()
    return a.detach()


CHANNELS: list[socket.socket] = []
"""Our ends of the channels for backend requests in this conversation."""


def _channel() -> int:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    CHANNELS.append(ours)
    return theirs.detach()


def _epoll() -> int:
    with select.epoll() as one:
        return os.dup(one.fileno())


FDS: dict[str, Callable[[], int]] = {
    "memory": _memory,
    "journal": lambda: make_shared(MAX_VRINGS)[0],
    "short": lambda: _memory(4096),
    "empty": lambda: _memory(0),
    "sealed": _sealed,
    "read-only": _read_only,
    "event": lambda: os.eventfd(0, os.EFD_NONBLOCK),
    "event-full": lambda: os.eventfd(0xFFFFFFFF, os.EFD_NONBLOCK),
    "event-blocking": lambda: os.eventfd(0, 0),
    "event-semaphore": lambda: os.eventfd(3, os.EFD_SEMAPHORE),
    "directory": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
    "path": lambda: os.open("/etc/passwd", os.O_PATH),
    "file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "zero": lambda: os.open("/dev/zero", os.O_RDWR),
    "null": lambda: os.open("/dev/null", os.O_RDWR),
    "pipe-read": lambda: _end_of_pipe(0),
    "pipe-write": lambda: _end_of_pipe(1),
    "socket": _socket,
    "channel": _channel,
    "epoll": _epoll,
    "proc": lambda: os.open("/proc/self/maps", os.O_RDONLY),
    "pidfd": lambda: os.pidfd_open(os.getpid()),
}
