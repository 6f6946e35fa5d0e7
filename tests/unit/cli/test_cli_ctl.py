"""The `vswitchctl` command line against a control server on a fake switch."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import click
import pytest

from tests.support.controlled import DEADLINE_S, Controlled
from tests.support.processes import environment
from vswitch import __version__
from vswitch.api import PortCounters, PortStats
from vswitch.cli import ctl
from vswitch.cli.counters import rates
from vswitch.cli.tables import event_line


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(
    controlled: Controlled, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a command line as the console script does."""
    monkeypatch.setenv("VSWITCH_SOCKET", str(controlled.path))

    def function(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["vswitchctl", *arguments])
        with pytest.raises(SystemExit) as caught:
            ctl.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert isinstance(caught.value.code, int)
        return Done(caught.value.code, captured.out, captured.err)

    return function


def test_ports(run: Run, controlled: Controlled, tmp_path: Path) -> None:
    socket = tmp_path / "vm1"
    added = run("add-port", "vm1", str(socket), "--queues", "2", "--permissions", "0660")
    assert added == (0, f"added port vm1 (ready, {socket})\n", "")
    assert controlled.do(lambda: controlled.switch.settings.ports[0].queues) == 2
    done = run("add-port", "vm2", "/nowhere/vm2", "--client", "--mtu", "9000", "--json")
    assert done.json["mode"] == "client"
    assert done.json["mtu"] == 9000
    done = run("add-port", "vm3", "/nowhere/vm3", "--client", "--offloads", "csum,tso4")
    assert done.code == 0
    assert controlled.do(lambda: controlled.switch.settings.ports[2].offloads) == ["csum", "tso4"]
    assert "must have" in run("add-port", "vm4", "/nowhere/4", "--offloads", "tso4").err
    assert run("add-port", "vm4", "/nowhere/4", "--client", "--offloads", "off").code == 0
    done = run(
        "add-port", "vm5", "/nowhere/5", "--client", "--frontend", "uml",
        "--features", "-IN_ORDER,STATUS",
    )  # fmt: skip
    assert done.code == 0
    port = controlled.do(lambda: controlled.switch.settings.ports[4])
    assert (port.frontend, port.features) == ("uml", ["-IN_ORDER", "STATUS"])
    assert "names no feature" in run("add-port", "vm6", "/nowhere/6", "--features", "-FOO").err
    assert run("add-port", "vm6", "/nowhere/6", "--frontend", "xen").code == 2
    assert controlled.do(lambda: controlled.switch.settings.ports[3].offloads) is False
    assert run("del-port", "vm3", "vm4", "vm5").code == 0

    table = run("list-ports").out.splitlines()
    assert table[0].split() == [
        "NAME", "ID", "KIND", "STATE", "LINK", "NETWORK", "PEER", "MODE", "SOCKET",
    ]  # fmt: skip
    assert table[1].split() == [
        "vm1", "0", "vhost-user", "ready", "up", "default", "-", "server", str(socket),
    ]  # fmt: skip
    assert [port["name"] for port in run("list-ports", "--json").json] == ["vm1", "vm2"]

    shown = run("show", "vm1").out
    for text in ("ready", "MRG_RXBUF VERSION_1", "256 MiB", "0x7f0000000000", "transmitq", "4711"):
        assert text in shown
    assert "guest [vm] memory is small" in shown
    assert "vm2" not in shown
    assert "vm2" in run("show").out
    assert [port["name"] for port in run("show", "--json").json] == ["vm1", "vm2"]
    assert run("show", "vm1", "--json").json[0]["rings"][3]["index"] == 3

    assert run("del-port", "vm1", "vm2").out == "deleted port vm1, vm2\n"
    assert "add-port" in run("show").out
    assert run("list-ports", "--json").json == []


