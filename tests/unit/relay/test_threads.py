"""The relay's threads under the thread sanitizer: what they share is never used by two at once."""

from __future__ import annotations

import array
import asyncio
import os
import shutil
import socket
import struct
import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from vswitch.host import unixsocket
from vswitch.relay import process
from vswitch.relay.link import Link, LinkError, Peer
from vswitch.relay.process import Relay
from vswitch.relay.wire import Mode
from vswitch.vhost_user.endpoint import Connector, Listener

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CLIENTS = 6
ROUNDS = 40
PATIENCE_S = 120.0

# Its reports go to descriptor 2, the only one that every thread of the relay has. The same file
# shows that there can be such a report at all.
REPORTS = """
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static int shared;

static void *add(void *unused)
{
    shared++;
    return unused;
}

__attribute__((constructor)) static void report(void)
{
    pthread_t thread;

    dup2(open(LOG, O_WRONLY | O_CREAT | O_APPEND, 0600), 2);
    if (getenv("RACE") != NULL && pthread_create(&thread, NULL, add, NULL) == 0) {
        shared++;
        pthread_join(thread, NULL);
    }
}
"""


# The sanitizer knows of one table of descriptors, and each thread has its own: a number is another
# descriptor in the next one. So what takes some goes to the kernel without it, and it is told what
# is read and written.
CALLS = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static inline void written(volatile char *data, ssize_t n)
{
    for (ssize_t i = 0; i < n; i++)
        data[i] = data[i];
}

static inline void was_read(const volatile char *data, ssize_t n)
{
    for (ssize_t i = 0; i < n; i++)
        (void)data[i];
}

static inline ssize_t raw_recvmsg(int fd, struct msghdr *m, int flags)
{
    ssize_t n = syscall(SYS_recvmsg, fd, m, flags);
    if (n >= 0 && m->msg_iovlen) {
        written(m->msg_iov->iov_base, n);
        written(m->msg_control, m->msg_controllen);
    }
    return n;
}

static inline ssize_t raw_sendmsg(int fd, const struct msghdr *m, int flags)
{
    was_read(m->msg_iov->iov_base, m->msg_iov->iov_len);
    return syscall(SYS_sendmsg, fd, m, flags);
}

static inline ssize_t raw_send(int fd, const void *data, size_t n, int flags)
{
    was_read(data, n);
    return syscall(SYS_sendto, fd, data, n, flags, NULL, 0);
}

static inline ssize_t raw_read(int fd, void *data, size_t len)
{
    ssize_t n = syscall(SYS_read, fd, data, len);
    written(data, n);
    return n;
}

static inline ssize_t raw_write(int fd, const void *data, size_t n)
{
    was_read(data, n);
    return syscall(SYS_write, fd, data, n);
}

