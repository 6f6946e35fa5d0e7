"""The control server against clients that keep the protocol, and against those that do not."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.support.controlled import DEADLINE_S, Controlled
from tests.support.otheruser import ask, call_as
from vswitch.control import server as server_module
from vswitch.control.access import Access, Peer, access_of
from vswitch.control.methods import METHODS, READ_ONLY
from vswitch.control.protocol import REQUEST_LEN_MAX
from vswitch.control.server import CLIENTS_RESERVED
from vswitch.control.subscriptions import EVENTS_QUEUED_MAX


class Raw:
    """A client that sends what it likes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.socket.settimeout(DEADLINE_S)  # not before: a full backlog would be an error
        self._unpacker = msgpack.Unpacker()

    def send(self, *values: object) -> None:
        self.socket.sendall(b"".join(map(msgpack.packb, values)))

    def receive(self) -> list[Any]:
        """The next message; an empty list at the end of the stream."""
        while True:
            message: list[Any]
            for message in self._unpacker:
                return message
            data = self.socket.recv(65536)
            if not data:
                return []
            self._unpacker.feed(data)

    def call(self, method: str, *params: object) -> Any:
        self.send([0, 77, method, list(params)])
        kind, msgid, error, result = self.receive()
        assert (kind, msgid, error) == (1, 77, None)
        return result


@pytest.fixture
def raw(controlled: Controlled) -> Iterator[Raw]:
    client = Raw(controlled.path)
    yield client
    client.socket.close()


def test_the_socket_is_for_its_owner_only(controlled: Controlled) -> None:
    status = controlled.path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()


def test_requests_are_answered_in_order(raw: Raw) -> None:
    raw.send(*([0, i, "ping", []] for i in range(500)))
    assert [raw.receive() for _ in range(500)] == [[1, i, None, "pong"] for i in range(500)]


def test_hello(raw: Raw) -> None:
    hello = raw.call("hello", {"protocol": 1, "client": "test"})
    assert hello["name"] == "lab"
    assert hello["protocol"] == 1
    assert hello["pid"] == os.getpid()
    raw.send([0, 2, "hello", [{"protocol": 2}]])
    error = raw.receive()[2]
    assert error["code"] == "unsupported-version"
    assert "protocol version 2" in error["message"]


@pytest.mark.parametrize(
    ("method", "params", "code", "text"),
    [
        ("", {}, "unknown-method", "unknown method"),
        ("add-port", {}, "unknown-method", "add_port"),
        ("x" * 30_000, {}, "unknown-method", "known are hello"),
        ("ping", {"x": 1}, "invalid-params", "ping: x: unknown key"),
        ("add_port", {}, "invalid-params", "add_port: name: is missing"),
        ("add_port", {"name": "a", "socket": "rel"}, "invalid-params", "absolute path"),
        ("add_port", {"name": "a", "socket": "/" + "x" * 200}, "invalid-params", "at most 107"),
        ("add_port", {"name": "a", "socket": "/x", "queues": 0}, "invalid-params", "at least 1"),
        ("add_port", {"name": "a", "soket": "/x"}, "invalid-params", 'did you mean "socket"'),
        ("add_port", {"name": "no-socket", "socket": "/x"}, "socket", "choose another path"),
        ("port", {"name": "nix"}, "not-found", "nix"),
        ("port", {"name": 1}, "invalid-params", "must be text"),
        ("fdb_add", {"mac": "1:2:3", "port": "a"}, "invalid-params", "52:54:00:12:34:56"),
        ("fdb_add", {"mac": "33:33:00:00:00:01", "port": "a"}, "invalid-params", "group address"),
        ("fdb_add", {"mac": "00:00:00:00:00:00", "port": "a"}, "invalid-params", "no address"),
        ("fdb_del", {"mac": "52:54:00:00:00:01", "vlan": 4095}, "invalid-params", "at most 4094"),
        ("log_level", {"level": "loud"}, "invalid-params", "warning"),
        ("save", {}, "invalid-config", "without a configuration file"),
        ("save", {"path": "rel.toml"}, "invalid-params", "absolute path"),
        ("save", {"path": "/a\0b"}, "invalid-params", "absolute path"),
        ("subscribe", {"events": ["port-explodes"]}, "invalid-params", "port-ready"),
    ],
)
def test_wrong_requests(
    raw: Raw, method: str, params: dict[str, object], code: str, text: str
) -> None:
    raw.send([0, 3, method, [params]])
    kind, msgid, error, result = raw.receive()
    assert (kind, msgid, result) == (1, 3, None)
    assert error["code"] == code
    assert text in error["message"] + error["hint"]
    assert len(error["message"]) < 1000
    assert raw.call("ping") == "pong"