def test_ports_are_deleted_all_or_none(run: Run, tmp_path: Path) -> None:
    for name in ("vm1", "vm2"):
        run("add-port", name, str(tmp_path / name))
    run("uplink", "add", "tap7")
    for others, said in (
        (["nosuch"], ['there is no port "nosuch"']),
        (["nosuch", "nix"], ['there is no port "nosuch", there is no port "nix"']),
        (["tap7"], ['"tap7" is an uplink (vswitchctl uplink del tap7)']),
    ):
        done = run("del-port", "vm1", *others, "vm2")
        assert (done.code, done.out) == (4, "")
        for text in (*said, "nothing was deleted"):
            assert text in done.err
        assert len(run("list-ports", "--json").json) == 3
    assert run("del-port", "vm1", "vm1", "--json").json == {"removed": ["vm1"]}


def test_a_port_that_goes_while_several_are_deleted(
    run: Run, controlled: Controlled, tmp_path: Path
) -> None:
    """It is said what was done before that."""
    for name in ("vm1", "vm2", "vm3"):
        run("add-port", name, str(tmp_path / name))
    remove = controlled.switch.del_port

    async def del_port(name: str) -> None:
        await remove(name)
        if name == "vm1":
            await remove("vm2")

    controlled.do(setattr, controlled.switch, "del_port", del_port)
    done = run("del-port", "vm1", "vm2", "vm3")
    assert done.code == 4
    assert 'no port "vm2"; deleted before that: vm1' in done.err
    assert [port["name"] for port in run("list-ports", "--json").json] == ["vm3"]


def test_the_link_of_a_port_is_seen(run: Run, tmp_path: Path) -> None:
    run("add-port", "vm1", str(tmp_path / "vm1"))
    assert "link               up" in run("show", "vm1").out
    assert run("set-link", "vm1", "down").out == "link of vm1 is down\n"
    assert run("list-ports").out.splitlines()[1].split()[4] == "down"
    assert run("list-ports", "--json").json[0]["link"] == "down"
    assert "down, nothing passes: vswitchctl set-link vm1 up" in run("show", "vm1").out
    run("uplink", "add", "tap7")
    assert run("list-ports").out.splitlines()[2].split() == [
        "tap7",
        "1",
        "tap",
        "up",
        "-",
        "default",
        "-",
        "-",
        "-",
    ]


