"""Touches pages of a guest's memory that may not have come yet: a confined process of its own.

In postcopy (postcopy.py) whoever touches a page that is still on another machine waits for it,
and the frontend hears of that through a userfaultfd. Such a descriptor is power over the whole
address space that it was made in: its holder makes any page of it stop whoever touches it, and
fills pages that nobody has touched yet. Frontends are not trusted. So it is made in a process whose
address space holds nothing but their own guest's memory, which knows no secret and can do nothing:
it reads addresses from a pipe, touches a byte there, and writes the addresses to another pipe.

Run by fault_process.py, by path, without anything else of vswitch.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import platform
import resource
import socket
import struct
import sys
import threading
from collections.abc import Callable

TOUCHERS = 8
"""Pages that are waited for at a time."""

REQUEST = struct.Struct("=BxxxxxxxQQ")
"""What is to be done with mappings: MAP with length and file offset, and a descriptor; DROP with
address and length."""
MAP, DROP = 1, 2
STATUS = struct.Struct("=q")
"""The answer: an address or 0, or the negative of an errno."""
PAGE = struct.Struct("=Q")
"""An address to be touched, or that was."""

# linux/userfaultfd.h
_UFFD_API = 0xAA
_UFFD_USER_MODE_ONLY = 1
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_WAKE = 0x8010AA02
_REGISTER_MODE_MISSING = 1

# sys/mman.h
_PROT_READ = 1
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 1, 2, 0x10, 0x20, 0x4000
_MAP_FAILED = (1 << 64) - 1

# linux/prctl.h, linux/seccomp.h
_PR_SET_PDEATHSIG = 1
_PR_GET_SECCOMP = 21
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_RET_KILL = 0x80000000
_RET_EPERM = 0x00050001
_RET_ALLOW = 0x7FFF0000
_SIGKILL = 9

# Per machine: its AUDIT_ARCH_*, the number of userfaultfd(), that of ioctl(), and those of all
# others that are left after `confine`: what the interpreter takes, and to map, read and write.
# read, write, close, recvmsg, sendmsg, mmap, munmap, mprotect, mremap, madvise, brk, futex, exit,
# exit_group, rt_sigreturn, rt_sigprocmask, restart_syscall, clock_gettime, sched_yield
_MACHINES = {
    "x86_64": (
        0xC000003E, 323, 16,
        (0, 1, 3, 47, 46, 9, 11, 10, 25, 28, 12, 202, 60, 231, 15, 14, 219, 228, 24),
    ),
    "aarch64": (
        0xC00000B7, 282, 29,
        (63, 64, 57, 212, 211, 222, 215, 226, 216, 233, 214, 98, 93, 94, 139, 135, 128, 113, 124),
    ),
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def userfaultfd() -> int:
    """A new userfaultfd for this process, for faults in user mode, which takes no privileges.

    Raises OSError, ENOSYS where the kernel or this module does not know the call.
    """
    if platform.machine() not in _MACHINES:
        raise OSError(38, f"userfaultfd: no system call number for {platform.machine()}")
    flags = os.O_CLOEXEC | os.O_NONBLOCK | _UFFD_USER_MODE_ONLY
    fd = int(_libc.syscall(_MACHINES[platform.machine()][1], flags))
    if fd < 0:
        raise _failure("userfaultfd")
    try:
        fcntl.ioctl(fd, _UFFDIO_API, struct.pack("=QQQ", _UFFD_API, 0, 0))
    except BaseException:
        os.close(fd)
        raise
    return fd


def can_confine() -> bool:
    """Whether the kernel has what `confine` uses."""
    return int(_libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0)) >= 0


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _filter() -> bytes:
    """The program for seccomp that allows the calls of this machine's row, all others fail."""
    arch, _, ioctl, allowed = _MACHINES[platform.machine()]
    load, equal, ret = 0x20, 0x15, 0x06
    code = [
        (load, 0, 0, 4), (equal, 1, 0, arch), (ret, 0, 0, _RET_KILL),
        (load, 0, 0, 0), (equal, 0, 5, ioctl),
        # The second argument's low half.
        (load, 0, 0, 24), (equal, 1, 0, _UFFDIO_REGISTER), (equal, 0, 1, _UFFDIO_WAKE),
        (ret, 0, 0, _RET_ALLOW), (ret, 0, 0, _RET_EPERM),
    ]  # fmt: skip
    for left, number in zip(range(len(allowed), 0, -1), allowed, strict=True):
        code.append((equal, left, 0, number))
    code += [(ret, 0, 0, _RET_EPERM), (ret, 0, 0, _RET_ALLOW)]
    return b"".join(struct.pack("=HBBI", *one) for one in code)


