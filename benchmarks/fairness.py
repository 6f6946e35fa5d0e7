"""`python -m benchmarks.fairness`: what a pair of guests keeps beside a third that asks too much.

All guests are on one worker. The bystander sends to its peer as fast as it can; beside it another
guest does so, in good order or not: it sends what is much work, or its peer makes work of it. What
counts is what the peer got of the bystander's frames, against the same beside a guest in good
order, which is entitled to a turn for each of the bystander's.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.guests import ethernet
from benchmarks.machine import Cpus, choose_cpus, describe, running_on
from vswitch.control.client import Client
from vswitch.errors import VswitchError
from vswitch.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.guest.load import Flow, Load
from vswitch.guest.packets import BROADCAST, checksum
from vswitch.guest.vnet import GSO_TCPV4, NEEDS_CSUM, VnetHeader
from vswitch.lab import programs
from vswitch.lab.process import sigterm_unwinds
from vswitch.lab.switch_process import SwitchProcess
from vswitch.vhost_user.protocol import Feature

PORTS = 16
BYSTANDER, PEER, OTHER, OTHERS_PEER = range(4)
"""Positions among the guests; those after them only receive."""
BYSTANDER_LEN = 300
OTHER_LEN = 64
LONG_LEN = 1514
WHOLE_LEN = 65549
"""Bytes of a frame: from frames and bytes at a port follows whose they were."""
MADE_UP = 60_000
_QUEUE_SIZE = 256
_WARM_UP = 0.2
_REFERENCE = "good order"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the other guest does: the frames it sends and how."""

    name: str
    frames: Callable[[list[SoftwareGuest]], list[bytes]] = lambda _: []
    receives: bool = True
    """Its peer posts receive buffers."""
    notified: bool = False
    """Its peer wants a notification for each burst and never takes one."""
    header: bytes = b""
    """The virtio_net_hdr of its frames."""
    guest: dict[str, Any] = field(default_factory=dict)
    peer: dict[str, Any] = field(default_factory=dict)
    """How it and its peer differ from the others, as options of SoftwareGuest."""


def _to_peer(guests: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(guests[OTHERS_PEER].mac, guests[OTHER].mac, OTHER_LEN)]


def _broadcast(guests: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(BROADCAST, guests[OTHER].mac, OTHER_LEN)]


def _made_up(guests: list[SoftwareGuest]) -> list[bytes]:
    return [
        ethernet(guests[OTHERS_PEER].mac, bytes((2, 0)) + n.to_bytes(4, "big"), OTHER_LEN)
        for n in range(MADE_UP)
    ]


def _long(guests: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(guests[OTHERS_PEER].mac, guests[OTHER].mac, LONG_LEN)]


def _long_broadcast(guests: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(BROADCAST, guests[OTHER].mac, WHOLE_LEN)]


def _whole(guests: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(guests[OTHERS_PEER].mac, guests[OTHER].mac, WHOLE_LEN)]


def _segmented(guests: list[SoftwareGuest]) -> list[bytes]:
    """TCP over IPv4, as much of it as a frame holds."""
    length = WHOLE_LEN - 14
    ip = struct.pack(">BBHHHBBH", 0x45, 0, length, 0, 0x4000, 64, 6, 0) + bytes(8)
    ip = ip[:10] + checksum(ip).to_bytes(2, "big") + ip[12:]
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 0, 0, 0x50, 0x10, 512, 0, 0)
    start = guests[OTHERS_PEER].mac + guests[OTHER].mac + b"\x08\x00" + ip + tcp
    return [start.ljust(WHOLE_LEN, b"\0")]


def _segments_of(size: int) -> bytes:
    return VnetHeader(NEEDS_CSUM, GSO_TCPV4, 54, size, 34, 16).pack()


_PIECES = tuple(range(1, 60))
_LARGE = {"max_frame_len": 65553, "queue_size": 64}
_TSO = DEFAULT_FEATURES & ~Feature.RING_EVENT_IDX | Feature.CSUM | Feature.HOST_TSO4

