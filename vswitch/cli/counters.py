"""`vswitchctl stats`: a column for each of `PortCounters`, counted so far or in a second."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from vswitch.api import PortCounters, PortStats
from vswitch.cli import layout
from vswitch.cli.common import to_json
from vswitch.cli.layout import Layout, Table
from vswitch.cli.state import State, command, complete_ports, pass_state

if TYPE_CHECKING:
    from vswitch.control.client import Client

_COUNTERS = tuple(PortCounters.__annotations__)
_TRAFFIC = tuple(key for key in _COUNTERS if key.startswith(("ingress_", "egress_")))
_OTHERS = tuple(key for key in _COUNTERS if key not in _TRAFFIC)
_SELDOM = ("stalls", "macs_refused")
"""Counters that are not worth a column of what happens in a second."""


def _title(counter: str, *, rate: bool = False) -> str:
    """The head of a counter's column: its name, but shorter."""
    words = counter.split("_")
    words = [{"ingress": "in", "egress": "out"}.get(word, word) for word in words]
    text = " ".join(words).upper()
    return f">{text.replace('BYTES', 'BIT')}/S" if rate else f">{text}"


def _drops(drops: dict[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in sorted(drops.items()))


def counters(stats: Sequence[PortStats]) -> list[Layout]:
    """`stats`: ingress is from the guest into the switch."""
    titles = [*map(_title, _TRAFFIC), ">DROPS", *map(_title, _OTHERS)]
    table = Table("NAME", *titles, "DROPPED FOR")
    for each in stats:
        numbers: dict[str, Any] = {**each}  # an older switch may not have all of them
        table.add(
            each["name"],
            *(numbers.get(key) for key in _TRAFFIC),
            sum(each["drops"].values()),
            *(numbers.get(key) for key in _OTHERS),
            _drops(each["drops"]),
        )
    return [table]


def rates(before: Sequence[PortStats], now: Sequence[PortStats], interval_s: float) -> list[Layout]:
    """`stats --watch`: what happened between two looks, per second."""
    others = [key for key in _OTHERS if key not in _SELDOM]
    traffic_titles = [_title(key, rate=True) for key in _TRAFFIC]
    other_titles = [_title(key, rate=True) for key in others]
    table = Table("NAME", *traffic_titles, ">DROPS/S", *other_titles, "DROPPED FOR")
    # By id: a port that was deleted and added again under its name starts anew.
    earlier = {each["id"]: each for each in before}
    for each in now:
        old = earlier.get(each["id"])

        def rate(key: str, now: Any = each, before: Any = old) -> str:
            grown = max(now.get(key, 0) - (before.get(key, 0) if before else 0), 0)
            return _scaled((8 if key.endswith("_bytes") else 1) * grown / interval_s)

        drops = {
            reason: n - (old["drops"].get(reason, 0) if old else 0)
            for reason, n in each["drops"].items()
        }
        drops = {reason: n for reason, n in drops.items() if n > 0}
        table.add(
            each["name"],
            *map(rate, _TRAFFIC),
            _scaled(sum(drops.values()) / interval_s),
            *map(rate, others),
            _drops(drops),
        )
    return [table]


def _scaled(value: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f}{unit}"
    return f"{value:.0f}"


@command()
@click.argument("name", required=False, shell_complete=complete_ports)
@click.option("-w", "--watch", is_flag=True, help="Show rates, again and again.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks with --watch.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End --watch after N times.")
@pass_state
def stats(state: State, name: str | None, watch: bool, interval: float, count: int | None) -> None:
    """Show the counters of ports: frames, bytes, drops by reason, notifications."""
    if not watch:
        with state.connect() as switch:
            state.show(switch.stats(name), counters)
        return
    with state.connect() as switch:
        try:
            _watch(state, switch, name, interval, count)
        except KeyboardInterrupt:
            return  # the usual way to end it


def _watch(
    state: State, switch: Client, name: str | None, interval: float, count: int | None
) -> None:
    """Print counters `count` times; each is a line of JSON, or a table of rates."""
    in_place = sys.stdout.isatty() and not state.json
    shown = 0
    before, before_s = switch.stats(name), time.monotonic()
    for _ in itertools.count() if count is None else range(count):
        time.sleep(interval)
        now, now_s = switch.stats(name), time.monotonic()
        if state.json:
            click.echo(to_json(now))
        else:
            table = rates(before, now, now_s - before_s)
            if in_place:
                shown = layout.show_again(table, shown)
            else:
                layout.show(table)
        sys.stdout.flush()
        before, before_s = now, now_s