def test_narrow_terminals(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number and no name is cut or broken, whatever the width."""
    name = "a-name-of-thirty-two-characters-"
    run("add-port", name, str(tmp_path / "a-long-path-to-a-socket" / ".." / "vm1"), "--client")
    values = {
        ("stats",): [name, "IN FRAMES 1000", "IN BYTES 1500000", "DROPPED FOR runt 3"],
        ("stats", "-w", "--interval", "0.1", "--count", "1"): [name, "IN FRAMES/S 0"],
        ("worker", "show"): ["CYCLES/FRAME 130", "WAKEUPS 2", "EVENTS LOST 3", "NOTIFIES BY aio"],
    }
    for width in (40, 60, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        for arguments, texts in values.items():
            out = run(*arguments).out
            assert max(map(len, out.splitlines())) <= width
            for text in texts:
                assert text in out
    monkeypatch.setenv("COLUMNS", "200")
    header, row = run("stats").out.splitlines()
    assert header.split()[0] == "NAME"
    assert row.split()[0] == name


def test_relative_sockets_are_those_of_the_caller(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("add-port", "vm1", "here", "--json").json["socket"] == str(tmp_path / "here")
    assert run("save", "saved.toml", "--json").json["path"] == str(tmp_path / "saved.toml")
    assert "vm1" in (tmp_path / "saved.toml").read_text()


def test_what_is_not_saved_is_said(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "saved.toml"
    logger = logging.getLogger("vswitch")
    before = logger.level
    logger.setLevel(logging.INFO)  # as the settings have it
    try:
        for name in ("vm1", "vm2"):
            run("add-port", name, str(tmp_path / name))
        assert run("save", str(file)) == (0, f"saved {file}\n", "")
        run("set-link", "vm2", "down")
        run("worker", "pin", "vm1", "0")
        run("log-level", "debug")
        done = run("save", str(file))
        assert (done.code, done.out) == (0, f"saved {file}\n")
        assert [line.partition(": not saved, ")[2] for line in done.err.splitlines()] == [
            "a file has no word for it: link down of vm2 (vswitchctl set-link)",
            "a file has no word for it: log level debug (vswitchctl log-level)",
        ]
        assert "worker = 0" in file.read_text()
        done = run("save", str(file), "--json")
        assert done.err == ""
        assert done.json["unsaved"] == {
            "links_down": ["vm2"], "log_level": "debug"
        }  # fmt: skip
    finally:
        logger.setLevel(before)


def test_a_file_that_was_edited_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "saved.toml"
    run("add-port", "vm1", str(tmp_path / "vm1"))
    assert run("save", str(file)).code == 0
    edited = file.read_text() + '\n[[port]]\nname = "mine"\nsocket = "mine.sock"\n'
    file.write_text(edited)
    done = run("save", str(file))
    assert (done.code, done.out) == (1, "")
    assert 'left alone: port "mine" was added\n' in done.err
    assert "vswitchctl save --force" in done.err
    assert json.loads(run("save", str(file), "--json").err)["error"]["code"] == "changed"
    assert file.read_text() == edited
    assert run("save", str(file), "--force").code == 0
    assert "mine" not in file.read_text()
    assert run("save", str(file)).code == 0


def test_mac_addresses(run: Run, controlled: Controlled, tmp_path: Path) -> None:
    run("add-port", "vm1", str(tmp_path / "vm1"))
    assert run("fdb", "add", "52:54:00:00:00:01", "vm1", "--vlan", "7").code == 0
    controlled.do(controlled.switch.learn, "52:54:00:00:00:02", "vm1")
    rows = [line.split() for line in run("fdb", "show").out.splitlines()]
    assert rows == [
        ["MAC", "VLAN", "NETWORK", "PORT", "TYPE", "AGE"],
        ["52:54:00:00:00:02", "0", "default", "vm1", "learned", "9", "s"],
        ["52:54:00:00:00:01", "7", "default", "vm1", "static", "-"],
    ]
    assert len(run("--json", "fdb", "show").json) == 2
    assert run("fdb", "flush", "vm1").out == "deleted 1 learned addresses\n"
    assert run("fdb", "flush", "--json").json == {"removed": 0}
    assert run("fdb", "del", "52:54:00:00:00:01", "--vlan", "7").code == 0
    assert run("fdb", "show", "--json").json == []


def test_many_ports_at_once(run: Run, controlled: Controlled, tmp_path: Path) -> None:
    done = run("add-port", "r[1-2]-eth[0-1]", "h1", f"{tmp_path}/{{name}}.sock", "--mtu", "9000")
    assert (done.code, done.out) == (0, "added 5 ports: r1-eth0 to h1\n")
    ports = controlled.do(lambda: controlled.switch.settings.ports)
    assert [(port.name, port.socket.name, port.mtu) for port in ports] == [
        (name, f"{name}.sock", 9000) for name in ("r1-eth0", "r1-eth1", "r2-eth0", "r2-eth1", "h1")
    ]
    added = run("add-port", "a", "b", f"{tmp_path}/{{name}}", "--json").json
    assert [port["name"] for port in added] == ["a", "b"]
    assert "5 ports cannot have one socket" in run("add-port", "x[1-5]", f"{tmp_path}/x").err
    done = run("add-port", "v[1-3]", "a", "w", f"{tmp_path}/{{name}}")
    assert done.code == 5
    assert 'port "a" exists; added before that: 3 ports, up to v3' in done.err
    assert "runs backwards" in run("add-port", "v[3-1]", f"{tmp_path}/{{name}}").err


def test_networks(run: Run, controlled: Controlled, tmp_path: Path) -> None:
    added = run("network", "add", "core", "--learning", "off", "--fdb-size", "64")
    assert (added.code, added.out) == (0, "added network core\n")
    settings = controlled.do(lambda: controlled.switch.tables().items)
    assert [(each.name, each.learning, each.fdb_size) for each in settings] == [("core", False, 64)]
    run("add-port", "vm1", str(tmp_path / "vm1"), "--network", "core")
    assert controlled.do(lambda: controlled.switch.settings.ports[0].network) == "core"
    assert run("set-port", "vm1", "--network", "").out == "port vm1: network default\n"
    assert controlled.do(lambda: controlled.switch.settings.ports[0].network) is None
    rows = [re.split("  +", line) for line in run("network", "list").out.splitlines()]
    assert rows[0] == ["NAME", "PORTS", "ADDRESSES", "AT MOST", "AGING", "LEARNING"]
    assert rows[2] == ["core", "0", "2", "64", "never", "hub"]
    shown = run("network", "show", "default").out
    assert "2 known, 65536 at most" in shown
    assert "ports      vm1" in shown
    assert run("network", "show", "core", "--json").json["ports"] == []
    assert run("network", "add", "core").code == 5
    assert run("network", "del", "core", "--json").json == {"removed": ["core"]}
    assert run("network", "del", "core").code == 4
    assert run("fdb", "show", "--network", "core").code == 4


def test_cables(run: Run, tmp_path: Path) -> None:
    for name in ("r1", "r2"):
        run("add-port", name, str(tmp_path / name))
    assert run("link", "add", "r1", "r2").out == "added link r1--r2\n"
    assert run("link", "add", "r1", "r2", "--name", "c", "--json").json == {
        "name": "c", "ports": ["r1", "r2"],
    }  # fmt: skip
    assert [line.split() for line in run("link", "list").out.splitlines()] == [
        ["NAME", "PORT", "OTHER"], ["r1--r2", "r1", "r2"], ["c", "r1", "r2"],
    ]  # fmt: skip
    assert run("link", "del", "c").out == "deleted link c\n"
    assert run("link", "del", "c").code == 4
    assert run("link", "add", "r1", "nobody").code == 4


def test_counters(run: Run, tmp_path: Path) -> None:
    run("add-port", "vm1", str(tmp_path / "vm1"))
    header, row = (re.split("  +", line) for line in run("stats").out.splitlines())
    assert header[:8] == [
        "NAME", "IN FRAMES", "IN BYTES", "OUT FRAMES", "OUT BYTES", "DROPS", "KICKS", "CALLS",
    ]  # fmt: skip
    assert row[:8] == ["vm1", "1000", "1500000", "7", "420", "3", "5", "6"]
    assert (header[-1], row[-1]) == ("DROPPED FOR", "runt 3")
    assert len(header) == len(row) == len(PortCounters.__annotations__) + 3
    assert run("stats", "vm1", "--json").json[0]["ingress_bytes"] == 1_500_000
    watched = run("stats", "--watch", "--interval", "0.1", "--count", "2")
    assert watched.code == 0
    assert watched.out.count("IN FRAMES/S") == 2
    lines = run("stats", "-w", "--interval", "0.1", "--count", "2", "--json").out.splitlines()
    assert [json.loads(line)[0]["name"] for line in lines] == ["vm1", "vm1"]


def test_rates_are_per_second_and_survive_a_port_that_is_new() -> None:
    none = cast("PortCounters", dict.fromkeys(PortCounters.__annotations__, 0))

    def stats(port: int, frames: int, runts: int) -> PortStats:
        return {
            **none,
            "name": "vm1",
            "id": port,
            "ingress_frames": frames,
            "ingress_bytes": frames * 1000,
            "drops": {"runt": runts},
        }

    def row(before: list[PortStats], now: list[PortStats]) -> list[str]:
        (table,) = rates(before, now, 2.0)
        return list(table.lines(200))[1].split()

    found = row([stats(1, 1000, 4)], [stats(1, 5000, 6)])
    assert found[:8] == ["vm1", "2.00k", "16.00M", "0", "0", "1", "0", "0"]
    assert found[-2:] == ["runt", "2"]
    assert row([stats(1, 10**9, 4)], [stats(2, 40, 0)])[1] == "20"


def test_limits(run: Run) -> None:
    assert run("add-port", "vm3", "/nowhere/3", "--client", "--storm-multicast", "7").code == 0
    assert run("show", "vm3", "--json").json[0]["storm"]["multicast"] == 7
    done = run("set-port", "vm3", "--storm-broadcast", "1000", "--max-macs", "64")
    assert done.out == "port vm3: max-macs 64, storm-broadcast 1000\n"
    text = run("show", "vm3").out
    assert "learned, 64 at most" in text
    assert "broadcast 1000/s, multicast 7/s" in text
    assert run("set-port", "vm3", "--storm-multicast", "0").out.endswith("multicast default\n")
    assert run("show", "vm3", "--json").json[0]["storm"] == {
        "broadcast": 1000, "multicast": None, "unknown": None, "burst": None
    }  # fmt: skip
    assert run("set-port", "vm3").code == 2
    assert run("set-port", "nobody", "--max-macs", "1").code == 4
    assert "must be at least 1" in run("set-port", "vm3", "--max-macs", "-1").err


def test_uplinks_and_workers(run: Run) -> None:
    assert run("uplink", "add", "tap7", "--mtu", "1400", "--bridge", "br0").code == 0
    assert run("list-ports", "--json").json[0]["kind"] == "tap"
    assert run("uplink", "del", "tap7", "--json").json == {"removed": ["tap7"]}
    row = run("worker", "show").out.splitlines()[1].split()
    shares = ["5.0", "%", "95.0", "%"]
    assert row == [
        "0",
        "any",
        "sleeping",
        "3",
        *shares,
        "1007",
        "251.8",
        "130",
        "10",
        "2",
        "2",
        "3",
        "aio",
    ]
    shown = run("worker", "show", "--json").json
    assert shown["workers"][0]["busy_ns"] == 5_000_000


def test_turns(run: Run) -> None:
    """Those of the event loop are not measured here."""
    text = run("worker", "show").out
    assert re.search(r"^event loop +- +- +-$", text, re.M)
    assert re.search(r"^worker 0 +0.02 ms +4.00 ms \(3.95 not run\) +9.80 ms$", text, re.M)
    assert run("worker", "show", "--json").json["event_loop"] == {"turns": None}


def test_the_switch(run: Run) -> None:
    assert run("ping").out.startswith(f"pong from pid {os.getpid()} in ")
    assert run("ping", "--json").json["pid"] == os.getpid()
    assert f"vswitchctl {__version__}\nlab: vswitch {__version__}, " in run("version").out
    assert run("version", "--json").json["switch"]["name"] == "lab"
    assert run("--version").out == f"vswitchctl {__version__}\n"
    level = run("log-level").out.strip()
    assert run("log-level", level, "--json").json == {"level": level}


def test_stop(run: Run, controlled: Controlled) -> None:
    assert run("stop").out == f"stopped the switch with pid {os.getpid()}\n"
    assert controlled.switch.closed
    assert run("ping").code == 3


@pytest.mark.parametrize(
    ("arguments", "code", "what", "hint"),
    [
        (["show", "nix"], 4, 'no port "nix"', "list-ports"),
        (["del-port", "nix"], 4, 'no port "nix"', "list-ports"),
        (["stats", "nix"], 4, 'no port "nix"', "list-ports"),
        (["fdb", "del", "52:54:00:00:00:01"], 4, "52:54:00:00:00:01", ""),
        (["fdb", "add", "52:54:00:00:00:01", "nix"], 4, 'no port "nix"', ""),
        (["fdb", "add", "nix", "vm1"], 1, "must be a MAC address such as", ""),
        (["fdb", "add", "52:54:00:00:00:01", "vm1", "--vlan", "5000"], 1, "at most 4094", ""),
        (["add-port", "vm1", "/tmp/other"], 5, 'port "vm1" exists', "another name"),
        (["add-port", "no-socket", "/tmp/x"], 1, "cannot listen", "another path"),
        (["add-port", "a b", "/tmp/x"], 1, "may contain only letters", ""),
        (["add-port", "x", "/" + "x" * 120], 1, "at most 107", ""),
        (["add-port", "x", "/tmp/x", "--queues", "0"], 1, "queues: must be at least 1", ""),
        (["add-port", "x", "/tmp/x", "--client", "--group", "0"], 1, 'mode = "server" only', ""),
        (["uplink", "add", "x" * 20], 1, "at most 15", ""),
        (["save"], 1, "without a configuration file", "name the file"),
        (["events", "nix"], 1, "port-ready", ""),
        (["--socket", "/nonexistent/c", "ping"], 3, "no such socket", "vswitch start"),
        (["log-level", "loud"], 2, "'loud' is not one of", ""),
        (["add-port", "x"], 2, "Missing argument 'SOCKET'", ""),
        (["frobnicate"], 2, "No such command", ""),
        (["stats", "--interval", "0"], 2, "--interval", ""),
        (["stats", "--nosuch"], 2, "No such option", "vswitchctl stats --help"),
        (["set-link", "vm1", "sideways"], 2, "'sideways' is not one of", "vswitchctl set-link"),
        (["set-port", "vm1"], 2, "say what to change", ""),
        (["fdb", "nosuch"], 2, "No such command", ""),
        (["--timeout", "soon", "ping"], 2, "'soon' is not a valid float", ""),
        (["del-port"], 2, "Missing argument 'NAME...'", ""),
    ],
)
def test_errors(
    run: Run, tmp_path: Path, arguments: list[str], code: int, what: str, hint: str
) -> None:
    run("add-port", "vm1", str(tmp_path / "vm1"))
    done = run(*arguments)
    assert done.code == code
    assert done.out == ""
    assert what in done.err
    assert hint in done.err
    for before, behind in ((["--json"], []), ([], ["--json"])):
        done = run(*before, *arguments, *behind)
        assert done.code == code
        error = json.loads(done.err)["error"]
        assert what in error["message"]
        assert hint in error["hint"]
        assert (error["code"] == "usage") == (code == 2)


def test_a_group_alone(run: Run) -> None:
    done = run("fdb")
    assert (done.code, done.out) == (2, "")
    assert "Usage: vswitchctl fdb" in done.err
    done = run("fdb", "--json")
    assert json.loads(done.err)["error"]["code"] == "usage"
    assert run("fdb", "--json", "show").json == []


def test_events(controlled: Controlled, tmp_path: Path) -> None:
    # Jobs in the background of a script ignore SIGINT, and so would what they start.
    start = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from vswitch.cli.ctl import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start, "events", "--json"],
        env=environment(VSWITCH_SOCKET=str(controlled.path)),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        controlled.wait(lambda: controlled.switch.subscribers)
        controlled.do(controlled.switch.emit, "port-ready", "vm1")
        assert json.loads(process.stdout.readline())["event"] == "port-ready"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.communicate()


def test_events_end_at_a_count_or_with_the_switch(controlled: Controlled) -> None:
    for arguments, code in ((["--count", "1"], 0), ([], 3)):
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from vswitch.cli.ctl import main; main()",
                "events",
                *arguments,
            ],
            env=environment(VSWITCH_SOCKET=str(controlled.path)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        controlled.wait(lambda: controlled.switch.subscribers)
        controlled.do(controlled.switch.emit, "mac-moved", "vm2", mac="a", previous_port="vm1")
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.endswith(" mac-moved         vm2 mac=a previous_port=vm1\n")
        if not arguments:
            controlled.close()
        _, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == code
        assert "Traceback" not in err


def test_a_reader_that_has_enough_is_no_error(controlled: Controlled) -> None:
    done = subprocess.run(
        f"{sys.executable} -c 'from vswitch.cli.ctl import main; main()' completion bash | true",
        shell=True,
        env=environment(VSWITCH_SOCKET=str(controlled.path)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""


def test_event_lines_cannot_drive_the_terminal() -> None:
    line = event_line(
        {"event": "port-fault", "time": 0.25, "port": "vm1", "reason": "\x1b[2J evil"}
    )
    assert "\x1b" not in line
    assert ".250 port-fault" in line


@pytest.mark.parametrize(
    ("typed", "offered", "not_offered"),
    [
        ("--frontend=", {"uml", "crosvm", "cloud-hypervisor"}, set()),
        ("--features=", {"-CTRL_VQ", "CTRL_VQ", "-CSUM"}, {"CSUM"}),
        ("--features=STATUS,-C", {"STATUS,-CTRL_VQ", "STATUS,-CSUM"}, {"STATUS,-MQ", "-CTRL_VQ"}),
    ],
)
def test_what_add_port_takes_is_completed(
    typed: str, offered: set[str], not_offered: set[str]
) -> None:
    words = {
        "_VSWITCHCTL_COMPLETE": "zsh_complete",
        "COMP_WORDS": f"vswitchctl add-port a b {typed}",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from vswitch.cli.ctl import main; main()"],
        env={**os.environ, **words, "COMP_CWORD": "4"},
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    said = set(done.stdout.splitlines())
    assert offered <= said
    assert said.isdisjoint(not_offered)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vswitchctl events port-r", "port-removed port-ready"),
        ("vswitchctl log-level w", "warning"),
        ("vswitchctl set-", "set-link set-port"),
    ],
)
def test_words_are_completed(line: str, offered: str) -> None:
    words = {"_VSWITCHCTL_COMPLETE": "bash_complete", "COMP_WORDS": line}
    done = subprocess.run(
        [sys.executable, "-c", "from vswitch.cli.ctl import main; main()"],
        env=environment(COMP_CWORD=str(len(line.split()) - 1), **words),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.stdout.split() == [f"plain,{word}" for word in offered.split()]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vswitchctl show v", ["vm1", "vm2"]),
        ("vswitchctl add-port --network c", ["core"]),
        ("vswitchctl set-port vm1 --network c", ["core"]),
        ("vswitchctl network del c", ["core"]),
        ("vswitchctl link del v", ["vm1--vm2"]),
    ],
)
def test_names_are_completed(
    run: Run, controlled: Controlled, tmp_path: Path, line: str, offered: list[str]
) -> None:
    for name in ("vm1", "vm2", "router"):
        run("add-port", name, str(tmp_path / name))
    run("network", "add", "core")
    run("link", "add", "vm1", "vm2")
    words = {"_VSWITCHCTL_COMPLETE": "bash_complete", "COMP_WORDS": line}
    last = str(len(line.split()) - 1)
    done = subprocess.run(
        [sys.executable, "-c", "from vswitch.cli.ctl import main; main()"],
        env=environment(VSWITCH_SOCKET=str(controlled.path), COMP_CWORD=last, **words),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == [f"plain,{name}" for name in offered]
    assert "_VSWITCHCTL_COMPLETE" in run("completion", "bash").out


def test_every_command_takes_json() -> None:
    seen = []

    def walk(command: click.Command) -> None:
        assert any("--json" in parameter.opts for parameter in command.params), command.name
        seen.append(command.name)
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                each = command.get_command(context, name)
                assert each is not None
                assert each.name == name
                walk(each)

    walk(ctl.cli)
    assert {"add-port", "show", "flush", "completion"} <= set(seen)