BEHAVIOURS = (
    Behaviour("alone"),
    Behaviour(_REFERENCE, _to_peer),
    Behaviour("peer posts no buffers", _to_peer, receives=False),
    Behaviour("peer takes no notifications", _to_peer, notified=True),
    Behaviour(f"broadcasts to {PORTS - 1} ports", _broadcast),
    Behaviour("cycles through source MACs", _made_up),
    Behaviour("chains of 60 descriptors", _long, guest={"tx_cuts": _PIECES}),
    Behaviour(
        "indirect tables of 60 descriptors",
        _long,
        guest={"tx_cuts": _PIECES, "indirect": True},
    ),
    Behaviour("peer posts buffers in 60 pieces", _long, peer={"rx_cuts": _PIECES}),
    Behaviour(
        "peer posts buffers of 16 bytes", _long, peer={"rx_buf_len": 16, "rx_queue_size": 1024}
    ),
    Behaviour("frames of 64 KiB", _whole, guest=_LARGE, peer={"max_frame_len": 65553}),
    Behaviour(
        "64 KiB into buffers of 128 bytes",
        _whole,
        guest=_LARGE,
        peer={"max_frame_len": 65553, "rx_buf_len": 128, "rx_queue_size": 2048},
    ),
    Behaviour("64 KiB whose peer has no room", _whole, guest=_LARGE, receives=False),
    Behaviour(f"broadcasts of 64 KiB to {PORTS - 1} ports", _long_broadcast, guest=_LARGE),
    Behaviour(
        "segments of 1448 bytes",
        _segmented,
        header=_segments_of(1448),
        guest=_LARGE | {"features": _TSO},
    ),
    Behaviour(
        "segments of 40 bytes",
        _segmented,
        header=_segments_of(40),
        guest=_LARGE | {"features": _TSO},
    ),
)


class Bench:
    """A running switch and its guests."""

    def __init__(self, folder: Path, cpus: Cpus, stack: ExitStack) -> None:
        control = folder / "control.sock"
        lines = ["[switch]", f'control = "{control}"', f"cpus = [{cpus.switch}]"]
        sockets = [folder / f"{n}.sock" for n in range(PORTS)]
        for n, socket in enumerate(sockets):
            lines += ["[[port]]", f'name = "{n}"', f'socket = "{socket}"']
        config = folder / "ports.toml"
        config.write_text("\n".join(lines) + "\n")
        switch = SwitchProcess(config, control, folder / "log")
        with running_on({cpus.switch}):
            switch.start()
        stack.callback(switch.stop)
        self._client = stack.enter_context(Client(control))
        self.guests: list[SoftwareGuest] = []
        for n, socket in enumerate(sockets):
            self.guests.append(_connect(n, socket, {}))
        self._sockets = sockets
        stack.callback(self._close)

    def _close(self) -> None:
        for guest in self.guests:
            guest.close()

    @contextlib.contextmanager
    def _differing(self, behaviour: Behaviour) -> Iterator[None]:
        """Have the other guest and its peer be as they are in this behaviour."""
        wanted = {OTHER: behaviour.guest, OTHERS_PEER: behaviour.peer}
        changes = {n: options for n, options in wanted.items() if options}
        for n, options in changes.items():
            self._replace(n, options)
        try:
            yield
        finally:
            for n in changes:
                self._replace(n, {})

    def _replace(self, n: int, options: dict[str, Any]) -> None:
        self.guests[n].close()
        self.guests[n] = _connect(n, self._sockets[n], options)

    def measure(self, behaviour: Behaviour, seconds: float) -> float:
        """Frames a second that the bystander's peer got from it."""
        with self._differing(behaviour):
            return self._measure(behaviour, seconds)

    def _measure(self, behaviour: Behaviour, seconds: float) -> float:
        guests = self.guests
        sender, peer = guests[BYSTANDER], guests[PEER]
        flows = [
            Flow(
                sender.transmitqs[0],
                peer.receiveqs[0],
                [ethernet(peer.mac, sender.mac, BYSTANDER_LEN)],
            )
        ]
        frames = behaviour.frames(guests)
        if frames:
            flows.append(
                Flow(
                    guests[OTHER].transmitqs[0],
                    None,
                    frames,
                    rewrite=len(frames) > 1,
                    header=behaviour.header,
                )
            )
        first = OTHERS_PEER if behaviour.receives else OTHERS_PEER + 1
        flows += [
            Flow(None, guest.receiveqs[0], [ethernet(BROADCAST, BROADCAST, OTHER_LEN)])
            for guest in (sender, guests[OTHER], *guests[first:])
        ]
        load = Load(flows)
        with _notified(guests[OTHERS_PEER]) if behaviour.notified else contextlib.nullcontext():
            load.run(seconds * _WARM_UP, settle_s=1.0)
            other_len = len(frames[0]) if frames else OTHER_LEN
            before = self._delivered(other_len)
            load.run(seconds, settle_s=1.0)
            return (self._delivered(other_len) - before) / seconds

    def _delivered(self, other_len: int) -> int:
        """How many of the bystander's frames its peer has got, give or take what stays the same.

        Besides them it gets none but of that length meanwhile.
        """
        stats = self._client.stats(str(PEER))[0]
        rest = stats["egress_bytes"] - other_len * stats["egress_frames"]
        return rest // (BYSTANDER_LEN - other_len)


