"""The configuration file: what is accepted, and that every mistake is reported, once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from vswitch.config.keys import RUNTIME_KEYS, PortKeys, Row, RuntimeKeys, UplinkKeys, rows
from vswitch.config.read import ConfigFileError, load, parse, port_settings, uplink_settings
from vswitch.config.settings import (
    LinkSettings,
    NetworkSettings,
    PortSettings,
    Settings,
    SwitchSettings,
    UplinkSettings,
)
from vswitch.errors import ConfigError
from vswitch.ports.features import offered, withheld
from vswitch.vhost_user.protocol import Feature

CONFIG = Path(__file__).parents[3] / "config"

GOOD = """
[switch]
name = "lab-1"
control = "run/control.sock"
workers = 2
cpus = [0, 1]
polling = "busy"
idle_us = 0
mac_aging_s = 0
fdb_size = 16
log_level = "debug"

[[port]]
name = "vm1"
socket = "run/vm1.sock"
owner = "root"
group = "0"
permissions = "0660"
queues = 4
mtu = 9000

[[port]]
name = "vm2"
socket = "/run/vm2.sock"
mode = "client"

[uplink]
type = "tap"
name = "vswitch0"
bridge = "br0"
"""


def lines(text: str, file: Path | str = "p.toml") -> list[str]:
    with pytest.raises(ConfigFileError) as caught:
        parse(text, file=file)
    message = caught.value.message.split("\n")
    assert all(line.startswith(f"{file}: ") for line in message)
    return [line.removeprefix(f"{file}: ") for line in message]


def port(**values: object) -> str:
    keys = {"name": '"vm1"', "socket": '"/run/vm1"', **values}
    return "[[port]]\n" + "".join(f"{k} = {v}\n" for k, v in keys.items() if v is not None)


def link(*ends: str) -> str:
    return f"[[link]]\nports = {json.dumps(ends)}\n"


def test_networks_and_links() -> None:
    settings = parse(
        port(network='"core"') + '[[network]]\nname = "core"\nlearning = false\n'
        '[[uplink]]\nname = "a"\n[[uplink]]\nname = "b"\nnetwork = "default"\n'
        '[[uplink]]\nname = "c"\n' + link("a", "c")
    )  # fmt: skip
    assert settings.ports[0].network == "core"
    assert settings.networks == [NetworkSettings(name="core", learning=False)]
    assert [each.network for each in settings.uplinks] == [None, "default", None]
    assert settings.links == [LinkSettings(ports=["a", "c"])]
    assert settings.links[0].title == "a--c"


def test_an_address_may_be_static_in_two_networks_and_vlans() -> None:
    mac = "52:54:00:00:00:01"
    settings = parse(
        port(static_macs=f'["{mac}", "{mac} vlan 7"]')
        + port(name='"vm2"', socket='"/b"', static_macs=f'["{mac} vlan 8"]')
        + port(name='"vm3"', socket='"/c"', static_macs=f'["{mac}"]', network='"core"')
        + '[[network]]\nname = "core"\n'
    )
    assert [each.static_macs for each in settings.ports] == [
        [mac, f"{mac} vlan 7"], [f"{mac} vlan 8"], [mac],
    ]  # fmt: skip


def test_a_table_that_cannot_be_read_is_not_missed_as_well() -> None:
    """A network whose name is wrong is one mistake, not another for each port in it."""
    text = port(network='"core"') + '[[network]]\nname = "co re"\n' + link("vm8", "vm9")
    (line,) = lines(text)
    assert line.startswith('network "co re".name: may contain only')


def test_everything_that_can_be_set_is_read(tmp_path: Path) -> None:
    settings = parse(GOOD, file=tmp_path / "ports.toml")
    assert settings.switch == SwitchSettings(
        name="lab-1",
        control=tmp_path / "run/control.sock",
        workers=2,
        cpus=[0, 1],
        polling="busy",
        idle_us=0,
        mac_aging_s=0,
        fdb_size=16,
        log_level="debug",
    )
    assert settings.ports[0].socket == tmp_path / "run/vm1.sock"
    assert settings.ports[0].permission_bits == 0o660
    assert settings.ports[1] == PortSettings(
        name="vm2", socket=Path("/run/vm2.sock"), mode="client"
    )
    assert settings.uplinks == [UplinkSettings(name="vswitch0", bridge="br0")]


def test_an_empty_file_is_a_switch_without_ports() -> None:
    assert parse("") == Settings()


def test_several_uplinks_are_an_array() -> None:
    settings = parse('[[uplink]]\nname = "a"\n[[uplink]]\nname = "b"\n')
    assert [uplink.name for uplink in settings.uplinks] == ["a", "b"]


def test_relative_sockets_resolve_against_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ports.toml"
    file.write_text(port(socket='"vm1.sock"'))
    cwd = Path.cwd()
    os.chdir("/")
    try:
        assert load(file).ports[0].socket == tmp_path / "vm1.sock"
    finally:
        os.chdir(cwd)


def test_all_mistakes_of_a_file_are_reported_at_once() -> None:
    text = """
    prots = 3
    [switch]
    name = ""
    workers = 2
    cpus = [1]
    polling = "fast"
    [[port]]
    name = "vm1"
    socket = "/run/vm1.sock"
    mod = "client"
    [[port]]
    name = "vm1"
    socket = "/run//vm1.sock"
    queues = 0
    [[port]]
    socket = "/run/vm3.sock"
    mode = "cleint"
    mtu = "1500"
    [[uplink]]
    name = "vswitch0"
    type = "veth"
    """
    assert lines(text) == [
        'prots: unknown key (did you mean "port"?)',
        'switch.name: must not be empty (got "")',
        "switch.cpus: must name one CPU per worker: 1 for workers = 2 (got [1])",
        'switch.polling: must be "adaptive", "busy" or "sleep" (got "fast")',
        'port[1].mod: unknown key (did you mean "mode"?)',
        "port[2].queues: must be at least 1 (got 0)",
        "port[3].name: is missing",
        'port[3].mode: must be "server" or "client" (got "cleint")',
        'port[3].mtu: must be a whole number without quotes (got "1500")',
        'uplink "vswitch0".type: must be "tap" (got "veth")',
        'port[2].name: is already the name of port[1] (got "vm1")',
        'port[2].socket: is already the socket of port "vm1" (got "/run//vm1.sock")',
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[switch]\nworkers = 0", "switch.workers: must be at least 1 (got 0)"),
        ("[switch]\nworkers = true", "switch.workers: must be a whole number without quotes (got "),
        ("[switch]\nworkers = 1.0", "switch.workers: must be a whole number without quotes (got "),
        (
            "[switch]\nworkers = 2\ncpus = [1, 1]",
            "switch.cpus: names a CPU twice (got [1, 1])",
        ),
        ("[switch]\ncpus = [-1]", "switch.cpus[1]: must be a CPU number from 0 to 1023 (got -1)"),
        ("[switch]\nlog_level = 'loud'", 'switch.log_level: must be "debug", "info", "warning" or'),
        ("switch = 3", "switch: must be one table, [switch] (got 3)"),
        ("port = [1]", "port: must be tables, [[port]] (got [1])"),
        ("uplink = 'tap'", 'uplink: must be tables, [[uplink]] (got "tap")'),
        ("[uplnik]\nname='a'", 'uplnik: unknown key (did you mean "uplink"?)'),
        (
            "frobnicate = 1",
            "frobnicate: unknown key (known are switch, network, port, uplink, link)",
        ),
        (port(queues=129), 'port "vm1".queues: must be at most 128 (got 129)'),
        (port(mtu=67), 'port "vm1".mtu: must be at least 68 (got 67)'),
        (port(mtu=65536), 'port "vm1".mtu: must be at most 65535 (got 65536)'),
        (port(name="3"), "port[1].name: must be text in quotes (got 3)"),
        (port(name='"a b"'), "port \"a b\".name: may contain only letters, digits, '_', '.' and"),
        (port(name=f'"{"n" * 33}"'), f'port "{"n" * 33}".name: has 33 characters, 32 are allowed'),
        (port(name='"\\u0000"'), "port[1].name: may contain only letters"),
        (port(socket='""'), 'port "vm1".socket: must not be empty (got "")'),
        (port(socket="7"), 'port "vm1".socket: must be a path in quotes (got 7)'),
        (port(socket='"/a\\u0000b"'), 'port "vm1".socket: contains a NUL byte (got "/a\\x00b")'),
        (
            port(socket=f'"/{"s" * 107}"'),
            'port "vm1".socket: is 108 bytes long, a Unix socket path has at most 107 (got "/sss',
        ),
        (
            port(socket=f'"/{"ü" * 54}"'),
            'port "vm1".socket: is 109 bytes long, a Unix socket path has at most 107',
        ),
        (port(permissions="660"), 'port "vm1".permissions: must be text in quotes (got 660)'),
        (
            port(permissions='"0999"'),
            'port "vm1".permissions: must be three octal digits in quotes such as "0660" (got',
        ),
        (port(permissions='"4755"'), 'port "vm1".permissions: must be three octal digits'),
        (port(owner='"no.body"'), 'port "vm1".owner: no such user on this machine (got "no.body")'),
        (port(group='"no.body"'), 'port "vm1".group: no such group on this machine'),
        (
            port(mode='"client"', group='"root"'),
            'port "vm1".group: is for mode = "server" only: in client mode the frontend creates',
        ),
        (port() + port(name='"vm2"'), 'port "vm2".socket: is already the socket of port "vm1"'),
        (
            '[switch]\ncontrol = "/run/vm1"\n' + port(),
            'port "vm1".socket: is already the socket of switch.control (got "/run/vm1")',
        ),
        (
            port() + '[uplink]\nname = "vm1"',
            'uplink "vm1".name: is already the name of port[1] (got',
        ),
        (
            '[[uplink]]\nname = "a"\n[[uplink]]\nname = "a"',
            "uplink[2].name: is already the name of uplink[1] (got",
        ),
        ('[uplink]\ntype = "tap"', "uplink[1].name: is missing"),
        (
            f'[uplink]\nname = "{"a" * 16}"',
            f'uplink "{"a" * 16}".name: has 16 characters, an interface name has at most 15 (got',
        ),
        ('[uplink]\nname = "tap%d"', 'uplink "tap%d".name: may contain only letters'),
        ('[uplink]\nname = ".."', 'uplink "..".name: is not a possible interface name (got "..")'),
        (
            '[uplink]\nname = "a"\nbridge = "a"',
            'uplink "a".bridge: must be another interface than the uplink itself (got "a")',
        ),
        (port(network='"core"'), 'port "vm1".network: there is no such [[network]] (there are def'),
        (
            '[[network]]\nname = "a"\n[[network]]\nname = "a"',
            "network[2].name: is already the name of network[1] (got",
        ),
        ('[[network]]\nname = "a"\nfdb_size = 15', 'network "a".fdb_size: must be at least 16'),
        (
            port() + link("vm1", "vm2"),
            "link[1].ports: there is no port or uplink \"vm2\" (got ['vm1'",
        ),
        (port() + link("vm1", "vm1"), "link[1].ports: has the same end twice (got"),
        (port() + link("vm1"), "link[1].ports: must be the names of its two ends (got"),
        (
            port() + '[uplink]\nname = "up"\nnetwork = "default"\n' + link("vm1", "up"),
            'link[1].ports: "up" is in network "default": a cable is in none (got',
        ),
        (
            port()
            + '[[uplink]]\nname="b"\n[[uplink]]\nname="c"\n'
            + link("vm1", "b")
            + link("vm1", "c"),
            'link[2].ports: "vm1" is an end of link[1] already (got',
        ),
        (
            port(static_macs='["52:54:00:00:00"]'),
            'port "vm1".static_macs: has \'52:54:00:00:00\': write "52:54:00:12:34:56" or',
        ),
        (
            port(static_macs='["01:00:5e:00:00:01"]'),
            'port "vm1".static_macs: has 01:00:5e:00:00:01,',
        ),
        (
            port(static_macs='["52:54:00:00:00:01 vlan 4095"]'),
            'port "vm1".static_macs: has VLAN 4095, which is above 4094 (got',
        ),
        (
            port(static_macs='["52:54:00:00:00:01", "52-54-00-00-00-01"]'),
            'port "vm1".static_macs: names an address twice (got',
        ),
        (
            port(static_macs='["52:54:00:00:00:01"]')
            + '[uplink]\nname = "up"\nstatic_macs = ["52:54:00:00:00:01"]',
            'uplink "up".static_macs: 52:54:00:00:00:01 is one of port[1] already (got',
        ),
        (
            port(static_macs='["52:54:00:00:00:01"]')
            + '[uplink]\nname = "up"\n'
            + link("vm1", "up"),
            'port "vm1".static_macs: it is the end of a cable, which has no addresses (got',
        ),
        ("[switch\nname = 1", "line 1, column 8: Expected ']' at the end of a table declaration"),
        ("x = ", "line 1: Invalid value at the end of the file"),
        (
            '[switch]\nname = "a"\nname = "b"\n',
            "line 3, column 11: Cannot overwrite a value (got 'name = \"b\"')",
        ),
    ],
)
def test_one_mistake_is_one_line(text: str, line: str) -> None:
    (found,) = lines(text)
    assert found.startswith(line)


def test_two_spellings_of_a_socket_are_one_socket(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    text = port(socket='"real/s"') + port(name='"vm2"', socket='"link/../real/./s"')
    assert len(lines(text, tmp_path / "f")) == 1
    text = port(socket='"real/s"') + port(name='"vm2"', socket='"link/s"')
    assert len(lines(text, tmp_path / "f")) == 1


def test_the_length_counts_the_resolved_path(tmp_path: Path) -> None:
    (line,) = lines(port(socket=f'"{"s" * 100}"'), tmp_path / "f")
    assert f"as '{tmp_path}/sss" in line
    assert line.endswith('sss")')


@pytest.mark.parametrize("content", [b"\xff\xfe", b'[switch]\nname = "\xe9"\n'])
def test_a_file_that_is_not_utf8(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "f"
    file.write_bytes(content)
    line = content.count(b"\n", 0, max(content.find(b"\xe9"), 0)) + 1
    with pytest.raises(ConfigFileError, match=f"{file}: line {line}: is not UTF-8 text"):
        load(file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: cannot be read: No such file"):
        load(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_values_given_at_run_time() -> None:
    settings = port_settings({"name": "vm1", "socket": "s"}, base=Path("/x"))
    assert settings.socket == Path("/x/s")
    with pytest.raises(ConfigError) as caught:
        port_settings({"name": "vm1", "socket": "s", "queues": 0, "color": 1})
    assert caught.value.message.split("\n") == [
        'port "vm1".socket: must be an absolute path (got "s")',
        'port "vm1".queues: must be at least 1 (got 0)',
        f'port "vm1".color: unknown key (known are {", ".join(PortSettings.model_fields)})',
    ]
    assert uplink_settings({"name": "t"}) == UplinkSettings(name="t")
    with pytest.raises(ConfigError, match=r"uplink.name: is missing"):
        uplink_settings({})


def test_a_worker_has_to_be_there() -> None:
    port = '[[port]]\nname = "a"\nsocket = "/a"\nworker = '
    assert parse(port + "0").ports[0].worker == 0
    assert parse("[switch]\nworkers = 3\n" + port + "2").ports[0].worker == 2
    with pytest.raises(ConfigError) as caught:
        parse(port + "1")
    assert caught.value.message == (
        'ports.toml: port "a".worker: must be below 1, the number of workers in [switch] (got 1)'
    )
    with pytest.raises(ConfigError, match="must be at most 63"):
        parse(port + "64")
    with pytest.raises(ValueError, match=r"port\[1\].worker must be below 1"):
        Settings(ports=[PortSettings(name="a", socket=Path("/a"), worker=1)])


def test_settings_made_in_code_are_checked_too() -> None:
    one = PortSettings(name="a", socket=Path("/a"))
    with pytest.raises(ValueError, match=r"port\[2\].name is already the name of port\[1\]"):
        Settings(ports=[one, PortSettings(name="a", socket=Path("/b"))])


@pytest.mark.parametrize("file", sorted(CONFIG.glob("*.toml")), ids=lambda f: f.stem)
def test_the_examples_are_valid(file: Path) -> None:
    assert load(file).ports


def test_the_commented_example_names_every_key() -> None:
    text = (CONFIG / "ports.toml").read_text()
    models = (SwitchSettings, NetworkSettings, PortSettings, UplinkSettings, LinkSettings)
    for key in {key for model in models for key in model.model_fields}:
        assert f"\n{key} = " in text or f"\n# {key} = " in text, key
    assert load(CONFIG / "ports.toml").switch == SwitchSettings()


@pytest.mark.parametrize(
    "row", {**rows(PortKeys), **rows(RuntimeKeys)}.values(), ids=lambda r: r.name
)
def test_the_commented_example_explains_every_key_of_a_port(row: Row) -> None:
    """Bounds and defaults with it: documents refer to it for those."""
    text = (CONFIG / "ports.toml").read_text().partition("\n[[port]]\n")[2]
    (block,) = [
        block
        for block in text.partition("\n[[port]]\n")[0].split("\n\n")
        if re.search(rf"^(# )?{row.name} = ", block, re.M)
    ]
    assert block.startswith("#") or row.name == "name"
    if row.key.least is not None:
        assert f"{row.key.least} to {row.key.most}" in block
    assert ("`vswitchctl set-port` changes" in block) == (row.name in RUNTIME_KEYS)
    if row.default:
        written = json.dumps(row.default)  # as TOML has texts, numbers and truth
        assert re.search(rf"^{row.name} = {re.escape(written)}$", block, re.M)


def test_models_have_the_keys_and_no_others() -> None:
    for model, keys in ((PortSettings, PortKeys), (UplinkSettings, UplinkKeys)):
        assert list(model.model_fields) == [*rows(keys), *RUNTIME_KEYS]
        for row in (*rows(keys).values(), *rows(RuntimeKeys).values()):
            assert row.key.text
            field = model.model_fields[row.name]
            assert field.default == row.default or field.is_required()


@pytest.mark.parametrize(
    ("value", "reason"), [(0, "must be at least 1"), (1 << 20, None), ((1 << 20) + 1, "at most")]
)
def test_bounds_are_those_of_the_key(value: int, reason: str | None) -> None:
    text = port(max_macs=value)
    if reason is None:
        assert parse(text).ports[0].max_macs == value
    else:
        assert reason in lines(text)[0]


def test_the_demo_has_three_ports_and_a_tap() -> None:
    settings = load(CONFIG / "demo.toml")
    assert [p.name for p in settings.ports] == ["vm1", "vm2", "vm3"]
    assert [u.name for u in settings.uplinks] == ["vswitch0"]
    run = CONFIG / "run"
    assert settings.switch.control is not None
    assert {p.socket.parent for p in settings.ports} == {run} == {settings.switch.control.parent}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ('"on"', 'must be true, false or a list of "csum", "tso4"'),
        ("1", "must be true, false or a list of"),
        ('["tso4"]', 'must have "csum" as well: tso4 is not possible without'),
        ('["csum", "lro"]', "names no offload with 'lro'; there are"),
        ('["csum", 4]', "names no offload with 4; there are"),
        ('["csum", "csum"]', "names an offload twice"),
    ],
)
@pytest.mark.parametrize("table", ["[[port]]\nsocket = '/x/s'", "[uplink]"])
def test_offloads_that_cannot_be(table: str, value: str, reason: str) -> None:
    with pytest.raises(ConfigFileError) as caught:
        parse(f"{table}\nname = 'a'\noffloads = {value}\n")
    (problem,) = caught.value.problems
    assert problem.key.endswith('"a".offloads')
    assert problem.reason.startswith(reason)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ('"-CTRL_VQ"', 'must be a list of features such as "-CTRL_VQ"'),
        ("[1]", "must be a list of features"),
        ('["-ctrl_vq"]', "names no feature with '-ctrl_vq' (did you mean '-CTRL_VQ'?)"),
        ('["-"]', "names no feature with '-'"),
        ('["--MQ"]', "names no feature with '--MQ'"),
        ('["RSS"]', "RSS is not offered by any port"),
        ('["CSUM"]', "CSUM is for `offloads` to offer; only -CSUM can stand here"),
        ('["-MQ", "-MQ"]', "names a feature twice"),
        ('["-MQ", "MQ"]', "names a feature twice"),
        ('["-CTRL_VQ", "MQ"]', "MQ rests on CTRL_VQ, which is not offered"),
        ('["RING_PACKED", "-VERSION_1"]', "RING_PACKED rests on VERSION_1"),
    ],
)
def test_features_that_cannot_be(value: str, reason: str) -> None:
    with pytest.raises(ConfigFileError) as caught:
        parse(f"[[port]]\nname = 'a'\nsocket = '/x/s'\nfeatures = {value}\n")
    (problem,) = caught.value.problems
    assert problem.key == 'port "a".features'
    assert problem.reason.startswith(reason)


def test_features_and_frontends() -> None:
    text = "[[port]]\nname = 'a'\nsocket = '/x/s'\n"

    def not_offered(more: str) -> set[str]:
        names = {str(feature.name) for feature in withheld(parse(text + more).ports[0])}
        assert names.isdisjoint(str(f.name) for f in offered(parse(text + more).ports[0]))
        return names

    control = {"CTRL_VQ", "CTRL_RX", "CTRL_VLAN", "CTRL_RX_EXTRA", "CTRL_MAC_ADDR", "MQ"}
    control.add("GUEST_ANNOUNCE")
    assert not_offered("") == not_offered("features = []") == set()
    assert not_offered("features = ['-CTRL_VQ']") == control
    assert not_offered("features = ['-HOST_TSO4']") == {"HOST_TSO4"}
    assert not_offered("features = ['-HOST_TSO4', '-HOST_TSO6']") == {
        "HOST_TSO4", "HOST_TSO6", "HOST_ECN",
    }  # fmt: skip
    assert not_offered("features = ['-CSUM']\noffloads = ['csum', 'uso']") == {"CSUM", "HOST_USO"}
    assert not_offered("features = ['-RSS', '-LOG_ALL']") == {"LOG_ALL"}
    uml = {*control, "MTU", "STATUS", "ACCESS_PLATFORM", "RING_PACKED"}
    # Virtio feature bits 3, 16 to 23, 33 and 34.
    assert {Feature[name].bit_length() - 1 for name in uml} == {3, *range(16, 24), 33, 34}
    assert not_offered("frontend = 'uml'") == uml
    assert not_offered("frontend = 'uml'\nfeatures = ['STATUS', '-IN_ORDER']") == {
        *uml - {"STATUS"}, "IN_ORDER",
    }  # fmt: skip
    assert not_offered("frontend = 'crosvm'") == {*control, "MTU", "STATUS"}
    assert not_offered("frontend = 'cloud-hypervisor'") == set()
    with pytest.raises(ConfigFileError, match="MQ rests on CTRL_VQ, which is not offered"):
        parse(f"{text}frontend = 'uml'\nfeatures = ['MQ']")
    with pytest.raises(ConfigFileError, match='frontend: must be "uml", "crosvm" or "cloud-hyp'):
        parse(f"{text}frontend = 'qemu'")


def test_offloads() -> None:
    text = "[[port]]\nname = 'a'\nsocket = '/x/s'\n"
    for value, expected in (
        ("true", True), ("false", False), ("[]", []), ('["csum", "uso"]', ["csum", "uso"]),
    ):  # fmt: skip
        assert parse(f"{text}offloads = {value}\n").ports[0].offloads == expected
    assert parse(text).ports[0].offloads is True
