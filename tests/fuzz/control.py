"""Control clients that lie: requests with changed methods, parameters, lengths and nesting, sent to
a running switch whose ports go on forwarding.

A case is plain data: steps as ["send", bytes in hex digits], ["read"], ["open"] and ["half"].
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from random import Random
from typing import Any

import msgpack

from tests.fuzz.bed import Violation
from tests.fuzz.messages import DEADLINE_S, MessageBench
from vswitch.control import methods

METHODS = [*sorted(set(methods.METHODS) - {"stop"}), "", "__init__", "ping\x00", "x" * 300]
"""All but `stop`, which is no attack: whoever may ask for it may have it."""

KEYS = [
    "name", "socket", "mode", "mtu", "queues", "offloads", "owner", "group", "permissions", "port",
    "worker", "mac", "vlan", "up", "path", "level", "events", "type", "version", "x",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 65535, 65536, 1 << 40, (1 << 64) - 1, -(1 << 63), 1.5,
    float("nan"), "", "x", "no/such", "../x", "/nonexistent/x.sock", "x" * 200, "\x00",
    "52:54:00:00:00:77",
    "server", "client", "tap", "info", b"", b"\xff\xfe", [], [1] * 20, {}, {"x": {}}, [[[[[]]]]],
]  # fmt: skip
RAW = [
    b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\x91" * 2000, b"\x81" * 600, b"\xdb\x7f\xff\xff\xff", b"\xc9\x00\x00\x00\x05\x00",
    b"\xd4\xff\x00",
    b"GET / HTTP/1.1\r\n\r\n",
    bytes(64), b"\xff" * 64,
]  # fmt: skip


def _request(rng: Random) -> bytes:
    method: Any = rng.choice(METHODS) if rng.random() < 0.9 else rng.choice(VALUES)
    params: Any = []
    if rng.random() < 0.8:
        chosen = rng.sample(KEYS, rng.randrange(5))
        params = [{key: rng.choice(VALUES) for key in chosen}]
    if rng.random() < 0.1:
        params = rng.choice(VALUES)
    message = [0, rng.choice([1, 2, 3, 7, 0xFFFFFFFF]), method, params]
    if rng.random() < 0.1:
        message[rng.randrange(4)] = rng.choice(VALUES)
    if rng.random() < 0.05:
        message.append(rng.choice(VALUES))
    if rng.random() < 0.05:
        message.pop()
    raw = bytearray(msgpack.packb(message))
    if rng.random() < 0.2:
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    if rng.random() < 0.1:
        raw = raw[: rng.randrange(len(raw))]
    # What a guest on the bystanders' ports needs stays as it is.
    return bytes(raw)


def make(seed: int) -> dict[str, Any]:
    """The case of a seed."""
    rng = Random(seed)
    ops: list[list[Any]] = [["open"]]
    if rng.random() < 0.7:
        hello = msgpack.packb([0, 0, "hello", [{"version": 1}]])
        ops.append(["send", hello.hex()])
    for _ in range(rng.randrange(1, 8)):
        what = rng.random()
        if what < 0.8:
            ops.append(["send", _request(rng).hex()])
        elif what < 0.9:
            ops.append(["send", rng.choice(RAW).hex()])
        elif what < 0.95:
            ops.append(["open"])
        else:
            ops.append(["half"])
        if rng.random() < 0.3:
            ops.append(["read"])
    return {"kind": "control", "seed": seed, "ops": ops}


class ControlBench(MessageBench):
    """A running switch whose control socket gets nonsense."""

    def run(self, case: dict[str, Any]) -> None:
        with contextlib.ExitStack() as stack:
            clients: list[socket.socket] = []
            for op, *arguments in case["ops"]:
                if op == "open":
                    clients.append(stack.enter_context(self._open()))
                with contextlib.suppress(ConnectionError):
                    if op == "send":
                        self._send(clients[-1], bytes.fromhex(arguments[0]), [])
                    elif op == "half":
                        clients[-1].shutdown(socket.SHUT_WR)
                    elif op == "read":
                        self._read(clients[-1], 0.002)
        self._tidy()
        self.check()

    def _open(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.connect(str(self.switch.run_dir / "control.sock"))
        peer.setblocking(False)
        return peer

    def _read(self, peer: socket.socket, patience_s: float) -> None:
        """Take what has been answered, if anything."""
        poll = select.poll()
        poll.register(peer, select.POLLIN)
        while poll.poll(patience_s * 1000) and (data := peer.recv(65536)):
            self.reached["answers"] += 1
            if b"internal" in data:
                raise Violation(f"the switch answered: {data[:2000]!r}")

    def _tidy(self) -> None:
        """Take away what the requests have made, so that the next case begins as this one did."""
        client = self.wire.client
        for port in client.ports():
            if port["name"] not in ("a", "b", "bad"):
                remove = client.del_port if port["kind"] == "vhost-user" else client.del_uplink
                remove(port["name"])
                self.reached["ports made"] += 1
        for name in ("a", "b", "bad"):
            if client.port(name)["link"] != "up":
                client.set_link(name, True)
        client.fdb_flush()
        client.log_level("info")
        deadline = time.monotonic() + DEADLINE_S
        while len(self.open_fds()) > len(self.fds) and time.monotonic() < deadline:
            time.sleep(0.001)  # between two looks
