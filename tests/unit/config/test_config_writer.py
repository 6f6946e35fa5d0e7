"""Saving: what is written means what was meant, keeps comments, and replaces a file in one step."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vswitch.config.read import load, parse
from vswitch.config.settings import (
    LinkSettings,
    NetworkSettings,
    PortSettings,
    Settings,
    SwitchSettings,
    UplinkSettings,
)
from vswitch.config.write import render, save
from vswitch.errors import ConfigError

NAME = st.text("abcXYZ019_.-", min_size=1, max_size=32)
INTERFACE = st.text("abc019_-", min_size=1, max_size=15)
MTU = st.none() | st.integers(68, 65535)
SOCKET = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]),
    min_size=1,
    max_size=20,
).map(lambda text: Path("/run") / text.replace("..", "x"))


@st.composite
def switches(draw: st.DrawFn) -> SwitchSettings:
    workers = draw(st.integers(1, 4))
    cpus = st.lists(st.integers(0, 1023), min_size=workers, max_size=workers, unique=True)
    return SwitchSettings(
        name=draw(NAME),
        control=draw(st.none() | SOCKET.map(lambda path: Path("/control") / path.name)),
        workers=workers,
        cpus=draw(st.none() | cpus),
        polling=draw(st.sampled_from(["adaptive", "busy", "sleep"])),
        idle_us=draw(st.integers(0, 1_000_000)),
        mac_aging_s=draw(st.sampled_from([0, 300, 1_000_000])),
        fdb_size=draw(st.integers(16, 1_048_576)),
        log_level=draw(st.sampled_from(["debug", "info", "warning", "error"])),
    )


@st.composite
def configurations(draw: st.DrawFn) -> Settings:
    networks = draw(st.lists(NAME, unique=True, max_size=3))
    names = draw(st.lists(NAME, unique=True, max_size=5))
    # The first two ends of each cable are in no network.
    cables = draw(st.integers(0, len(names) // 2))
    sockets = draw(st.lists(SOCKET, unique=True, min_size=len(names), max_size=len(names)))
    ports: list[PortSettings] = []
    for name, socket in zip(names, sockets, strict=True):
        server = draw(st.booleans())
        ports.append(
            PortSettings(
                name=name,
                socket=socket,
                mode="server" if server else "client",
                owner=draw(st.sampled_from([None, "root", "0"])) if server else None,
                group=draw(st.sampled_from([None, "root"])) if server else None,
                permissions=draw(st.sampled_from([None, "0660", "777"])) if server else None,
                frontend=draw(st.sampled_from([None, "uml", "crosvm", "cloud-hypervisor"])),
                features=draw(st.sampled_from([[], ["-CSUM"], ["-IN_ORDER", "VERSION_1"]])),
                queues=draw(st.integers(1, 128)),
                mtu=draw(MTU),
                network=draw(st.sampled_from([None, "default", *networks]))
                if len(ports) >= 2 * cables
                else None,
            )
        )
    uplinks = draw(st.lists(INTERFACE, unique=True, max_size=3))
    return Settings(
        switch=draw(switches()),
        networks=[
            NetworkSettings(
                name=name,
                learning=draw(st.booleans()),
                mac_aging_s=draw(st.sampled_from([None, 0, 300])),
                fdb_size=draw(st.none() | st.integers(16, 1_048_576)),
            )
            for name in networks
        ],
        links=[
            LinkSettings(
                name=draw(st.sampled_from([None, f"link{i}"])), ports=names[2 * i : 2 * i + 2]
            )
            for i in range(cables)
        ],
        ports=ports,
        uplinks=[
            UplinkSettings(name=name, mtu=draw(MTU), bridge=draw(st.sampled_from([None, "br.0"])))
            for name in uplinks
            if name not in names
        ],
    )


@given(configurations())
@settings(deadline=None)
def test_what_is_written_is_read_back(configuration: Settings) -> None:
    assert parse(render(configuration), file="/etc/ports.toml") == configuration


@given(configurations(), configurations())
@settings(max_examples=200, deadline=None)
def test_a_file_is_brought_from_anything_to_anything(before: Settings, after: Settings) -> None:
    text = render(after, render(before), file="/etc/ports.toml")
    assert parse(text, file="/etc/ports.toml") == after


COMMENTED = """\
# my lab
[switch]
control = "run/c.sock"  # short

# the router
[[port]]
name = "vm1"       # first
socket = "run/vm1.sock"
mode = "server"

[uplink]
# to the host
name = "tap0"

