"""The thread that makes a software guest answer pings, and pinging itself."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from ipaddress import ip_address

from vswitch.lab.guest.errors import BackendClosedError, BackendTimeoutError, GuestError
from vswitch.lab.guest.net_driver import NetDriver
from vswitch.lab.guest.stack import NetStack

_RETRY_S = 0.5
"""After this time without an answer a request is sent once more."""
_INBOX_SIZE = 4096
"""Frames kept for recv(); older ones are forgotten, as a full socket buffer does with new ones."""
_idents = itertools.count(1)


class Responder:
    """Receives all frames of a guest in a thread and answers those that its stack knows.

    `reconnect` gets a backend back that went away, in so many seconds.
    """

    def __init__(
        self, driver: NetDriver, stack: NetStack, reconnect: Callable[[float], None] | None
    ) -> None:
        self._driver = driver
        self._stack = stack
        self._reconnect = reconnect
        self._heard = threading.Condition()
        self._inbox: deque[bytes] = deque(maxlen=_INBOX_SIZE)
        self._error: BaseException | None = None
        self._stopping = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(
            target=self._run, name=f"responder {driver.name}", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread and raise what ended it early, if anything did."""
        self._stopping = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        os.close(self._wake_fd)
        self._driver.requeue(self._inbox)
        if self._error is not None:
            raise self._error

    def take_frames(self, n: int, deadline: float) -> list[bytes]:
        """Up to `n` frames that the stack did not want, waiting for them until the deadline."""
        self.wait_for(lambda: len(self._inbox) >= n, deadline)
        with self._heard:
            return [self._inbox.popleft() for _ in range(min(n, len(self._inbox)))]

    def wait_for(self, done: Callable[[], bool], deadline: float) -> bool:
        """Wait until `done()`, looked at after every frame. False at the deadline (monotonic).

        GuestError when the thread has ended because of an error.
        """
        with self._heard:
            while not done():
                if self._error is not None:
                    raise GuestError(f"the responder has stopped: {self._error}") from self._error
                if not self._heard.wait(max(0.0, deadline - time.monotonic())):
                    return done()
            return True

    def _run(self) -> None:
        try:
            while not self._stopping:
                try:
                    self._serve()
                except BackendClosedError:
                    if self._reconnect is None:
                        raise
                    self._regain(self._reconnect)
        except BaseException as error:
            with self._heard:
                self._error = error
                self._heard.notify_all()

    def _serve(self) -> None:
        driver = self._driver
        while not self._stopping:
            deadline = time.monotonic() + _RETRY_S
            if not driver.wait_used(driver.receiveqs, deadline, self._wake_fd):
                continue
            for frame in driver.poll_frames(64):
                with self._heard:
                    taken, replies = self._stack.handle(frame)
                    if not taken:
                        self._inbox.append(frame)
                    self._heard.notify_all()
                driver.send(replies)

    def _regain(self, reconnect: Callable[[float], None]) -> None:
        while not self._stopping:
            try:
                reconnect(_RETRY_S)
            except (BackendTimeoutError, BackendClosedError):
                continue
            return


def ping(
    stack: NetStack,
    ip: str,
    timeout: float,
    send: Callable[[list[bytes]], None],
    wait_for: Callable[[Callable[[], bool], float], bool],
) -> bool:
    """Resolve `ip` and ping it, both as often as fits into `timeout` seconds.

    `wait_for` lets the stack handle frames until a condition holds or a monotonic deadline passes.
    """
    target = ip_address(ip)
    deadline = time.monotonic() + timeout
    ident = next(_idents) & 0xFFFF
    data = b"vswitch guest ping ".ljust(56, b".")
    for seq in itertools.count(1):
        soon = min(deadline, time.monotonic() + _RETRY_S)
        if target not in stack.neighbours:
            send([stack.resolve_request(target)])
            wait_for(lambda: target in stack.neighbours, soon)
        if target in stack.neighbours:
            reply = (target, ident, seq & 0xFFFF, data)
            send([stack.echo_request(target, ident, seq & 0xFFFF, data)])
            if wait_for(lambda reply=reply: reply in stack.echo_replies, soon):  # type: ignore[misc]
                stack.echo_replies.discard(reply)
                return True
        if time.monotonic() >= deadline:
            return False
    raise AssertionError("unreachable")