def test_all_wrong_parameters_are_reported_at_once(raw: Raw) -> None:
    raw.send([0, 3, "add_port", [{"name": "a b", "socket": "rel", "queues": "2", "mut": 1}]])
    lines = raw.receive()[2]["message"].splitlines()
    assert [line.split(": ")[1] for line in lines] == ["name", "socket", "queues", "mut"]


def test_an_error_inside_the_switch_costs_one_request(
    raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    raw.send([0, 4, "add_port", [{"name": "bug", "socket": "/tmp/bug"}]])
    error = raw.receive()[2]
    assert error["code"] == "internal"
    assert "nobody thought of" not in str(error)
    assert raw.call("ping") == "pong"
    assert "nobody thought of" in caplog.text


def test_a_request_of_the_wrong_shape_is_answered(raw: Raw) -> None:
    raw.send([0, 5, "ping", "x"], [0, 6, 7, []], [0, 7, "ping", []])
    answers = [raw.receive() for _ in range(3)]
    assert [answer[1] for answer in answers] == [5, 6, 7]
    assert [answer[2] and answer[2]["code"] for answer in answers] == ["invalid-request"] * 2 + [
        None
    ]


@pytest.mark.parametrize("value", ["hello?", 71, None, [], {}, [2, "note", []], [1, 1, None, 1]])
def test_a_message_that_is_no_request_ends_the_connection(raw: Raw, value: object) -> None:
    raw.send(value)
    _, msgid, error, _ = raw.receive()
    assert msgid is None
    assert error["code"] == "invalid-request"
    assert raw.receive() == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\xc1",
        b"\x00" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x94\x00\x01\xdb\x00\x0f\xff\xff" + b"x" * (REQUEST_LEN_MAX + 10),
        b"\x91" * 900 + b"\xc0",  # deeper than repr() goes
        b"\x94\x00\x01\xa4ping\xdf\x7f\xff\xff\xff",
        b"\x94\x00\x01\xa4ping\x91\x81\x90\xc0",  # an array as a key
        b"\x94\x00\x01\xa2\xff\xfe\x90",  # text that is no UTF-8
        # Values, whose bytes are forgotten as they are built, in a message without an end.
        b"\xdc\x01\x00" * 3 + b"\xcf\x00\x00\x00\x00\x00\x00\x00\x01" * REQUEST_LEN_MAX,
    ],
)
def test_garbage_costs_its_sender_the_connection_and_nobody_else(
    controlled: Controlled, raw: Raw, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    other = Raw(controlled.path)
    assert other.call("ping") == "pong"
    answers = []
    with contextlib.suppress(ConnectionError):  # it may close while we are still sending
        raw.socket.sendall(garbage)
        while answer := raw.receive():
            answers.append(answer)
    if answers:
        assert answers[-1][1] is None
        assert answers[-1][2]["code"] in ("protocol", "invalid-request")
    assert other.call("ping") == "pong"
    assert re.search(rf"control client \d+ \(pid {os.getpid()}, uid \d+\): closed: ", caplog.text)
    other.socket.close()


def test_clients_that_leave_in_mid_request(controlled: Controlled) -> None:
    for data in (b"", b"\x94", b"\x94\x00\x01\xa4pi"):
        client = Raw(controlled.path)
        client.socket.sendall(data)
        client.socket.close()
    controlled.wait(lambda: not controlled.server._tasks)
    assert Raw(controlled.path).call("ping") == "pong"


def test_clients_that_leave_before_their_answers_or_events(
    controlled: Controlled, caplog: pytest.LogCaptureFixture
) -> None:
    for how in ("close", "reset"):
        for _ in range(20):
            client = Raw(controlled.path)
            client.call("subscribe")
            client.send(*([0, i, "stats", []] for i in range(300)))
            if how == "close":
                client.socket.shutdown(socket.SHUT_WR)
            client.socket.close()
            for i in range(100):
                controlled.do(controlled.switch.emit, "mac-learned", "vm1", vlan=i)
    controlled.wait(lambda: not controlled.server._tasks)
    assert controlled.do(lambda: controlled.switch.subscribers) == 0
    gc.collect()
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_client_that_leaves_while_its_request_is_served(
    controlled: Controlled, caplog: pytest.LogCaptureFixture
) -> None:
    client = Raw(controlled.path)
    client.call("subscribe")
    client.send([0, 1, "add_port", [{"name": "slow", "socket": "/nowhere/x", "mode": "client"}]])
    client.send([0, 2, "ping", []])
    client.socket.close()
    for i in range(20):
        controlled.do(controlled.switch.emit, "mac-learned", "vm1", vlan=i)
    controlled.do(controlled.switch.may_go_on.set)
    controlled.wait(lambda: not controlled.server._tasks)
    gc.collect()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_client_that_reads_nothing_holds_up_nobody(controlled: Controlled) -> None:
    lazy = Raw(controlled.path)
    lazy.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.socket.setblocking(False)
    requests = msgpack.packb([0, 1, "stats", []]) * 1000
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 1 << 28:
            sent += lazy.socket.send(requests)
    # Its requests are not taken in any more either: the server holds little of them.
    assert sent < 4 << 20
    other = Raw(controlled.path)
    assert other.call("ping") == "pong"
    lazy.socket.close()
    other.socket.close()


def test_events(controlled: Controlled, raw: Raw) -> None:
    assert raw.call("subscribe", {"events": ["port-added", "mac-learned"]}) == {
        "events": ["mac-learned", "port-added"]
    }
    controlled.do(controlled.switch.emit, "port-ready", "vm1")
    controlled.do(controlled.switch.learn, "52:54:00:00:00:01", "vm1")
    assert raw.receive() == [
        2,
        "event",
        [
            {
                "event": "mac-learned",
                "time": 1.5,
                "port": "vm1",
                "mac": "52:54:00:00:00:01",
                "vlan": 0,
            }
        ],
    ]
    everything = raw.call("subscribe")["events"]
    assert "port-ready" in everything
    controlled.do(controlled.switch.emit, "port-ready", "vm1")
    assert raw.receive()[2][0]["event"] == "port-ready"
    raw.call("unsubscribe")
    assert controlled.do(lambda: controlled.switch.subscribers) == 0
    raw.call("unsubscribe")


def test_a_subscription_ends_with_its_connection(controlled: Controlled) -> None:
    client = Raw(controlled.path)
    client.call("subscribe")
    assert controlled.do(lambda: controlled.switch.subscribers) == 1
    client.socket.close()
    controlled.wait(lambda: controlled.switch.subscribers == 0)


def test_a_slow_subscriber_loses_events_and_is_told_how_many(
    controlled: Controlled, raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    raw.call("subscribe")
    n_events = 20 * EVENTS_QUEUED_MAX

    def storm() -> None:
        for i in range(n_events):
            controlled.switch.emit("mac-learned", "vm1", vlan=i, filler="x" * 200)

    controlled.do(storm)
    got: list[int] = []
    lost = 0
    while len(got) + lost < n_events:
        _, method, [params] = raw.receive()
        if method == "event":
            got.append(params["vlan"])
        else:
            assert method == "lost"
            lost += params["count"]
    assert lost >= n_events - EVENTS_QUEUED_MAX - 100
    assert got == sorted(got)
    assert "loses events" in caplog.text
    assert raw.call("ping") == "pong"


def test_too_many_clients(controlled: Controlled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "CLIENTS_MAX", 3 - CLIENTS_RESERVED)
    clients = [Raw(controlled.path) for _ in range(3)]
    assert all(client.call("ping") == "pong" for client in clients)
    one_more = Raw(controlled.path)
    _, msgid, error, _ = one_more.receive()
    assert msgid is None
    assert error["code"] == "busy"
    assert one_more.receive() == []
    clients.pop().socket.close()
    controlled.wait(lambda: controlled.server._clients < 3)
    assert Raw(controlled.path).call("ping") == "pong"


@pytest.mark.root("becomes another user")
def test_those_turned_away_take_nobodys_place(
    controlled: Controlled, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand at once, none of which reads or goes; then there is room, and one more gets it."""
    monkeypatch.setattr(server_module, "CLIENTS_MAX", 1 - CLIENTS_RESERVED)
    assert raw.call("ping") == "pong"
    storm = [Raw(controlled.path) for _ in range(1000)]
    assert storm[-1].receive()[2]["code"] == "busy"
    assert raw.call("ping") == "pong"
    raw.socket.close()
    controlled.wait(lambda: controlled.server._clients == 0)
    late = Raw(controlled.path)
    assert late.call("ping") == "pong"
    for client in (*storm, late):
        client.socket.close()
    controlled.wait(lambda: not controlled.server._tasks)


def test_a_request_that_never_ends_costs_its_patience(
    controlled: Controlled, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often another byte comes."""
    monkeypatch.setattr(server_module, "REQUEST_PATIENCE_S", 0.1)
    idle = Raw(controlled.path)
    assert idle.call("ping") == "pong"
    request = msgpack.packb([0, 1, "x" * 1000, []])
    answers: list[list[Any]] = []
    with contextlib.suppress(ConnectionError):
        raw.socket.sendall(request + request[:1])
        assert raw.receive()[:2] == [1, 1]
        for i in range(1, 1000):
            raw.socket.sendall(request[i : i + 1])
            time.sleep(0.001)  # it comes slowly, many times as long as the patience in all
    with contextlib.suppress(ConnectionError):
        while answer := raw.receive():
            answers.append(answer)
    assert [answer[1:3] for answer in answers] == [
        [
            None,
            {
                "code": "protocol",
                "message": "a request was begun and not finished in 0.1 s",
                "hint": "",
            },
        ]
    ]
    assert idle.call("ping") == "pong", "who has begun nothing may wait"
    idle.socket.close()


@pytest.mark.parametrize("what", ["answers", "events"])
def test_a_client_that_reads_nothing_is_dropped_after_a_while(
    controlled: Controlled,
    raw: Raw,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    monkeypatch.setattr(server_module, "READ_PATIENCE_S", 0.1)
    assert raw.call("ping") == "pong", "it is among those who are served"
    if what == "answers":
        raw.socket.setblocking(False)
        requests = msgpack.packb([0, 1, "version", []]) * 1000
        with contextlib.suppress(BlockingIOError):
            while True:
                raw.socket.send(requests)
    else:
        raw.call("subscribe")

        def storm() -> None:
            for i in range(EVENTS_QUEUED_MAX):
                controlled.switch.emit("mac-learned", "vm1", vlan=i, filler="x" * 1000)

        controlled.do(storm)
    controlled.wait(lambda: not controlled.server._tasks)
    assert "closed: it has read nothing for 0.1 s" in caplog.text
    assert controlled.do(lambda: controlled.switch.subscribers) == 0


def test_a_client_that_never_stops_asking_is_not_waited_for(controlled: Controlled) -> None:
    """A whole read full of questions is answered, and between two of them it is others' turn."""
    turns: list[int] = []
    answered = 0

    def count(*_: object) -> str:
        nonlocal answered
        answered += 1
        if answered == 1:
            controlled._loop.call_soon(lambda: turns.append(answered))
        return "vm1"

    controlled.do(lambda: setattr(controlled.switch, "stats", count))
    greedy = Raw(controlled.path)
    greedy.send(*([0, i, "stats", []] for i in range(500)))
    assert [greedy.receive()[1] for _ in range(500)] == list(range(500))
    assert turns == [1]
    greedy.socket.close()


def test_a_request_may_be_as_long_as_it_is_said(controlled: Controlled, raw: Raw) -> None:
    def request(length: int) -> bytes:
        packed: bytes = msgpack.packb([0, 1, "x" * (length - 7), []])
        return packed

    assert len(request(REQUEST_LEN_MAX)) == REQUEST_LEN_MAX
    raw.socket.sendall(request(REQUEST_LEN_MAX) * 3)
    for _ in range(3):
        assert raw.receive()[2]["code"] == "unknown-method"
    raw.socket.sendall(request(REQUEST_LEN_MAX + 1))
    assert raw.receive()[2]["code"] == "protocol"


def test_a_deep_value_is_a_wrong_parameter_and_no_more(raw: Raw) -> None:
    deep = b"\x91" * 900 + b"\xc0"
    raw.socket.sendall(b"\x94\x00\x05\xa4port\x91\x81\xa4name" + deep)
    error = raw.receive()[2]
    assert error["code"] == "invalid-params"
    assert len(error["message"]) < 200
    raw.socket.sendall(b"\x94\x00\x06\xa4port\x91" + deep)
    assert raw.receive()[2]["code"] == "invalid-request"
    assert raw.call("ping") == "pong"


def test_who_may_do_what() -> None:
    def status(mode: int, uid: int = 1000, gid: int = 100) -> os.stat_result:
        return os.stat_result((stat.S_IFSOCK | mode, 1, 1, 1, uid, gid, 0, 0, 0, 0))

    stranger = Peer(1, 4242, frozenset({4242, 100}))
    for peer, of_socket, access in (
        (Peer(1, 0, frozenset()), None, Access.ALL),
        (Peer(1, os.geteuid(), frozenset()), None, Access.ALL),
        (stranger, None, Access.NONE),
        (stranger, status(0o600), Access.NONE),
        (stranger, status(0o660), Access.ALL),
        (stranger, status(0o660, gid=101), Access.NONE),
        (stranger, status(0o606), Access.NONE),  # its group is what counts for a member
        (stranger, status(0o606, gid=101), Access.READ),
        (stranger, status(0o666), Access.ALL),
        (stranger, status(0o666, gid=101), Access.READ),
        (stranger, status(0o200, uid=4242), Access.ALL),
        (stranger, status(0o066, uid=4242), Access.NONE),
    ):
        assert access_of(peer, of_socket) is access, (peer, of_socket)


@pytest.mark.parametrize(
    ("mode", "gids", "answers"),
    [
        (0o660, [4242, 0], ["pong", {"level": "debug"}]),
        (0o666, [4242], ["pong", "permission-denied"]),
        (0o666, [4242, 0], ["pong", {"level": "debug"}]),
        (0o660, [4242], ["EACCES", "EACCES"]),
    ],
)
@pytest.mark.root("becomes another user")
def test_another_user(public_dir: Path, mode: int, gids: list[int], answers: list[object]) -> None:
    running = Controlled(public_dir / "c", mode=mode)
    logger = logging.getLogger("vswitch")
    before = logger.level
    try:
        assert [
            call_as(4242, gids, ask, public_dir / "c", *request)
            for request in (("ping",), ("log_level", {"level": "debug"}))
        ] == answers
    finally:
        logger.setLevel(before)
        running.close()


def test_everything_that_changes_something_is_refused_to_those_who_may_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Controlled(tmp_path / "c")
    try:
        monkeypatch.setattr(server_module, "access_of", lambda *_: Access.READ)
        client = Raw(running.path)
        denied = set()
        for method in METHODS:
            client.send([0, 1, method, []])
            error = client.receive()[2]
            if error is not None and error["code"] == "permission-denied":
                denied.add(method)
                assert "control_group" in error["hint"]
        assert denied == set(METHODS) - READ_ONLY
        assert denied == {
            "add_port", "del_port", "add_uplink", "del_uplink", "worker_pin", "worker_rebalance",
            "add_network", "del_network", "add_link", "del_link",
            "set_port", "set_link", "fdb_add", "fdb_del", "fdb_flush", "log_level", "save", "stop",
        }  # fmt: skip
        assert client.call("ping") == "pong", "the connection goes on"
        client.socket.close()
    finally:
        running.close()


@pytest.mark.root("becomes another user")
def test_a_connection_made_with_rights_that_are_gone_is_refused(
    public_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Who kept a descriptor of the directory, or is let in by the file system, is still looked at.
    running = Controlled(public_dir / "c", mode=0o666)
    try:
        monkeypatch.setattr(server_module, "access_of", lambda *_: Access.NONE)
        assert call_as(4242, [4242], ask, public_dir / "c", "ping") == "permission-denied"
    finally:
        running.close()


def test_the_log_level(raw: Raw) -> None:
    logger = logging.getLogger("vswitch")
    before = logger.level
    try:
        assert raw.call("log_level", {"level": "error"}) == {"level": "error"}
        assert logger.level == logging.ERROR
        assert raw.call("log_level") == {"level": "error"}
    finally:
        logger.setLevel(before)


def test_closing_removes_the_socket_and_ends_connections(controlled: Controlled, raw: Raw) -> None:
    assert raw.call("ping") == "pong"
    controlled.close()
    assert raw.receive() == []
    assert not controlled.path.exists()


def test_closing_leaves_the_socket_of_a_successor_alone(controlled: Controlled) -> None:
    controlled.path.unlink()
    successor = socket.socket(socket.AF_UNIX)
    successor.bind(str(controlled.path))
    controlled.close()
    assert controlled.path.exists()
    successor.close()
