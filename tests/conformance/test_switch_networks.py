"""Networks and cables of a running switch: from its file, by its control socket, under traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.frames import BROADCAST, frame, mac
from tests.support.running import Wire, exchanging, silent, teach
from vswitch.control.client import Client
from vswitch.errors import ConfigError, ExistsError, NotFoundError
from vswitch.lab.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.lab.guest.options import by_subject

A, B, C, D = (mac(n) for n in (1, 2, 3, 4))


@pytest.fixture
def core(wire: Wire) -> Iterator[str]:
    """A network that is there for one test."""
    wire.client.add_network("core", fdb_size=64)
    yield "core"
    for name in wire.client.network("core")["ports"]:
        wire.client.set_port(name, network=None)
    wire.client.del_network("core")


def guest(wire: Wire, name: str, n: int, **options: object) -> SoftwareGuest:
    one = SoftwareGuest(mac(n), None, **by_subject(features=DEFAULT_FEATURES))
    wire.enter(one)
    one.connect(wire.port(name, **options))
    return one


def fdb(wire: Wire, network: str | None = None) -> set[tuple[str, str, str]]:
    return {(each["network"], each["mac"], each["port"]) for each in wire.client.fdb(network)}


def test_two_networks(wire: Wire, core: str) -> None:
    a, b = guest(wire, "a", 1), guest(wire, "b", 2)
    c, d = guest(wire, "c", 3, network=core), guest(wire, "d", 4, network=core)
    teach(a, b)
    teach(c, d)
    assert silent(a, b, c, d)
    assert fdb(wire) == {
        ("default", A, "a"), ("default", B, "b"), ("core", C, "c"), ("core", D, "d"),
    }  # fmt: skip
    assert fdb(wire, core) == {("core", C, "c"), ("core", D, "d")}
    sent = frame(C, A)
    a.send([sent])
    assert b.recv(1) == [sent], "nobody knows that one here"
    a.drain()
    assert silent(c, d)
    info = wire.client.network(core)
    assert (info["ports"], info["macs"], info["fdb_size"]) == (["c", "d"], 2, 64)
    assert [each["name"] for each in wire.client.networks()] == ["default", core]
    assert [wire.info(name)["network"] for name in "abcd"] == ["default", "default", core, core]


def test_the_same_address_in_two_networks(wire: Wire, core: str) -> None:
    a, b = guest(wire, "a", 1), guest(wire, "b", 2)
    c, d = guest(wire, "c", 1, network=core), guest(wire, "d", 4, network=core)
    teach(a, b)
    teach(c, d)
    assert fdb(wire) >= {("default", A, "a"), ("core", A, "c")}
    with pytest.raises(ExistsError, match="is in several networks: default, core"):
        wire.client.fdb_del(A)
    wire.client.fdb_del(A, network=core)
    assert ("core", A, "c") not in fdb(wire)
    assert wire.client.fdb_flush(network=core) == 1
    assert wire.client.fdb_flush("a", network=core) == 0
    assert wire.client.fdb_flush("a") == 1
    with pytest.raises(NotFoundError, match='there is no network "nowhere"'):
        wire.client.fdb("nowhere")


def test_a_port_moves_to_another_network(wire: Wire, core: str) -> None:
    """Others lose nothing; its own addresses are forgotten, and limits are those of its network."""
    a, b = guest(wire, "a", 1), guest(wire, "b", 2)
    c = guest(wire, "c", 3)
    teach(a, b, c)
    with exchanging(a, b):
        info = wire.client.set_port("c", network=core)
        assert (info["network"], info["macs"], info["max_macs"]) == (core, 0, 8)
    assert fdb(wire) == {("default", A, "a"), ("default", B, "b")}
    hello = frame(BROADCAST, C)
    c.send([hello])
    c.drain()
    assert silent(a, b)
    assert wire.drops("c") == {"no-destination": 1}
    assert wire.client.set_port("c", network=None)["network"] == "default"
    c.send([hello])
    assert a.recv(1) == b.recv(1) == [hello]


def test_a_hub(wire: Wire) -> None:
    wire.client.add_network("hub", learning=False)
    a, b, c = (guest(wire, name, n, network="hub") for n, name in enumerate("abc", 1))
    teach(a, b, c)
    sent = frame(B, A)
    a.send([sent])
    assert b.recv(1) == c.recv(1) == [sent]
    assert fdb(wire) == set()
    wire.client.fdb_add(B, "b")
    sent = frame(B, A, tag=1)
    a.send([sent])
    assert b.recv(1) == [sent]
    a.drain()
    assert silent(c)
    assert wire.client.network("hub")["learning"] is False
    for name in "abc":
        wire.client.set_port(name, network=None)
    wire.client.del_network("hub")


def test_what_cannot_be_done_to_networks(wire: Wire, core: str) -> None:
    guest(wire, "a", 1, network=core)
    with pytest.raises(ExistsError, match=r'ports are in the network "core": a'):
        wire.client.del_network(core)
    with pytest.raises(ExistsError, match='the network "default" always exists'):
        wire.client.del_network("default")
    with pytest.raises(ExistsError, match='there is a network "core" already'):
        wire.client.add_network(core)
    with pytest.raises(NotFoundError, match='there is no network "nowhere"'):
        wire.client.del_network("nowhere")
    with pytest.raises(NotFoundError, match='there is no network "nowhere"'):
        wire.port("b", network="nowhere")
    with pytest.raises(NotFoundError, match='there is no network "nowhere"'):
        wire.client.set_port("a", network="nowhere")
    with pytest.raises(ConfigError, match="fdb_size: must be at least 16"):
        wire.client.add_network("small", fdb_size=15)
    assert wire.info("a")["network"] == core


def test_a_cable(wire: Wire) -> None:
    a, b, c = guest(wire, "a", 1), guest(wire, "b", 2), guest(wire, "c", 3)
    teach(a, b, c)
    assert wire.client.add_link("a", "b") == {"name": "a--b", "ports": ["a", "b"]}
    assert fdb(wire) == {("default", C, "c")}
    for sent in (
        frame(BROADCAST, A), frame(C, A), frame(A, A), frame("01:80:c2:00:00:02", BROADCAST),
    ):  # fmt: skip
        a.send([sent])
        assert b.recv(1) == [sent]
    a.drain()
    assert silent(a, c)
    info = wire.info("a")
    assert (info["network"], info["peer"], info["macs"], info["max_macs"]) == (None, "b", 0, 0)
    assert wire.drops("a") == {}
    with exchanging(a, b):
        pass
    wire.client.del_link("a--b")
    assert wire.client.links() == []
    assert wire.info("a")["network"] == "default"
    sent = frame(C, A, tag=9)
    a.send([sent])
    assert c.recv(1) == [sent]
    a.drain()
    assert silent(b), "it is known"
    assert wire.info("a")["macs"] == 1


def test_what_cannot_be_done_to_cables(wire: Wire, core: str) -> None:
    for name in "abce":
        wire.port(name)
    wire.port("d", network=core)
    wire.client.add_link("a", "b", name="trunk")
    with pytest.raises(ExistsError, match='there is a link "trunk" already'):
        wire.client.add_link("c", "e", name="trunk")
    with pytest.raises(ExistsError, match='"a" is an end of link trunk already'):
        wire.client.add_link("a", "c")
    with pytest.raises(ExistsError, match='"d" is in network "core": a cable is in none'):
        wire.client.add_link("c", "d")
    with pytest.raises(NotFoundError, match='there is no port or uplink "nobody"'):
        wire.client.add_link("c", "nobody")
    with pytest.raises(ConfigError, match="ports: has the same end twice"):
        wire.client.add_link("c", "c")
    with pytest.raises(ExistsError, match='"a" is an end of link trunk: it can be in no network'):
        wire.client.set_port("a", network=core)
    with pytest.raises(ExistsError, match='"a" is an end of link trunk: it cannot be deleted'):
        wire.client.del_port("a")
    with pytest.raises(ExistsError, match='"a" is the end of a cable, which has no addresses'):
        wire.client.fdb_add(A, "a")
    with pytest.raises(NotFoundError, match='there is no link "other"'):
        wire.client.del_link("other")
    assert [each["name"] for each in wire.client.links()] == ["trunk"]
    wire.client.del_link("trunk")


def test_events(wire: Wire) -> None:
    wire.port("a")
    wire.port("b")
    with Client(wire.switch.run_dir / "control.sock") as client:
        names = ("network-added", "network-removed", "link-added", "link-removed")
        events = client.events(*names)
        wire.client.add_network("core")
        wire.client.del_network("core")
        wire.client.add_link("a", "b", name="cable")
        wire.client.del_link("cable")
        found = [next(events) for _ in names]
    assert [(e["event"], e.get("network"), e.get("cable")) for e in found] == [
        ("network-added", "core", None), ("network-removed", "core", None),
        ("link-added", None, "cable"), ("link-removed", None, "cable"),
    ]  # fmt: skip


TABLES = """
[[network]]
name = "core"
mac_aging_s = 0