# the client
[[port]]
name = "vm2"
socket = "/run/vm2.sock"
queues = 2 # two
"""


def test_an_unchanged_file_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "ports.toml"
    file.write_text(COMMENTED)
    save(load(file), file)
    assert file.read_text() == COMMENTED


def test_comments_and_relative_paths_stay(tmp_path: Path) -> None:
    file = tmp_path / "ports.toml"
    file.write_text(COMMENTED)
    before = load(file)
    after = before.model_copy(
        update={
            "ports": [
                before.ports[0].model_copy(update={"mtu": 9000}),
                before.ports[1].model_copy(update={"queues": 4}),
                PortSettings(name="vm3", socket=Path("/run/vm3.sock")),
            ]
        }
    )
    save(after, file)
    text = file.read_text()
    assert load(file) == after
    for kept in (
        "# my lab",
        'control = "run/c.sock"  # short',
        'name = "vm1"       # first',
        'socket = "run/vm1.sock"',
        "# to the host",
        "queues = 4 # two",
    ):
        assert kept in text
    assert '[[port]]\nname = "vm3"\nsocket = "/run/vm3.sock"\nmode = "server"\n' in text


def test_ports_and_uplinks_may_all_go(tmp_path: Path) -> None:
    file = tmp_path / "ports.toml"
    file.write_text(COMMENTED)
    after = Settings(switch=load(file).switch)
    save(after, file)
    assert load(file) == after
    assert 'control = "run/c.sock"  # short' in file.read_text()


@pytest.mark.parametrize(
    "text",
    [
        'port = [{name = "vm1", socket = "/run/vm1"}]\n',
        '[port]\nname = "vm1"\nsocket = "/run/vm1"\n',
        'switch.name = "x"\nport = [{name = "vm1", socket = "/run/vm1"}]\n',
        '[uplink]\nname = "tap0"\n',
        "",
        "# nothing\n",
    ],
)
def test_unusual_spellings_are_brought_to_mean_the_same(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ports.toml"
    file.write_text(text)
    after = Settings(
        switch=SwitchSettings(workers=2),
        ports=[PortSettings(name=f"vm{i}", socket=Path(f"/run/vm{i}")) for i in (1, 2)],
        uplinks=[UplinkSettings(name="tap0", mtu=1400), UplinkSettings(name="tap1")],
    )
    save(after, file)
    assert load(file) == after


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert save(Settings(), tmp_path / "new.toml") == tmp_path / "new.toml"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.toml").stat().st_mode) == 0o640


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    (tmp_path / "real").write_text(COMMENTED)
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    save(Settings(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o600
    assert load(tmp_path / "real") == Settings()


def test_a_file_that_is_no_configuration_is_left_alone(tmp_path: Path) -> None:
    for content in (b"[package]\nname = 'x'\n", b"= not toml", b"\xff\xfe"):
        file = tmp_path / "f"
        file.write_bytes(content)
        with pytest.raises(ConfigError):
            save(Settings(), file)
        assert file.read_bytes() == content
    with pytest.raises(ConfigError, match="is not a regular file"):
        save(Settings(), tmp_path)
    with pytest.raises(ConfigError, match="No such file or directory"):
        save(Settings(), tmp_path / "none" / "f")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ports.toml"
    file.write_text(COMMENTED)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        save(Settings(), file)
    assert file.read_text() == COMMENTED
    assert [p.name for p in tmp_path.iterdir()] == ["ports.toml"]


PORTS = """# mine
[[port]]
name = "a"
socket = "/run/a"

[[port]]
name = "b"
socket = "b"
"""


def test_a_file_that_says_something_unknown_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "ports.toml"
    file.write_text(PORTS)
    read = load(file)
    now = read.model_copy(update={"ports": [read.ports[0], port("c", mtu=1400)]})
    for edited, text in (
        (PORTS + '[[port]]\nname = "x"\nsocket = "x"\n', 'port "x" was added'),
        (PORTS.replace("/run/a", "/run/z"), 'port "a" was changed'),
        (PORTS + '[[uplink]]\nname = "tap7"\n', 'uplink "tap7" was added'),
        (PORTS[: PORTS.index("[[port]]", 20)], 'port "b" was taken out'),
        ("[switch]\nworkers = 2\n" + PORTS, "the [switch] table was changed"),
        (
            PORTS + "".join(f'[[port]]\nname = "x{n}"\nsocket = "x{n}"\n' for n in range(50)),
            "; and 42 more",
        ),
    ):
        file.write_text(edited)
        with pytest.raises(ConfigError) as caught:
            save(now, file, known=[read])
        assert caught.value.code == "changed"
        assert text in caught.value.message
        assert "save --force" in caught.value.hint
        assert file.read_text() == edited
        with pytest.raises(ConfigError, match=r'port "c" runs and is not in the file|and 44 more'):
            save(now, file, known=[])
    save(now, file)
    assert load(file) == now


def test_a_file_that_means_what_is_known_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "ports.toml"
    file.write_text(PORTS)
    read = load(file)
    now = read.model_copy(update={"ports": [*read.ports, port("c")]})
    # Comments, order of keys and spelling may change, and what runs may be in the file already.
    file.write_text(PORTS.replace("# mine", "# mine and yours") + "# the end\n")
    save(now, file, known=[read])
    assert "# mine and yours" in file.read_text()
    assert load(file) == now
    save(now, file, known=[])
    file.unlink()
    save(now, file, known=[])
    assert load(file) == now
    file.write_text(" \n")
    save(now, file, known=[])


def test_a_file_behind_a_link_is_the_one_that_was_read(tmp_path: Path) -> None:
    """Relative paths begin where the link is, as when it was read."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "ports.toml").write_text(PORTS)
    link = tmp_path / "ports.toml"
    link.symlink_to("real/ports.toml")
    read = load(link)
    save(read.model_copy(update={"ports": [*read.ports, port("c")]}), link, known=[read])
    assert link.is_symlink()
    assert load(link).ports[2].name == "c"
    assert load(link).ports[1].socket == tmp_path / "b"


def port(name: str, **more: Any) -> PortSettings:
    return PortSettings(name=name, socket=Path(f"/run/{name}"), **more)
