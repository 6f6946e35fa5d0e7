"""What `vswitchctl` prints for people; imports rich, hence not needed for JSON."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vswitch.api import (
    Event,
    EventLoopInfo,
    FdbEntry,
    LongestTurn,
    PortCounters,
    PortInfo,
    PortStats,
    WorkerInfo,
)
from vswitch.cli.fitting import FittingTable

_PIPE_WIDTH = 240
_STATE_STYLES = {
    "ready": "green",
    "up": "green",
    "connected": "yellow",
    "listening": "yellow",
    "connecting": "yellow",
    "down": "red",
    "fault": "red",
}


def console() -> Console:
    """Standard output; wide where it is no terminal, so that a script gets a line per row."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(highlight=False, markup=False, width=width)


def _add(table: FittingTable, *cells: object) -> None:
    table.add(*(cell if isinstance(cell, Text) else Text(_text(cell)) for cell in cells))


def _text(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def _state(state: str) -> Text:
    return Text(state, style=_STATE_STYLES.get(state, ""))


def _size(n_bytes: int) -> str:
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n_bytes >= 1 << shift:
            return f"{n_bytes / (1 << shift):g} {unit}"
    return f"{n_bytes} B"


def ports_in_brief(ports: Sequence[dict[str, Any]]) -> RenderableType:
    """`list-ports`."""
    table = FittingTable("NAME", ">ID", "KIND", "STATE", "LINK", "MODE", "SOCKET")
    for port in ports:
        _add(
            table,
            port["name"],
            port["id"],
            port["kind"],
            _state(port["state"]),
            _state(port["link"]) if port["kind"] == "vhost-user" else None,
            port["mode"],
            port["socket"],
        )
    return table


def ports_in_full(ports: Sequence[PortInfo]) -> RenderableType:
    """`show`."""
    if not ports:
        return Text("no ports; `vswitchctl add-port NAME SOCKET` adds one")
    parts: list[RenderableType] = []
    for port in ports:
        parts += [*_port(port), Text()]
    return Group(*parts[:-1])


def _port(port: PortInfo) -> Iterable[RenderableType]:
    where = f"  {port['mode']} {port['socket']}" if port["socket"] else ""
    head = Text.assemble((port["name"], "bold"), f"  {port['kind']}  ", _state(port["state"]))
    yield head.append(where)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column()
    for key, value in _facts(port):
        facts.add_row(Text(key), value if isinstance(value, Text) else Text(value))
    yield Padding(facts, (0, 0, 0, 2), expand=False)
    if port["memory"]:
        memory = FittingTable("MEMORY GPA", ">SIZE", "UVA", ">MMAP OFFSET")
        for region in port["memory"]:
            _add(
                memory,
                f"{region['gpa']:#014x}",
                _size(region["size"]),
                f"{region['uva']:#014x}",
                f"{region['mmap_offset']:#x}",
            )
        yield Padding(memory, (0, 0, 0, 2), expand=False)
    if port["rings"]:
        rings = FittingTable(">RING", "TYPE", ">SIZE", "STATE", ">AVAIL", ">USED", "FAULT")
        for ring in port["rings"]:
            state = "started" if ring["started"] else "stopped"
            state += "" if ring["enabled"] else ", disabled"
            _add(
                rings,
                ring["index"],
                ring["type"],
                ring["size"],
                state,
                ring["avail_idx"],
                ring["used_idx"],
                Text(_text(ring["fault"]), style="red" if ring["fault"] else ""),
            )
        yield Padding(rings, (0, 0, 0, 2), expand=False)


def _facts(port: PortInfo) -> Iterable[tuple[str, str | Text]]:
    if port["error"]:
        yield "error", Text(port["error"], style="red")
    if port["warning"]:
        yield "warning", Text(port["warning"], style="yellow")
    mtu = "" if port["mtu"] is None else f", MTU {port['mtu']}"
    if port["link"] == "down":
        yield (
            "link",
            Text(f"down, nothing passes: vswitchctl set-link {port['name']} up", style="red"),
        )
    elif port["kind"] == "vhost-user":
        yield "link", "up"
    yield "queues", f"{port['queues']}{mtu}"
    yield "addresses", f"{port['macs']} learned, {port['max_macs']} at most"
    storm = [f"{kind} {n}/s" for kind, n in port["storm"].items() if kind != "burst" and n]
    if storm:
        burst = port["storm"]["burst"]
        yield "storm control", ", ".join(storm) + (f", {burst} at once" if burst else "")
    if port["kind"] != "vhost-user":
        return
    connects = f"{port['connects']} connection{'s' * (port['connects'] != 1)}"
    if port["connected_since"] is not None:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(port["connected_since"]))
        peer = "" if port["peer_pid"] is None else f"pid {port['peer_pid']} "
        connects = f"{peer}since {since}, {connects} so far"
    yield "frontend", connects
    if port.get("withheld"):
        named = f" (frontend {port['frontend']})" if port.get("frontend") else ""
        yield "not offered", " ".join(port["withheld"]) + named
    yield "features", f"{port['features']:#x} {' '.join(port['feature_names'])}".rstrip()
    names = " ".join(port["protocol_feature_names"])
    yield "protocol features", f"{port['protocol_features']:#x} {names}".rstrip()


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