[[network]]
name = "default"
learning = false

[[port]]
name = "a"
socket = "a.sock"

[[port]]
name = "b"
socket = "b.sock"
network = "core"

[[port]]
name = "c"
socket = "c.sock"

[[port]]
name = "d"
socket = "d.sock"

[[link]]
ports = ["c", "d"]
"""


def test_static_addresses_of_a_port(wire: Wire, core: str) -> None:
    """From its first frame on, as `fdb add` makes them, and as `save` writes them."""
    a = guest(wire, "a", 1)
    wire.port("b", static_macs=["52:54:00:00:00:09", "52:54:00:00:00:09 vlan 7"])
    wire.port("c", network=core, static_macs=["52:54:00:00:00:09"])
    assert {(e["network"], e["vlan"], e["port"], e["static"]) for e in wire.client.fdb()} == {
        ("default", 0, "b", True), ("default", 7, "b", True), ("core", 0, "c", True),
    }  # fmt: skip
    a.send([frame("52:54:00:00:00:09", A)])
    wire.wait_drops("a", {"egress-down": 1})
    with pytest.raises(ExistsError, match="is a static entry of port b"):
        wire.port("d", static_macs=["52:54:00:00:00:09"])
    with pytest.raises(NotFoundError):
        wire.info("d")
    wire.client.fdb_del("52:54:00:00:00:09", vlan=7)
    wire.client.fdb_add("52:54:00:00:00:0A", "b", vlan=3)
    by_name = {each["name"]: each["static_macs"] for each in wire.client.settings()["ports"]}
    assert by_name == {
        "a": [], "b": ["52:54:00:00:00:09", "52:54:00:00:00:0a vlan 3"], "c": ["52:54:00:00:00:09"],
    }  # fmt: skip
    wire.client.set_port("c", network=core)
    assert {e["port"] for e in wire.client.fdb() if e["static"]} == {"b", "c"}, (
        "it is there already"
    )
    wire.client.set_port("c", network=None)
    assert {e["port"] for e in wire.client.fdb() if e["static"]} == {"b"}
    assert wire.client.settings()["ports"][2]["static_macs"] == []


def test_a_file_with_networks_and_links(start: Callable[..., Wire]) -> None:
    """From the first frame on; and `save` writes what came and went."""
    wire = start(tables=TABLES)
    ends = []
    for n, name in enumerate("abcd", 1):
        one = wire.enter(SoftwareGuest(mac(n), None))
        one.connect(wire.switch.run_dir / f"{name}.sock")
        ends.append(one)
    a, b, c, d = ends
    sent = frame(BROADCAST, C)
    c.send([sent])
    assert d.recv(1) == [sent]
    c.drain()
    a.send([frame(BROADCAST, A)])
    a.drain()
    assert silent(a, b, c)
    assert wire.drops("a") == {"no-destination": 1}
    by_name = {each["name"]: each for each in wire.client.networks()}
    assert by_name["default"]["learning"] is False
    assert by_name["core"]["mac_aging_s"] == 0
    assert fdb(wire) == set()
    file = wire.switch.run_dir / "ports.toml"
    before = file.read_text()
    wire.client.save()
    assert file.read_text() == before
    wire.client.del_link("c--d")
    assert wire.client.set_port("c", max_macs=1)["max_macs"] == 1
    wire.client.add_network("edge")
    wire.client.set_port("c", network="edge")
    wire.client.save()
    settings = wire.client.settings()
    assert [each["name"] for each in settings["networks"]] == ["default", "core", "edge"]
    assert settings["links"] == []
    saved = file.read_text()
    assert "[[link]]" not in saved
    assert 'network = "edge"' in saved


def test_many_networks_and_cables(start: Callable[..., Wire]) -> None:
    """Lists are asked for a page at a time, and all of it is there."""
    wire = start()
    for n in range(300):
        wire.client.add_network(f"n{n}")
    for n in range(600):
        wire.client.add_port(
            f"p{n}", wire.switch.run_dir / f"p{n}", network=f"n{n // 2}" if n < 300 else None
        )
    for n in range(300, 600, 2):
        wire.client.add_link(f"p{n}", f"p{n + 1}")
    networks = {each["name"]: each["ports"] for each in wire.client.networks()}
    assert len(networks) == 301
    assert networks["n7"] == ["p14", "p15"]
    assert networks["default"] == []
    assert len(wire.client.links()) == 150
    for n in range(300):
        wire.client.fdb_add("52:54:00:00:00:01", f"p{n}", vlan=n % 2)
    # Of tables that are so small a page has several, and ends within one or between two.
    assert fdb(wire) == {(f"n{n // 2}", "52:54:00:00:00:01", f"p{n}") for n in range(300)}
    assert len(wire.client.fdb()) == 300
    some = wire.client._call("fdb", after=0, limit=7)
    assert len(some["items"]) == 7
    rest = wire.client._call("fdb", after=some["next"], limit=250)
    assert len({(e["network"], e["vlan"]) for e in some["items"] + rest["items"]}) == len(
        some["items"] + rest["items"]
    )
    assert wire.client.fdb_flush() == 0
    settings = wire.client.settings()
    assert [len(settings[kind]) for kind in ("networks", "ports", "links")] == [300, 600, 150]
    wire.client.save()
