"""`vswitch.Client`: a method for each request, events, and switches that do not answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

import vswitch
from tests.support.controlled import DEADLINE_S, Controlled
from vswitch import Client
from vswitch.control import channel
from vswitch.control import client as client_module
from vswitch.control.methods import METHODS
from vswitch.control.protocol import ControlError
from vswitch.errors import ConfigError, ExistsError, NotFoundError, SocketError


@pytest.fixture
def client(controlled: Controlled) -> Iterator[Client]:
    with Client(controlled.path, timeout=DEADLINE_S) as client:
        yield client


def test_it_is_public() -> None:
    assert vswitch.Client is client_module.Client
    assert "Client" in vswitch.__all__
    with pytest.raises(AttributeError):
        vswitch.Klient  # noqa: B018


def test_it_has_a_method_for_each_request() -> None:
    assert {name for name in METHODS if name != "hello"} <= set(dir(Client))


def test_importing_it_stays_light() -> None:
    code = "import sys, vswitch.control.client; print(*sys.modules)"
    root = str(Path(vswitch.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"asyncio", "pydantic", "rich", "tomlkit", "uvloop", "pyroute2"})


def test_the_switch(client: Client, controlled: Controlled, tmp_path: Path) -> None:
    assert client.switch["name"] == "lab"
    assert client.ping() > 0
    version = client.version()
    assert version["pid"] == os.getpid()
    assert version["config"] is None
    assert version["uptime_s"] >= 0
    assert client.log_level() in ("debug", "info", "warning", "error")
    assert client.settings()["switch"]["name"] == "lab"
    client.add_port("vm1", tmp_path / "vm1", queues=2, permissions="0660")
    written = client.save(tmp_path / "saved.toml")
    assert written == tmp_path / "saved.toml"
    again = vswitch.control.client.Client(controlled.path)
    assert "permissions" in written.read_text()
    again.close()
    again.close()


def test_ports_and_uplinks(client: Client, tmp_path: Path) -> None:
    port = client.add_port("vm1", tmp_path / "vm1", mtu=1500)
    assert (port["name"], port["socket"], port["mtu"]) == ("vm1", str(tmp_path / "vm1"), 1500)
    assert client.add_port("vm2", "/nowhere/vm2", mode="client")["mode"] == "client"
    assert client.add_uplink("tap7")["kind"] == "tap"
    assert [each["name"] for each in client.ports()] == ["vm1", "vm2", "tap7"]
    assert client.port("vm1")["rings"][1]["type"] == "transmitq"
    assert [each["name"] for each in client.stats()] == ["vm1", "vm2", "tap7"]
    assert client.stats("vm1")[0]["drops"] == {"runt": 3}
    assert client.workers()[0]["state"] == "sleeping"
    client.del_port("vm1")
    client.del_uplink("tap7")
    assert [each["name"] for each in client.ports()] == ["vm2"]


def test_mac_addresses(client: Client, controlled: Controlled, tmp_path: Path) -> None:
    client.add_port("vm1", tmp_path / "vm1")
    client.fdb_add("52-54-00-AB-CD-EF", "vm1", vlan=5)
    controlled.do(controlled.switch.learn, "52:54:00:00:00:01", "vm1")
    macs = {entry["mac"]: entry for entry in client.fdb()}
    assert macs["52:54:00:ab:cd:ef"]["static"]
    assert macs["52:54:00:ab:cd:ef"]["vlan"] == 5
    assert client.fdb_flush("vm1") == 1
    assert client.fdb_flush() == 0
    client.fdb_del("52:54:00:ab:cd:ef", vlan=5)
    assert client.fdb() == []


@pytest.mark.parametrize(
    ("cls", "call"),
    [
        (NotFoundError, lambda c: c.port("nix")),
        (NotFoundError, lambda c: c.del_port("nix")),
        (NotFoundError, lambda c: c.stats("nix")),
        (NotFoundError, lambda c: c.fdb_add("52:54:00:00:00:01", "nix")),
        (SocketError, lambda c: c.add_port("no-socket", "/tmp/x")),
        (ConfigError, lambda c: c.add_port("a b", "/tmp/x")),
        (ConfigError, lambda c: c.subscribe("nix")),
    ],
)
def test_errors_arrive_as_what_they_are(
    client: Client, cls: type, call: Callable[[Client], object]
) -> None:
    with pytest.raises(cls) as caught:
        call(client)
    assert getattr(caught.value, "message", "")
    assert client.ping() > 0


def test_a_name_that_is_taken(client: Client, tmp_path: Path) -> None:
    client.add_port("vm1", tmp_path / "a")
    with pytest.raises(ExistsError, match="vm1"):
        client.add_port("vm1", tmp_path / "b")


def test_events_come_in_order_and_during_other_calls(
    client: Client, controlled: Controlled, tmp_path: Path
) -> None:
    events = client.events("port-added", "port-ready", "port-removed", timeout=DEADLINE_S)
    client.add_port("vm1", tmp_path / "vm1")
    controlled.do(controlled.switch.emit, "mac-learned", "vm1")
    controlled.do(controlled.switch.emit, "port-ready", "vm1")
    client.del_port("vm1")
    names = ["port-added", "port-ready", "port-removed"]
    assert [next(events)["event"] for _ in names] == names


def test_events_end_after_a_silence(client: Client) -> None:
    assert list(client.events(timeout=0.01)) == []
    client.unsubscribe()


def test_events_end_with_the_switch(client: Client, controlled: Controlled) -> None:
    events = client.events()
    controlled.close()
    with pytest.raises(ControlError) as caught:
        next(events)
    assert caught.value.code == "disconnected"


def test_events_nobody_takes_are_dropped_and_counted(
    client: Client, controlled: Controlled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_EVENTS_HELD_MAX", 10)
    client.subscribe("mac-learned")
    for i in range(15):
        controlled.do(controlled.switch.emit, "mac-learned", "vm1", vlan=i)
        client.ping()
    client.ping()
    assert client.events_lost == 5
    assert next(client.events())["vlan"] == 5


def test_stop_returns_when_all_is_closed(client: Client, controlled: Controlled) -> None:
    client.stop()
    assert controlled.switch.closed
    assert not controlled.path.exists()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="no such socket") as caught:
        Client(tmp_path / "none")
    assert caught.value.code == "unreachable"
    assert "vswitch start" in caught.value.hint
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    with pytest.raises(ControlError, match="nobody listens"):
        Client(tmp_path / "stale")
    (tmp_path / "file").touch()
    with pytest.raises(ControlError, match="nobody listens"):
        Client(tmp_path / "file")
    with pytest.raises(ControlError, match="at most 107"):
        Client(tmp_path / ("x" * 200))


class Impostor:
    """A listener that does what it is told with the first connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(DEADLINE_S)

    def __call__(self, serve: Callable[[socket.socket], object]) -> Path:
        def run() -> None:
            sock, _ = self._listener.accept()
            with sock:
                serve(sock)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()
        return self.path

    def close(self) -> None:
        self.done.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        self._listener.close()


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Impostor]:
    impostor = Impostor(tmp_path / "impostor")
    yield impostor
    impostor.close()


