"""The switch is killed or stopped in the middle of transfers, and its guests go on.

They reconnect with the rings they have, as QEMU does, and with what QEMU would say of them: the
base of a packed ring is as old as the guest.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.scattering import scatter
from tests.support.formats import FORMATS
from tests.support.frames import frames, mac
from tests.support.running import RunningSwitch, posted
from vswitch.lab.guest import DEFAULT_FEATURES, Region, SoftwareGuest
from vswitch.lab.guest.options import by_subject
from vswitch.lab.guest.packets import format_mac
from vswitch.lab.load.load import Flow, FlowResult, Load
from vswitch.vhost_user.protocol import Feature

BURST = 64
"""The most frames of a transmitq that are in the switch at any time."""
DEADLINE_S = 60.0

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"drop": Feature(0)},
    "no events, many buffers": {"drop": Feature.RING_EVENT_IDX, "rx_buf_len": 300},
    "chains": {"drop": Feature(0), "indirect": False, "tx_cuts": (0, 20), "rx_cuts": (0, 500)},
    "small rings": {"drop": Feature.RING_INDIRECT_DESC, "queue_size": 16, "tx_cuts": (0,)},
}


ROOMY = [Region(0, 1 << 24, 0x7F00_0000_0000)]
"""Behind an IOMMU: the second half is where pages of rings go."""


class Pair:
    """Two guests with the same kind of rings, and their ports; `n` tells pairs apart."""

    def __init__(self, directory: Path, n: int, format: str, variant: str, **more: Any) -> None:
        options = VARIANTS[variant] | more
        features = (DEFAULT_FEATURES | FORMATS[format]) & ~options.pop("drop")
        self.name = f"{format}, {variant}"
        self.ports = f"a{n}", f"b{n}"
        self.sockets = [directory / f"{port}.sock" for port in self.ports]
        self.guests = [
            SoftwareGuest(
                mac(100 + 2 * n + i),
                polling=True,
                **by_subject(features=features, required_features=features, **options),
            )
            for i in (0, 1)
        ]
        self.macs = [format_mac(guest.mac) for guest in self.guests]

    def add_ports(self, running: RunningSwitch) -> None:
        """Ports and static entries: nothing is flooded to other pairs."""
        for port, socket, address in zip(self.ports, self.sockets, self.macs, strict=True):
            running.client.add_port(port, socket)
            running.client.fdb_add(address, port)

    def ways(self) -> list[tuple[SoftwareGuest, SoftwareGuest, str, str]]:
        """Both directions: the sender, the receiver, and their addresses."""
        (a, b), (mac_a, mac_b) = self.guests, self.macs
        return [(a, b, mac_a, mac_b), (b, a, mac_b, mac_a)]

    def flows(self) -> list[Flow]:
        return [
            Flow(
                sender.transmitqs[0], receiver.receiveqs[0], frames(dst, src, [60, 1514, 300]),
                window=min(128, len(self) // 2), verify=True, write_off_s=0.2,
            )
            for sender, receiver, src, dst in self.ways()
        ]  # fmt: skip

    def __len__(self) -> int:
        """Frames that a receiveq has room for, 1514 bytes each."""
        queue = self.guests[1].receiveqs[0].ring
        return queue.slots // (6 if queue.slots == 256 and "many" in self.name else 1)

    def progress(self) -> list[int]:
        return [g.receiveqs[0].ring.used_idx for g in self.guests]

    def check_at_rest(self) -> None:
        """Frames cross one by one, and every buffer and every frame is accounted for."""
        for guest in self.guests:
            guest.drain()
        for guest in self.guests:  # what was under way when the flows ended
            while guest.poll_frames(64):
                pass
        for sender, receiver, src, dst in self.ways():
            for i in range(3):
                sent = frames(dst, src, [60, 1514], tag=i)
                sender.send(sent)
                assert receiver.recv(2) == sent, self.name
            sender.drain()
            assert receiver.receiveqs[0].ring.outstanding == receiver.receiveqs[0].ring.slots
            assert receiver.poll_frames(1) == []


@contextlib.contextmanager
def closing(pairs: list[Pair]) -> Iterator[None]:
    try:
        yield
    finally:
        for pair in pairs:
            for guest in pair.guests:
                guest.close()


def wait_for_progress(pairs: list[Pair], least: int) -> None:
    """Until every receiveq was given at least so many buffers."""
    before = [pair.progress() for pair in pairs]
    deadline = time.monotonic() + DEADLINE_S
    for pair, then in zip(pairs, before, strict=True):
        while any(
            (now - was) % 65536 < least for now, was in zip(pair.progress(), then, strict=True)
        ):
            assert time.monotonic() < deadline, f"{pair.name}: stuck at {then} -> {pair.progress()}"
            time.sleep(0.002)  # between two looks


def run(directory: Path, pairs: list[Pair], endings: list[bool], chance: random.Random) -> None:
    """Transfers through one switch after the other; `endings` says which of them are killed."""
    results: list[FlowResult] = []
    errors: list[BaseException] = []
    running = RunningSwitch(directory)
    for pair in pairs:
        pair.add_ports(running)
        for guest, socket in zip(pair.guests, pair.sockets, strict=True):
            guest.connect(socket)
    load = Load([flow for pair in pairs for flow in pair.flows()])

    def drive() -> None:
        try:
            results.extend(load.run(600.0, settle_s=10.0, quiet_s=0.5))
        except BaseException as error:
            errors.append(error)

    driver = threading.Thread(target=drive)
    driver.start()
    try:
        for killed in endings:
            wait_for_progress(pairs, chance.randrange(50, 400))
            assert not errors
            if killed:
                running.kill()
            else:
                running.stop()
            running = RunningSwitch(directory)
            for pair in pairs:
                pair.add_ports(running)
            for pair in pairs:
                # The receiver of the first flow is there before its sender.
                for guest in reversed(pair.guests):
                    guest.reconnect()
        wait_for_progress(pairs, 300)
    finally:
        load.stop()
        driver.join()
        try:
            if not errors and len(results) == 2 * len(pairs):
                for pair in pairs:
                    pair.check_at_rest()
        finally:
            running.kill()
    assert errors == []
    for i, pair in enumerate(pairs):
        for result in results[2 * i : 2 * i + 2]:
            # A frame that came twice would be one that came too late.
            assert (result.misordered, result.corrupt) == (0, 0), pair.name
        # What piled up in a ring of 256 meanwhile may be more than the receiver has room for.
        assert results[2 * i].lost <= (BURST + 256) * len(endings), pair.name


def all_pairs(directory: Path, variants: list[str]) -> list[Pair]:
    return [
        Pair(directory, n, format, variant)
        for n, (format, variant) in enumerate((f, v) for v in variants for f in FORMATS)
    ]


@pytest.mark.parametrize(
    "variants", [["plain", "small rings"], ["no events, many buffers", "chains"]]
)
def test_transfers_go_on(run_dir: Path, variants: list[str]) -> None:
    directory = run_dir / variants[0][:2]
    directory.mkdir()
    pairs = all_pairs(directory, variants)
    with closing(pairs):
        run(directory, pairs, [True] * 5, random.Random(7))


@pytest.mark.parametrize(
    "format",
    [
        "packed",
        pytest.param("packed-in-order", marks=pytest.mark.slow),
        pytest.param("split", marks=pytest.mark.slow),
        "split-in-order",
    ],
)
def test_transfers_go_on_after_an_orderly_stop(run_dir: Path, format: str) -> None:
    """One pair at a time: a switch that ends floods for a moment, as its ports go one by one."""
    directory = run_dir / f"s{list(FORMATS).index(format)}"
    directory.mkdir()
    pairs = [Pair(directory, 0, format, "plain")]
    with closing(pairs):
        run(directory, pairs, [False, True, False], random.Random(5))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("format", FORMATS)
def test_many_crashes(run_dir: Path, format: str, variant: str) -> None:
    """One pair at full speed: the switch dies nearly always with frames in its hands."""
    directory = run_dir / f"{list(FORMATS).index(format)}{list(VARIANTS).index(variant)}"
    directory.mkdir()
    pairs = [Pair(directory, 0, format, variant)]
    with closing(pairs):
        run(directory, pairs, [True] * 25, random.Random(11))


@pytest.mark.parametrize("format", ["split", "packed"])
def test_scattered_rings_after_a_crash(run_dir: Path, format: str) -> None:
    """Rings behind an IOMMU whose pages lie anywhere are known again by the journal."""
    directory = run_dir / f"scattered{list(FORMATS).index(format)}"
    directory.mkdir()
    pair = Pair(directory, 0, format, "plain", iommu=True, queue_size=1024, regions=ROOMY)
    with closing([pair]):
        for n in range(4):
            running = RunningSwitch(directory)
            try:
                pair.add_ports(running)
                for guest, socket in zip(pair.guests, pair.sockets, strict=True):
                    since = len(guest.iommu.misses)
                    if n:
                        guest.reconnect()
                    else:
                        guest.connect(socket)
                    guest.iommu.wait_for_misses(posted(guest), since)
                    place = ROOMY[0].size // 2
                    for queue in guest.queues() if n == 0 else ():
                        place = scatter(guest, queue, place)
                for source, target, by, to in pair.ways():
                    for number in range(5):
                        sent = frames(to, by, [60] * 60, tag=1000 * n + number)
                        source.send(sent)
                        assert target.recv(60) == sent
                    source.drain()
            finally:
                running.kill()


def test_reboot_while_the_switch_is_down(run_dir: Path) -> None:
    """Fresh rings in the same places begin at their beginning, whatever was there before."""
    directory = run_dir / "reboot"
    directory.mkdir()
    pairs = all_pairs(directory, ["plain", "chains", "small rings"])
    with closing(pairs):
        for n, rounds in enumerate((1, 5, 16, 9)):
            running = RunningSwitch(directory)
            try:
                for pair in pairs:
                    pair.add_ports(running)
                    a, b = pair.guests
                    b.connect(pair.sockets[1])
                    a.connect(pair.sockets[0])
                    for i in range(rounds):
                        sent = frames(pair.macs[1], pair.macs[0], [60] * 16, tag=100 * n + i)
                        for batch in (sent[:8], sent[8:]):
                            a.send(batch)
                            assert b.recv(8) == batch, (pair.name, n, i)
                    a.drain()
            finally:
                if n % 2:
                    running.stop()
                else:
                    running.kill()
