"""`python -m benchmarks.fairness`: what a pair of guests keeps beside a third that asks too much.

All guests are on one worker. The bystander sends to its peer as fast as it can; beside it another
guest does so, in good order or not. What counts is what the peer got of the bystander's frames,
against the same beside a guest in good order, which is entitled to a turn for each of the
bystander's.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.guests import ethernet
from benchmarks.machine import Cpus, choose_cpus, describe, running_on
from vswitch.control.client import Client
from vswitch.errors import VswitchError
from vswitch.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.guest.load import Flow, Load
from vswitch.guest.packets import BROADCAST
from vswitch.lab import programs
from vswitch.lab.process import sigterm_unwinds
from vswitch.lab.switch_process import SwitchProcess
from vswitch.vhost_user.protocol import Feature

PORTS = 16
BYSTANDER, PEER, OTHER, OTHERS_PEER = range(4)
"""Positions among the guests; those after them only receive."""
BYSTANDER_LEN = 300
OTHER_LEN = 64
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


def _to_peer(guests: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(guests[OTHERS_PEER].mac, guests[OTHER].mac, OTHER_LEN)]


def _broadcast(guests: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(BROADCAST, guests[OTHER].mac, OTHER_LEN)]


def _made_up(guests: list[SoftwareGuest]) -> list[bytes]:
    return [
        ethernet(guests[OTHERS_PEER].mac, bytes((2, 0)) + n.to_bytes(4, "big"), OTHER_LEN)
        for n in range(MADE_UP)
    ]


BEHAVIOURS = (
    Behaviour("alone"),
    Behaviour(_REFERENCE, _to_peer),
    Behaviour("peer posts no buffers", _to_peer, receives=False),
    Behaviour("peer takes no notifications", _to_peer, notified=True),
    Behaviour(f"broadcasts to {PORTS - 1} ports", _broadcast),
    Behaviour("cycles through source MACs", _made_up),
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
            # Without EVENT_IDX, so that flags alone say whether it wants notifications.
            guest = SoftwareGuest(
                f"52:54:00:00:00:{n + 1:02x}",
                queue_size=_QUEUE_SIZE,
                features=DEFAULT_FEATURES & ~Feature.RING_EVENT_IDX,
                indirect=False,
                polling=True,
            )
            stack.enter_context(guest).connect(socket)
            guest.send([ethernet(BROADCAST, guest.mac, OTHER_LEN)])
            guest.drain()
            self.guests.append(guest)

    def measure(self, behaviour: Behaviour, seconds: float) -> float:
        """Frames a second that the bystander's peer got from it."""
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
            flows.append(Flow(guests[OTHER].transmitqs[0], None, frames, rewrite=len(frames) > 1))
        first = OTHERS_PEER if behaviour.receives else OTHERS_PEER + 1
        flows += [
            Flow(None, guest.receiveqs[0], [ethernet(BROADCAST, BROADCAST, OTHER_LEN)])
            for guest in (sender, guests[OTHER], *guests[first:])
        ]
        load = Load(flows)
        with _notified(guests[OTHERS_PEER]) if behaviour.notified else contextlib.nullcontext():
            load.run(seconds * _WARM_UP, settle_s=1.0)
            before = self._delivered()
            load.run(seconds, settle_s=1.0)
            return (self._delivered() - before) / seconds

    def _delivered(self) -> int:
        """How many of the bystander's frames its peer has got so far."""
        stats = self._client.stats(str(PEER))[0]
        rest = stats["egress_bytes"] - OTHER_LEN * stats["egress_frames"]
        return rest // (BYSTANDER_LEN - OTHER_LEN)


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
    sigterm_unwinds()
    try:
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