def test_a_program_that_never_answers(impostor: Impostor) -> None:
    path = impostor(lambda _: impostor.done.wait(DEADLINE_S))
    with pytest.raises(ControlError, match="no answer to hello") as caught:
        Client(path, timeout=0.05)
    assert caught.value.code == "timeout"


@pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n", b"\xc1\xc1", b"\x93\x01\x02\x03"])
def test_a_program_that_answers_something_else(impostor: Impostor, answer: bytes) -> None:
    def serve(sock: socket.socket) -> None:
        sock.sendall(answer)
        impostor.done.wait(DEADLINE_S)

    with pytest.raises(ControlError, match="does not answer as a control socket") as caught:
        Client(impostor(serve), timeout=DEADLINE_S)
    assert caught.value.code == "unreachable"


def test_a_program_that_hangs_up(impostor: Impostor) -> None:
    with pytest.raises(ControlError, match="closed the connection") as caught:
        Client(impostor(lambda sock: sock.recv(10)), timeout=DEADLINE_S)
    assert caught.value.code == "disconnected"


def test_a_refusal_is_understood_even_if_it_comes_before_the_question(impostor: Impostor) -> None:
    error = {"code": "permission-denied", "message": "uid 7 may not", "hint": "ask root"}

    def refuse(sock: socket.socket) -> None:
        sock.sendall(msgpack.packb([1, None, error, None]))

    with pytest.raises(ControlError, match="uid 7 may not") as caught:
        Client(impostor(refuse), timeout=DEADLINE_S)
    assert (caught.value.code, caught.value.hint) == ("permission-denied", "ask root")


def test_a_late_answer_is_not_taken_for_that_of_the_next_call(impostor: Impostor) -> None:
    second = threading.Event()

    def serve(sock: socket.socket) -> None:
        unpacker = msgpack.Unpacker()

        def request() -> list[Any]:
            while True:
                message: list[Any]
                for message in unpacker:
                    return message
                unpacker.feed(sock.recv(4096))

        hello = {"name": "x", "version": "0", "protocol": 1, "pid": 1}
        sock.sendall(msgpack.packb([1, request()[1], None, hello]))
        late = request()[1]
        now = request()[1]
        sock.sendall(msgpack.packb([1, late, None, {"level": "late"}]))
        sock.sendall(msgpack.packb([1, now, None, {"level": "now"}]))
        second.wait(DEADLINE_S)

    client = Client(impostor(serve), timeout=DEADLINE_S)
    client.timeout = 0.02
    with pytest.raises(ControlError, match="no answer to log_level"):
        client.log_level()
    client.timeout = DEADLINE_S
    assert client.log_level() == "now"
    second.set()
    client.close()


def test_the_place_to_start_a_switch_is_the_first_to_look_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client goes through all of them, over what a crashed switch left behind."""
    paths = [tmp_path / name / "c.sock" for name in ("a", "b", "c")]
    monkeypatch.setattr(channel, "default_socket_paths", lambda _: paths)
    with pytest.raises(ControlError, match=r"a/c.sock: no such socket, nor at .*/b/.* or .*/c/"):
        Client()
    for path in paths:
        path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(paths[0]))
    with pytest.raises(ControlError, match=r"a/c.sock: nobody listens there, nor at"):
        Client()
    running = Controlled(paths[2])
    try:
        with Client() as found:
            assert found.path == paths[2]
    finally:
        running.close()
