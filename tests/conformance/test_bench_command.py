"""`vswitch bench` on a running switch: what it prints, and what it says when it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.measuring import something
from vswitch.control.client import Client
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.guest.errors import GuestError
from vswitch.lab.load.bench import Options, Rates, measure
from vswitch.lab.load.command import bench
from vswitch.lab.qemu.switch_process import SwitchProcess


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    """Ports a and b of a switch, and c, whose link is down."""
    folder = tmp_path_factory.mktemp("bench")
    lines = [f'[switch]\ncontrol = "{folder}/control.sock"']
    lines += [f'[[port]]\nname = "{name}"\nsocket = "{folder}/{name}.sock"' for name in "abc"]
    config = folder / "ports.toml"
    config.write_text("\n".join(lines) + "\n")
    with SwitchProcess(config, folder / "control.sock", folder / "log") as switch:
        with switch.client() as client:
            client.set_link("c", False)
        yield folder / "a.sock", folder / "b.sock", folder / "c.sock"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("size", "both"), [(64, False), (1500, True), (9000, False)])
def test_frames_get_through(sockets: tuple[Path, ...], size: int, both: bool, packed: bool) -> None:
    def rates_in(seconds: float) -> Rates | None:
        rates = measure(
            sockets[:2], Options(frame_len=size, seconds=seconds, both=both, packed=packed)
        )
        return rates if rates.frames_per_s > 0 else None

    rates = something(rates_in)
    assert rates.bits_per_s == pytest.approx(8 * size * rates.frames_per_s)
    assert rates.received > 0
    assert 0 < rates.latency_median_us <= rates.latency_p99_us


def test_what_is_printed(sockets: tuple[Path, ...]) -> None:
    arguments = ["-s", str(sockets[0]), "-s", str(sockets[1]), "--seconds"]
    text = CliRunner().invoke(bench, [*arguments, "0.05"])
    assert text.exit_code == 0, text.output
    assert [line.split()[0] for line in text.output.splitlines()] == ["rate", "loss", "latency"]

    def as_json(seconds: float) -> float:
        words = [*arguments, str(seconds), "--json"]
        found = json.loads(CliRunner().invoke(bench, words).output)
        assert found.keys() == set(Rates.__dataclass_fields__)
        return float(found["frames_per_s"])

    assert something(as_json) > 0


def test_when_nothing_gets_through(
    sockets: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vswitch.lab.load.bench._FIRST_FRAME_S", 0.1)
    with pytest.raises(
        GuestError, match=r"a broadcast sent to .*a\.sock did not arrive at .*c\.sock"
    ):
        measure((sockets[0], sockets[2]), Options(seconds=0.05))


def test_a_switch_that_forwards_only_later(
    sockets: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As VPP, which drops what comes before it has brought the interface up."""
    send, asked = SoftwareGuest.send, []

    def send_or_open(guest: SoftwareGuest, frames: list[bytes], **how: Any) -> None:
        asked.append(guest.path)
        if len(asked) == 3:
            with Client(sockets[0].parent / "control.sock") as client:
                client.set_link("c", True)
        send(guest, frames, **how)

    monkeypatch.setattr(SoftwareGuest, "send", send_or_open)
    try:
        rates = measure((sockets[0], sockets[2]), Options(seconds=0.1))
    finally:
        with Client(sockets[0].parent / "control.sock") as client:
            client.set_link("c", False)
    assert asked[:3] == [str(sockets[0])] * 3
    assert rates.received > 0


def test_wrong_usage(sockets: tuple[Path, ...]) -> None:
    run = CliRunner().invoke
    one = run(bench, ["-s", str(sockets[0])])
    assert one.exit_code == 2
    assert "1 sockets given, two are needed" in one.output
    assert run(bench, ["-s", "a", "-s", "b", "--size", "63"]).exit_code == 2
    no_cpu = run(bench, ["-s", "a", "-s", "b", "--cpu", "100000"])
    assert "CPU 100000 cannot be used" in str(no_cpu.exception)