def counters(stats: Sequence[PortStats]) -> RenderableType:
    """`stats`: ingress is from the guest into the switch."""
    titles = [*map(_title, _TRAFFIC), ">DROPS", *map(_title, _OTHERS)]
    table = FittingTable("NAME", *titles, "DROPPED FOR")
    for each in stats:
        numbers: dict[str, Any] = {**each}
        _add(
            table,
            each["name"],
            *(numbers[key] for key in _TRAFFIC),
            sum(each["drops"].values()),
            *(numbers[key] for key in _OTHERS),
            _drops(each["drops"]),
        )
    return table


def rates(
    before: Sequence[PortStats], now: Sequence[PortStats], interval_s: float
) -> RenderableType:
    """`stats --watch`: what happened between two looks, per second."""
    others = [key for key in _OTHERS if key not in _SELDOM]
    traffic_titles = [_title(key, rate=True) for key in _TRAFFIC]
    other_titles = [_title(key, rate=True) for key in others]
    table = FittingTable("NAME", *traffic_titles, ">DROPS/S", *other_titles, "DROPPED FOR")
    # By id: a port that was deleted and added again under its name starts anew.
    earlier = {each["id"]: each for each in before}
    for each in now:
        old = earlier.get(each["id"])

        def rate(key: str, now: Any = each, before: Any = old) -> str:
            grown = max(now[key] - (before[key] if before else 0), 0)
            return _scaled((8 if key.endswith("_bytes") else 1) * grown / interval_s)

        drops = {
            reason: n - (old["drops"].get(reason, 0) if old else 0)
            for reason, n in each["drops"].items()
        }
        drops = {reason: n for reason, n in drops.items() if n > 0}
        _add(
            table,
            each["name"],
            *map(rate, _TRAFFIC),
            _scaled(sum(drops.values()) / interval_s),
            *map(rate, others),
            _drops(drops),
        )
    return table


def _scaled(value: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f}{unit}"
    return f"{value:.0f}"


def fdb(entries: Sequence[FdbEntry]) -> RenderableType:
    """`fdb show`."""
    table = FittingTable("MAC", ">VLAN", "PORT", "TYPE", ">AGE")
    for entry in sorted(entries, key=lambda each: (each["port"], each["vlan"], each["mac"])):
        static = entry["static"]
        _add(
            table,
            entry["mac"],
            entry["vlan"],
            entry["port"],
            "static" if static else "learned",
            None if static else f"{entry['age_s']} s",
        )
    return table


def workers(workers: Sequence[WorkerInfo], event_loop: EventLoopInfo) -> RenderableType:
    """`worker show`."""
    table = FittingTable(
        ">ID",
        ">CPU",
        "STATE",
        ">RINGS",
        ">BUSY",
        ">IDLE",
        ">FRAMES",
        ">FRAMES/BURST",
        ">CYCLES/FRAME",
        ">LOOPS",
        ">SLEEPS",
        ">WAKEUPS",
        ">EVENTS LOST",
        "NOTIFIES BY",
    )
    for each in workers:
        total_ns = each["busy_ns"] + each["idle_ns"]
        _add(
            table,
            each["id"],
            "any" if each["cpu"] is None else each["cpu"],
            each["state"],
            each["rings"],
            f"{100 * each['busy_ns'] / total_ns:.1f} %" if total_ns else None,
            f"{100 * each['idle_ns'] / total_ns:.1f} %" if total_ns else None,
            each["frames"],
            f"{each['frames'] / each['bursts']:.1f}" if each["bursts"] else None,
            None if each["cycles_per_frame"] is None else f"{each['cycles_per_frame']:.0f}",
            each["loops"],
            each["sleeps"],
            each["wakeups"],
            each["events_lost"],
            each["notify"],
        )
    queues = FittingTable(">WORKER", "PORT", ">RING", ">FRAMES", ">FRAMES/S", "PINNED")
    for each in workers:
        for queue in each["queues"]:
            _add(
                queues,
                each["id"],
                queue["port"],
                queue["index"],
                queue["frames"],
                queue["frames_per_s"],
                "pinned" if queue["pinned"] else "",
            )
    parts: list[RenderableType] = [table, "", _turns(workers, event_loop)]
    return Group(*parts, "", queues) if queues.row_count else Group(*parts)


def _turns(workers: Sequence[WorkerInfo], event_loop: EventLoopInfo) -> RenderableType:
    """The longest turn of each loop, and of that the time in which it was not run."""
    table = FittingTable("LONGEST TURN OF", ">LAST 10 S", ">LAST MINUTE", ">SINCE START")
    loops = [("event loop", event_loop["turns"])]
    loops += [(f"worker {each['id']}", each["turns"]) for each in workers]
    for name, turns in loops:
        windows = (
            (None, None, None)
            if turns is None
            else (turns["last_10_s"], turns["last_minute"], turns["since_start"])
        )
        _add(table, name, *(None if each is None else _turn(each) for each in windows))
    return table


def _turn(longest: LongestTurn) -> str:
    text = f"{longest['longest_ns'] / 1e6:.2f} ms"
    delay_ns = longest["run_delay_ns"]
    if delay_ns:
        text += f" ({delay_ns / 1e6:.2f} not run)"
    return text


def event_line(event: Event) -> str:
    """`events`: a line each, the details as `key=value`."""
    moment = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    millis = int(event["time"] * 1000) % 1000
    details = [
        f"{key}={value if str(value).isprintable() else repr(value)}"
        for key, value in event.items()
        if key not in ("event", "time", "port") and value is not None
    ]
    port = event["port"] or "-"
    return " ".join([f"{moment}.{millis:03}", f"{event['event']:<17}", port, *details])