def confine() -> None:
    """Leave this thread no system call but those few, for good."""
    code = _filter()
    program = _Program(len(code) // 8, code)
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or _libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise _failure("prctl")


def touch_pages(pages_fd: int, found_fd: int) -> None:
    """Until the pipe ends: read an address, touch a byte there, write the address back."""
    byte = ctypes.create_string_buffer(1)
    while len(record := os.read(pages_fd, PAGE.size)) == PAGE.size:
        # ctypes gives the interpreter's lock away meanwhile.
        _libc.memcpy(byte, PAGE.unpack(record)[0], 1)
        os.write(found_fd, record)


def map_file(uffd: int, fd: int, length: int, offset: int) -> int:
    """Map a piece of a file whose missing pages are asked for through `uffd`; where it is."""
    flags = _MAP_SHARED | _MAP_NORESERVE
    address = _libc.mmap(None, length, _PROT_READ, flags, fd, offset)
    if address == _MAP_FAILED:
        raise _failure("mmap")
    try:
        fcntl.ioctl(
            uffd, _UFFDIO_REGISTER, struct.pack("=QQQQ", address, length, _REGISTER_MODE_MISSING, 0)
        )
    except BaseException:
        _libc.munmap(address, length)
        raise
    return int(address)


def drop(uffd: int, address: int, length: int) -> None:
    """Put memory of nobody's over a mapping, for those who still wait there or will.

    First that, then wake them: a page that is touched with no userfaultfd over it would come to be,
    empty, in the guest's memory. The addresses are not used again.
    """
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
    if _libc.mmap(address, length, _PROT_READ, flags, -1, 0) == _MAP_FAILED:
        raise _failure("mmap")
    fcntl.ioctl(uffd, _UFFDIO_WAKE, struct.pack("=QQ", address, length))


def serve(control: socket.socket, uffd: int) -> None:
    """Do what the switch asks for, until it closes its end."""
    while True:
        data, ancillary, _, _ = control.recvmsg(REQUEST.size, socket.CMSG_SPACE(4))
        if not data:
            return
        fds = array.array("i")
        for _, _, raw in ancillary:
            fds.frombytes(raw)
        kind, first, second = REQUEST.unpack(data)
        status = 0
        try:
            if kind == MAP:
                status = map_file(uffd, fds[0], first, second)
            else:
                drop(uffd, first, second)
        except OSError as exc:
            status = -(exc.errno or 5)
        finally:
            for fd in fds:
                os.close(fd)
        control.sendmsg([STATUS.pack(status)])


def _failure(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def _confined(ready: threading.Barrier, body: Callable[[int, int], None], *fds: int) -> None:
    try:
        confine()
        ready.wait()
        body(*fds)
    finally:
        # With one thread less it is of no use; the switch sees that it ends.
        os._exit(1)


def main(parent: int, control_fd: int, pages_fd: int, found_fd: int) -> None:
    """Say how it began, with the userfaultfd if it went well; then serve."""
    _libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control = socket.socket(fileno=control_fd)
    try:
        uffd = userfaultfd()
        ready = threading.Barrier(TOUCHERS + 1)
        for _ in range(TOUCHERS):
            threading.Thread(
                target=_confined, args=(ready, touch_pages, pages_fd, found_fd), daemon=True
            ).start()
        # Everything that has the rights of the switch's user is over when the frontend gets power.
        ready.wait()
        confine()
    except OSError as exc:
        control.sendmsg([STATUS.pack(-(exc.errno or 5))])
        return
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd]))]
    control.sendmsg([STATUS.pack(0)], rights)
    serve(control, uffd)


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError):
        main(*map(int, sys.argv[1:]))
    os._exit(0)