def _connect(n: int, socket: Path, options: dict[str, Any]) -> SoftwareGuest:
    """The n-th guest, known to the switch."""
    # Without EVENT_IDX, so that flags alone say whether it wants notifications.
    common = {
        "queue_size": _QUEUE_SIZE,
        "features": DEFAULT_FEATURES & ~Feature.RING_EVENT_IDX,
        "indirect": False,
        "polling": True,
    }
    guest = SoftwareGuest(f"52:54:00:00:00:{n + 1:02x}", **(common | options))
    guest.connect(socket)
    guest.send([ethernet(BROADCAST, guest.mac, OTHER_LEN)])
    guest.drain()
    return guest


@contextlib.contextmanager
def _notified(guest: SoftwareGuest) -> Iterator[None]:
    """Have a guest ask for notifications again and again, and take none."""
    queue = guest.receiveqs[0]
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.0005):
            queue.raw.avail_flags = 0

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def run(cpus: Cpus, samples: int, seconds: float) -> dict[str, list[float]]:
    """Frames a second of the bystander, by behaviour; all in turn, `samples` times."""
    rates: dict[str, list[float]] = {behaviour.name: [] for behaviour in BEHAVIOURS}
    with (
        ExitStack() as stack,
        tempfile.TemporaryDirectory(prefix="vswitch-") as folder,
        running_on({cpus.generator}),
    ):
        bench = Bench(Path(folder), cpus, stack)
        for _ in range(samples):
            for behaviour in BEHAVIOURS:
                rates[behaviour.name].append(bench.measure(behaviour, seconds))
    return rates


def shares(rates: dict[str, list[float]]) -> dict[str, float]:
    """What is kept of the rate beside a guest in good order: medians over rounds."""
    return {
        name: statistics.median(
            rate / reference if reference else 0.0
            for rate, reference in zip(mine, rates[_REFERENCE], strict=True)
        )
        for name, mine in rates.items()
    }


def table(rates: dict[str, list[float]]) -> str:
    """The result as Markdown."""
    kept = shares(rates)
    lines = ["| the other guest | bystander, million frames/s | share kept |", "|---|--:|--:|"]
    for name, mine in rates.items():
        lines.append(f"| {name} | {statistics.median(mine) / 1e6:.2f} | {100 * kept[name]:.0f} % |")
    return "\n".join(lines)


@click.command()
@click.option("--samples", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.01), default=0.5, show_default=True)
@click.option("--at-least", type=float, metavar="SHARE", help="Fail if a share is below this.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the numbers there.")
def main(samples: int, seconds: float, at_least: float | None, path: Path | None) -> None:
    """Measure what a pair of guests keeps beside a third that asks too much."""
    programs.only_installed()
    try:
        with sigterm_unwinds():
            rates = run(choose_cpus(), samples, seconds)
    except VswitchError as exc:
        sys.exit(f"error: {exc.message}")
    click.echo(table(rates))
    if path is not None:
        result = {"machine": describe(), "seconds": seconds, "rates": rates, "kept": shares(rates)}
        path.write_text(json.dumps(result, indent=1) + "\n")
    if at_least is not None and min(shares(rates).values()) < at_least:
        sys.exit(f"error: a share is below {at_least:g}")


if __name__ == "__main__":
    main()
