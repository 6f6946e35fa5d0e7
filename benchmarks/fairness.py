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
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from benchmarks.guests import ethernet
from benchmarks.hostile import (
    BEHAVIOURS,
    BYSTANDER,
    OTHER,
    OTHER_LEN,
    OTHERS_PEER,
    PEER,
    PORTS,
    REFERENCE,
    Behaviour,
    unread_tap,
)
from benchmarks.machine import Cpus, choose_cpus, describe, running_on
from vswitch.control.client import Client
from vswitch.errors import VswitchError
from vswitch.lab import programs
from vswitch.lab.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.lab.guest.options import by_subject
from vswitch.lab.guest.packets import BROADCAST
from vswitch.lab.load.load import Flow, Load
from vswitch.lab.qemu.process import sigterm_unwinds
from vswitch.lab.qemu.switch_process import SwitchProcess
from vswitch.vhost_user.protocol import Feature

BYSTANDER_LEN = 300
"""Bytes of a frame, as no other guest's: frames and bytes at a port tell whose they were."""
_QUEUE_SIZE = 256
_WARM_UP = 0.2


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
        wanted = {n: behaviour.crowd for n in range(PORTS) if n != PEER}
        wanted[OTHER] = wanted[OTHER] | behaviour.guest
        wanted[OTHERS_PEER] = wanted[OTHERS_PEER] | behaviour.peer
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

    def without_tap(self) -> str | None:
        """Why there can be no TAP, if there cannot: whoever is not root has none."""
        try:
            with unread_tap(self._client, self.guests):
                return None
        except (VswitchError, PermissionError) as exc:
            return str(exc)

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
        receivers = [
            Flow(None, guest.receiveqs[0], [ethernet(BROADCAST, BROADCAST, OTHER_LEN)])
            for guest in (sender, guests[OTHER], *guests[first:])
        ]
        if behaviour.slice_s:
            loads, slice_s = [Load(flows), Load(receivers)], behaviour.slice_s
        else:
            loads, slice_s = [Load(flows + receivers)], seconds
        with behaviour.meanwhile(self._client, guests):
            self._run(loads, seconds * _WARM_UP, slice_s)
            other_len = len(frames[0]) if frames else OTHER_LEN
            before = self._delivered(other_len)
            self._run(loads, seconds, slice_s)
            return (self._delivered(other_len) - before) / seconds

    @staticmethod
    def _run(loads: list[Load], seconds: float, slice_s: float) -> None:
        """Have the first send, in slices, and those after it receive in between."""
        while seconds > 0:
            loads[0].run(min(seconds, slice_s), settle_s=1.0)
            for load in loads[1:]:
                load.run(0.0, settle_s=1.0, quiet_s=0.001)
            seconds -= slice_s

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
    guest = SoftwareGuest(f"52:54:00:00:00:{n + 1:02x}", **by_subject(**common | options))
    guest.connect(socket)
    guest.send([ethernet(BROADCAST, guest.mac, OTHER_LEN)])
    guest.drain()
    return guest


def run(cpus: Cpus, samples: int, seconds: float) -> dict[str, list[float]]:
    """Frames a second of the bystander, by behaviour; all in turn, `samples` times.

    Tells on stderr what cannot be had here.
    """
    rates: dict[str, list[float]] = {}
    with (
        ExitStack() as stack,
        tempfile.TemporaryDirectory(prefix="vswitch-") as folder,
        running_on({cpus.generator}),
    ):
        bench = Bench(Path(folder), cpus, stack)
        behaviours = list(BEHAVIOURS)
        if why := bench.without_tap():
            behaviours = [one for one in BEHAVIOURS if one.meanwhile is not unread_tap]
            click.echo(f"left out what takes a TAP: {why}", err=True)
        for _ in range(samples):
            for behaviour in behaviours:
                rates.setdefault(behaviour.name, []).append(bench.measure(behaviour, seconds))
    return rates


def shares(rates: dict[str, list[float]]) -> dict[str, float]:
    """What is kept of the rate beside a guest in good order: medians over rounds."""
    return {
        name: statistics.median(
            rate / reference if reference else 0.0
            for rate, reference in zip(mine, rates[REFERENCE], strict=True)
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
