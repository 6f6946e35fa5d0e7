"""`vswitch start` with its real switch, asked over the control socket: shapes, errors, events."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.controlled import DEADLINE_S
from tests.support.processes import environment, sockets
from vswitch import Client
from vswitch.api import (
    FdbEntry,
    LongestTurn,
    PortInfo,
    PortStats,
    TurnsInfo,
    WorkerInfo,
)
from vswitch.errors import ConfigError, ExistsError, NotFoundError, SocketError, UplinkError


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    config = tmp_path / "ports.toml"
    config.write_text(
        '# kept\n[switch]\nname = "real"\ncontrol = "c.sock"\n'
        '[[port]]\nname = "vm1"\nsocket = "vm1.sock"\n'
        '[[port]]\nname = "vm2"\nsocket = "frontend.sock"\nmode = "client"\nqueues = 2\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "vswitch", "start", "--config", str(config)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("vswitch: ready"):
                break
        with Client(tmp_path / "c.sock", timeout=DEADLINE_S) as client:
            yield client
            client.stop()
        assert sockets(tmp_path) == []
        _, log = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, log
        assert "Traceback" not in log
    finally:
        process.kill()
        process.communicate()


def test_results_have_the_keys_they_are_said_to_have(client: Client) -> None:
    for port in client.ports():
        assert set(port) == PortInfo.__required_keys__
    for stats in client.stats():
        assert set(stats) == PortStats.__required_keys__
    for worker in client.workers():
        assert set(worker) == WorkerInfo.__required_keys__
        assert (worker["cycles_per_frame"] is not None) <= (worker["frames"] > 0)
    for turns in (client.event_loop()["turns"], *(each["turns"] for each in client.workers())):
        assert turns is not None
        assert set(turns) == TurnsInfo.__required_keys__
        assert set(turns["since_start"]) == LongestTurn.__required_keys__
        assert turns["since_start"]["longest_ns"] > 0
    client.fdb_add("52:54:00:00:00:01", "vm1", vlan=12)
    [entry] = client.fdb()
    assert set(entry) == FdbEntry.__required_keys__
    assert (entry["mac"], entry["vlan"], entry["port"], entry["static"]) == (
        "52:54:00:00:00:01",
        12,
        "vm1",
        True,
    )


def test_ports_come_and_go(client: Client, tmp_path: Path) -> None:
    assert {port["name"]: port["state"] for port in client.ports()} == {
        "vm1": "listening",
        "vm2": "connecting",
    }
    events = client.events("port-added", "port-removed", timeout=DEADLINE_S)
    path = tmp_path / "vm3.sock"
    added = client.add_port("vm3", path, permissions="0600", mtu=9000)
    assert (added["state"], added["mtu"], added["queues"]) == ("listening", 9000, 1)
    assert path.is_socket()
    assert path.stat().st_mode & 0o777 == 0o600
    client.del_port("vm3")
    assert not path.exists()
    assert [(next(events)["event"]) for _ in range(2)] == ["port-added", "port-removed"]
    with pytest.raises(NotFoundError):
        client.port("vm3")
    again = client.add_port("vm3", path)
    assert again["name"] == "vm3"


def test_a_refused_port_leaves_no_journal(client: Client, tmp_path: Path) -> None:
    directory = tmp_path / "c.sock.rings"
    before = sorted(directory.iterdir())
    assert len(before) == 2
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SocketError, match="a regular file"):
        client.add_port("x", tmp_path / "file")
    assert sorted(directory.iterdir()) == before
    # What an earlier switch left may be needed yet.
    (directory / "x.rings").touch()
    with pytest.raises(SocketError, match="a regular file"):
        client.add_port("x", tmp_path / "file")
    assert (directory / "x.rings").exists()


def test_wrong_input_changes_nothing(client: Client, tmp_path: Path) -> None:
    before = client.settings()
    (tmp_path / "file").write_text("mine")
    busy = socket.socket(socket.AF_UNIX)
    busy.bind(str(tmp_path / "busy"))
    busy.listen()
    for cls, text, call in (
        (ExistsError, "vm1", lambda: client.add_port("vm1", tmp_path / "x")),
        (ExistsError, "vm1.sock", lambda: client.add_port("x", tmp_path / "vm1.sock")),
        (ExistsError, "control", lambda: client.add_port("x", tmp_path / "c.sock")),
        (SocketError, "a regular file", lambda: client.add_port("x", tmp_path / "file")),
        (SocketError, "server=on", lambda: client.add_port("x", tmp_path / "busy")),
        (SocketError, "mkdir", lambda: client.add_port("x", tmp_path / "no" / "x")),
        (ConfigError, "at most 107", lambda: client.add_port("x", "/" + "x" * 120)),
        (UplinkError, "not a TAP", lambda: client.add_uplink("lo")),
        (NotFoundError, "nix", lambda: client.del_port("nix")),
        (NotFoundError, "vm1", lambda: client.del_uplink("vm1")),
        (NotFoundError, "nix", lambda: client.stats("nix")),
        (NotFoundError, "nix", lambda: client.fdb_flush("nix")),
        (NotFoundError, "nix", lambda: client.fdb_add("52:54:00:00:00:01", "nix")),
        (NotFoundError, "52:54", lambda: client.fdb_del("52:54:00:00:00:01")),
    ):
        with pytest.raises(cls) as caught:
            call()
        assert text in str(caught.value)
    busy.close()
    (tmp_path / "busy").unlink()
    assert client.settings() == before
    assert (tmp_path / "file").read_text() == "mine"
    assert [port["name"] for port in client.ports()] == ["vm1", "vm2"]


def test_an_address_is_static_on_one_port(client: Client) -> None:
    client.fdb_add("52:54:00:00:00:01", "vm1")
    with pytest.raises(ExistsError):
        client.fdb_add("52:54:00:00:00:01", "vm2")
    assert client.fdb_flush() == 0
    client.del_port("vm1")
    assert client.fdb() == []


def test_saving_beside_an_editor(client: Client, tmp_path: Path) -> None:
    """What a file can say is saved, the rest is told, and what somebody wrote there stays."""
    file = tmp_path / "ports.toml"
    client.fdb_add("52:54:00:00:00:01", "vm1")
    client.set_link("vm2", False)
    assert client.worker_pin("vm1", 0) == 0
    assert client.save() == file
    assert client.unsaved == {"links_down": ["vm2"]}
    [vm1, _] = client.settings()["ports"]
    assert vm1["worker"] == 0
    assert vm1["static_macs"] == ["52:54:00:00:00:01"]
    assert file.read_text().count('static_macs = ["52:54:00:00:00:01"]') == 1
    assert file.read_text().count("worker = 0") == 1
    client.worker_pin("vm1", None)
    client.save()
    assert "worker" not in file.read_text()
    with file.open("a") as text:
        text.write('\n[[port]]\nname = "mine"\nsocket = "mine.sock"\n')
    edited = file.read_text()
    with pytest.raises(ConfigError, match='left alone: port "mine" was added') as caught:
        client.save()
    assert caught.value.code == "changed"
    assert file.read_text() == edited
    # Once it runs as well there is nothing to lose.
    client.add_port("mine", tmp_path / "mine.sock", worker=0)
    with pytest.raises(ConfigError, match='port "mine" was added'):
        client.save()
    client.save(force=True)
    assert "worker = 0" in file.read_text()
    with pytest.raises(NotFoundError, match="there is no worker 1"):
        client.add_port("more", tmp_path / "more.sock", worker=1)
    assert not (tmp_path / "more.sock").exists()


def test_many_addresses_are_the_same_in_pages_and_at_once(client: Client) -> None:
    for n in range(600):
        client.fdb_add(f"52:54:00:00:{n // 256:02x}:{n % 256:02x}", "vm1", vlan=n % 3)
    entries = client.fdb()
    assert len(entries) == 600
    assert entries == sorted(client._call("fdb"), key=lambda each: (each["vlan"], each["mac"]))
    client.del_port("vm1")
    assert client.fdb() == []


def test_save_and_load_again(client: Client, tmp_path: Path) -> None:
    client.add_port("vm3", tmp_path / "vm3.sock")
    client.del_port("vm1")
    text = client.save().read_text()
    assert text.startswith("# kept\n")
    assert "vm1" not in text
    done = subprocess.run(
        [sys.executable, "-m", "vswitch", "start", "--check", "-c", str(tmp_path / "ports.toml")],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "2 port(s)" in done.stdout