#define recvmsg raw_recvmsg
#define sendmsg raw_sendmsg
#define send raw_send
#define read raw_read
#define write raw_write
#define close(fd) ((int)syscall(SYS_close, fd))
#define open(...) ((int)syscall(SYS_openat, AT_FDCWD, __VA_ARGS__))
#define socket(a, b, c) ((int)syscall(SYS_socket, a, b, c))
#define socketpair(a, b, c, pair) ((int)syscall(SYS_socketpair, a, b, c, pair))
#define accept4(fd, a, len, flags) ((int)syscall(SYS_accept4, fd, a, len, flags))
#define connect(fd, a, len) ((int)syscall(SYS_connect, fd, a, len))
#define shutdown(fd, how) ((int)syscall(SYS_shutdown, fd, how))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The relay with the sanitizer, and the file of its reports."""
    directory = tmp_path_factory.mktemp("relay")
    program, log, more = directory / "vswitch-relay", directory / "log", directory / "reports.c"
    more.write_text(REPORTS)
    calls = directory / "calls.h"
    calls.write_text(CALLS)
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    sources = sorted(process.PROGRAM.parent.glob("*.c"))
    flags = ["-fsanitize=thread", "-O1", "-g", "-pthread", f'-DLOG="{log}"']
    done = subprocess.run(
        [compiler, *flags, "-include", calls, *sources, more, "-o", program],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return program, log


@pytest.fixture
def log(built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Relays that are started have the sanitizer meanwhile."""
    program, log = built
    log.write_text("")
    monkeypatch.setattr(process, "PROGRAM", program)
    process.hold_program.cache_clear()
    try:
        yield log
    finally:
        os.close(process.hold_program())
        process.hold_program.cache_clear()


def test_a_race_is_reported(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RACE", "1")

    async def run() -> None:
        await (await Relay.start()).close()

    asyncio.run(run())
    assert "WARNING: ThreadSanitizer: data race" in log.read_text()


def message(request: int, payload: bytes = b"") -> bytes:
    return struct.pack("=III", request, 1, len(payload)) + payload


def client(path: Path, number: int) -> None:
    """Connects, says something with descriptors of all kinds, hears or does not, and goes."""
    for i in range(ROUNDS):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_S)
        ours, theirs = socket.socketpair()
        fds = [os.eventfd(0, os.EFD_NONBLOCK), os.memfd_create("x"), theirs.fileno()]
        with sock, ours, theirs, suppress(ConnectionError):
            sock.connect(str(path))
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds[: i % 4]))]
            sock.sendmsg([message(i, bytes(i))], rights if i % 4 else [])
            if (number + i) % 3:
                sock.recv(4096)
            if i % 4 == 3:
                ours.send(b"to the channel")
        for fd in fds[:2]:
            os.close(fd)


async def read_on(link: Link) -> None:
    while (await link.receive(4096))[0]:
        pass


async def serve(link: Link, number: int) -> None:
    """As a port does: takes what comes, asks and answers, lets go of descriptors, hangs up."""
    kept = []
    with suppress(LinkError, ConnectionError, OSError):
        data, found = await link.receive(12)
        kept += found
        reading = asyncio.create_task(read_on(link))
        if number % 2:
            await link.peer_is_gone()
        if number % 5 == 0:
            await link.is_private_copy(0x1000, 1, 2)
        if data:
            await link.send(message(1, b"answer"))
        kept.clear()
        if number % 3:
            await reading
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    link.close()


class Plain:
    """Takes the connections of a socket whose bytes are passed on, and says back what it hears."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def connected(self, sock: socket.socket, _peer: Peer, _number: int) -> None:
        self.tasks.append(asyncio.create_task(self._echo(sock)))

    async def _echo(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with sock, suppress(OSError):
            while data := await loop.sock_recv(sock, 4096):
                await loop.sock_sendall(sock, data)

    def failed(self, error: int) -> None:
        raise AssertionError(error)

    def crowded(self, stuck: int) -> None:
        """Others come later."""


def answering(path: Path, until: threading.Event) -> None:
    """A frontend in server mode: takes one connection after the other and ends each."""
    with socket.create_server(str(path), family=socket.AF_UNIX) as server:
        server.settimeout(0.05)
        while not until.is_set():
            with suppress(TimeoutError):
                connection, _ = server.accept()
                with connection:
                    connection.send(message(1))


def test_connections_of_all_kinds_at_once(log: Path, tmp_path: Path) -> None:
    """They come, talk and go by the hundred, and so do sockets to listen on and to connect to."""
    over = threading.Event()
    served = 0

    async def listen(listener: Listener) -> None:
        nonlocal served
        tasks = []
        try:
            while True:
                tasks.append(asyncio.create_task(serve(await listener.next(), served)))
                served += 1
        finally:
            listener.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def connect(relay: Relay, path: Path) -> None:
        for _ in range(ROUNDS):
            connector = Connector(relay, path)
            connector.open()
            await serve(await connector.next(), 0)
            connector.close()

    async def run() -> None:
        relay = await Relay.start()
        try:
            plain = Plain()
            sock = unixsocket.listen(tmp_path / "plain", mode=0o600, owner=None, group=None)
            name = relay.listen(sock, plain, Mode.PLAIN)
            loop = asyncio.get_running_loop()
            with ThreadPoolExecutor(3 * CLIENTS) as pool:
                pool.submit(answering, tmp_path / "server", over)
                listener = Listener(relay, tmp_path / "a", mode=0o600, owner=None, group=None)
                listener.open()
                listening = asyncio.create_task(listen(listener))
                connecting = asyncio.create_task(connect(relay, tmp_path / "server"))
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        await asyncio.gather(
                            *(
                                loop.run_in_executor(pool, client, tmp_path / where, number)
                                for number in range(CLIENTS)
                                for where in ("a", "plain")
                            )
                        )
                        await connecting
                finally:
                    over.set()
                    listening.cancel()
                    await asyncio.gather(listening, *plain.tasks, return_exceptions=True)
                    relay.forget(name)
        finally:
            await relay.close()

    asyncio.run(run())
    assert served >= CLIENTS * ROUNDS // 2
    assert log.read_text() == ""
