"""vhost-user frontends that lie: the usual start of a connection, with fields, sizes, descriptors
and the order of messages changed, sent to a running switch.

A case is plain data: a list of messages as [request, flags, payload in hex digits, kinds of
descriptors, length to claim or None].
"""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import select
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.bed import Violation
from tests.fuzz.conversations import QUEUES, Message, lie, usual
from tests.fuzz.descriptors import CHANNELS, FDS
from tests.support.frames import frame, mac
from tests.support.running import RunningSwitch, Wire, teach
from vswitch.vhost_user.protocol import FLAG_REPLY, HEADER, VERSION

DEADLINE_S = 60.0

ANSWERS = [
    *["success"] * 6, "failure", "failure", "twice", "other", "short", "long", "silent", "end",
]  # fmt: skip
"""To requests of the backend, in turn."""


def make(seed: int) -> dict[str, Any]:
    """The case of a seed."""
    rng = Random(seed)
    ops = usual(rng)
    for _ in range(rng.choice([0, 1, 1, 2, 3, 6])):
        lie(rng, ops)
    answers = [rng.choice(ANSWERS) for _ in range(rng.choice([1, 1, 2, 5]))]
    return {"kind": "messages", "seed": seed, "ops": ops, "answers": answers}


_IO_URING = "anon_inode:[io_uring]"


class MessageBench:
    """A running switch, two guests on it that exchange frames, and a port for bad frontends."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        run_dir = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vswitch-"))
        self.switch = RunningSwitch(Path(run_dir))
        self.wire = Wire(self.switch)
        self.reached: Counter[str] = Counter()
        # A write beyond what the switch says it wrote is an error of these guests.
        self.guests = [self.wire.guest("ab"[n - 1], n, rx_guard_len=32) for n in (1, 2)]
        teach(*self.guests)
        self.socket = self.wire.port("bad", queues=QUEUES)
        self.count = 0
        self._answers = itertools.cycle(["success"])
        self.fds = self.open_fds()

    def close(self) -> None:
        """Stop the switch and see that it went in good order."""
        try:
            self.wire.close()
            self.switch.stop()
        finally:
            self._stack.close()

    def open_fds(self) -> list[str]:
        """What the switch has open, without the one io_uring that it keeps for uplinks."""
        folder = f"/proc/{self.switch.process.pid}/fd"
        found = []
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"{folder}/{name}"))
        if _IO_URING in found:
            found.remove(_IO_URING)
        return sorted(found)

    def run(self, case: dict[str, Any]) -> None:
        """Say all of it, hang up, and see that nobody was harmed. Raises Violation."""
        self._answers = itertools.cycle(case.get("answers", ["success"]))
        try:
            self.talk(case["ops"])
        finally:
            while CHANNELS:
                CHANNELS.pop().close()
        self.check()

    def talk(self, messages: list[Message]) -> None:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.closing(peer), contextlib.suppress(ConnectionError):
            peer.connect(str(self.socket))
            peer.setblocking(False)
            for request, flags, payload, kinds, claimed in messages:
                raw = bytes.fromhex(payload)
                size = len(raw) if claimed is None else claimed
                header = HEADER.pack(request & 0xFFFFFFFF, flags, size & 0xFFFFFFFF)
                with made(kinds) as fds:
                    self._send(peer, header + raw, fds)
            peer.shutdown(socket.SHUT_WR)
            while self._wait(peer, select.POLLIN) and peer.recv(4096):
                pass

    def _send(self, peer: socket.socket, data: bytes, fds: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while data:
            events = self._wait(peer, select.POLLIN | select.POLLOUT)
            # Replies are taken in, so that the switch never waits for us.
            if events & select.POLLIN and not peer.recv(4096):
                raise ConnectionResetError
            if events & select.POLLOUT:
                data = data[peer.sendmsg([data], rights) :]
                rights = []

    def _wait(self, peer: socket.socket, events: int) -> int:
        """What of `events` there is; what the switch asks for meanwhile is answered."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            poll = select.poll()
            poll.register(peer, events)
            for channel in CHANNELS:
                poll.register(channel, select.POLLIN)
            found = dict(poll.poll(DEADLINE_S * 1000))
            for channel in [one for one in CHANNELS if one.fileno() in found]:
                try:
                    self._answer(channel)
                except ConnectionError:
                    CHANNELS.remove(channel)
                    channel.close()
            if peer.fileno() in found:
                return found[peer.fileno()]
        raise Violation("the switch neither reads nor answers nor hangs up")

    def _answer(self, channel: socket.socket) -> None:
        """Answer one request of the switch, which sends the next one only then."""
        asked = channel.recv(4096)
        if len(asked) < HEADER.size:
            raise ConnectionResetError
        (request, _, _) = HEADER.unpack_from(asked)
        how = next(self._answers)
        self.reached[f"answered: {how}"] += 1
        status = struct.pack("<Q", how != "success" and how != "twice")
        reply = HEADER.pack(request, VERSION | FLAG_REPLY, len(status)) + status
        match how:
            case "twice":
                reply *= 2
            case "other":
                reply = HEADER.pack(request + 1, VERSION | FLAG_REPLY, len(status)) + status
            case "short":
                reply = HEADER.pack(request, VERSION | FLAG_REPLY, 4) + status[:4] + bytes(4)
            case "long":
                reply = HEADER.pack(request, VERSION | FLAG_REPLY, 0xFFFFFFFF) + bytes(3000)
            case "silent":
                return
            case "end":
                raise ConnectionResetError
        channel.send(reply)

    def check(self) -> None:
        self.count += 1
        deadline = time.monotonic() + DEADLINE_S
        while (info := self.wire.info("bad"))["state"] != "listening":
            if time.monotonic() > deadline:
                raise Violation(f"the port stays {info['state']}")
            time.sleep(0.001)  # between two looks
        self.reached[(info["error"] or "no error").split(":")[0][:40]] += 1
        a, b = self.guests
        for sender, receiver, dst, src in ((a, b, mac(2), mac(1)), (b, a, mac(1), mac(2))):
            sent = frame(dst, src, 200, self.count)
            sender.send([sent])
            # Frames of the hostile port may have come before.
            while (got := receiver.recv(1)) and got != [sent]:
                if got[0][6:12] != b"" and got[0][6:12] == sent[6:12]:
                    raise Violation("a neighbour's frame came changed")
            if got != [sent]:
                raise Violation("the neighbours do not hear each other any more")
        while (now := self.open_fds()) != self.fds:
            if time.monotonic() > deadline:
                raise Violation(f"open descriptors were {self.fds} and are {now}")
            time.sleep(0.001)  # between two looks
        if "Traceback" in self.switch.log or "internal error" in self.switch.log:
            raise Violation(f"the switch stumbled:\n{self.switch.log[-4000:]}")
        if len(self.switch.log) > 1 << 20:
            self.switch.log = ""


@contextlib.contextmanager
def made(kinds: list[str]) -> Iterator[list[int]]:
    """Descriptors of these kinds, closed afterwards."""
    fds: list[int] = []
    try:
        for kind in kinds:
            fds.append(FDS[kind]())
        yield fds
    finally:
        for fd in fds:
            os.close(fd)
