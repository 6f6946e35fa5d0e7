"""What `vswitchctl` prints for people."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from vswitch.cli.layout import Facts, Indented, Layout, Line, Styled, Table
from vswitch.config.kind_names import UPLINK_KINDS

if TYPE_CHECKING:
    from vswitch.api import (
        Event,
        EventLoopInfo,
        FdbEntry,
        LinkInfo,
        LongestTurn,
        NetworkInfo,
        PortInfo,
        WorkerInfo,
    )

_STATE_STYLES = {
    "ready": "green",
    "up": "green",
    "connected": "yellow",
    "listening": "yellow",
    "connecting": "yellow",
    "down": "red",
    "fault": "red",
}


def _state(state: str) -> Styled:
    return Styled(state, _STATE_STYLES.get(state, ""))


def _size(n_bytes: int) -> str:
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n_bytes >= 1 << shift:
            return f"{n_bytes / (1 << shift):g} {unit}"
    return f"{n_bytes} B"


def ports_in_brief(ports: Sequence[dict[str, Any]]) -> list[Layout]:
    """`list-ports`."""
    table = Table("NAME", ">ID", "KIND", "STATE", "LINK", "NETWORK", "PEER", "MODE", "SOCKET")
    for port in ports:
        table.add(
            port["name"],
            port["id"],
            port["kind"],
            _state(port["state"]),
            None if port["kind"] in UPLINK_KINDS else _state(port["link"]),
            port["network"],
            port["peer"],
            port["mode"],
            port["socket"],
        )
    return [table]


def ports_in_full(ports: Sequence[PortInfo]) -> list[Layout]:
    """`show`."""
    if not ports:
        return [Line("no ports; `vswitchctl add-port NAME SOCKET` adds one")]
    parts: list[Layout] = []
    for port in ports:
        parts += [*_port(port), Line()]
    return parts[:-1]


def _port(port: PortInfo) -> Iterator[Layout]:
    where = f"  {port['mode']} {port['socket']}" if port["socket"] else ""
    name = Styled(port["name"], "bold")
    yield Line(name, f"  {port['kind']}  ", _state(port["state"]), where)
    yield Indented(Facts(_facts(port)))
    if port["memory"]:
        memory = Table("MEMORY GPA", ">SIZE", "UVA", ">MMAP OFFSET")
        for region in port["memory"]:
            memory.add(
                f"{region['gpa']:#014x}",
                _size(region["size"]),
                f"{region['uva']:#014x}",
                f"{region['mmap_offset']:#x}",
            )
        yield Indented(memory)
    if port["rings"]:
        rings = Table(">RING", "TYPE", ">SIZE", "STATE", ">AVAIL", ">USED", "FAULT")
        for ring in port["rings"]:
            state = "started" if ring["started"] else "stopped"
            state += "" if ring["enabled"] else ", disabled"
            rings.add(
                ring["index"],
                ring["type"],
                ring["size"],
                state,
                ring["avail_idx"],
                ring["used_idx"],
                Styled(ring["fault"], "red") if ring["fault"] else None,
            )
        yield Indented(rings)


def _facts(port: PortInfo) -> Iterator[tuple[str, object]]:
    if port["error"]:
        yield "error", Styled(port["error"], "red")
    if port["warning"]:
        yield "warning", Styled(port["warning"], "yellow")
    mtu = "" if port["mtu"] is None else f", MTU {port['mtu']}"
    if port["link"] == "down":
        yield (
            "link",
            Styled(f"down, nothing passes: vswitchctl set-link {port['name']} up", "red"),
        )
    elif port["kind"] not in UPLINK_KINDS:
        yield "link", "up"
    yield "queues", f"{port['queues']}{mtu}"
    if port["network"] is None:
        yield "cable", f"to {port['peer']}" if port["peer"] else "to nobody: that port is missing"
    else:
        yield "network", port["network"]
        yield "addresses", f"{port['macs']} learned, {port['max_macs']} at most"
    storm = [f"{kind} {n}/s" for kind, n in port["storm"].items() if kind != "burst" and n]
    if storm:
        burst = port["storm"]["burst"]
        yield "storm control", ", ".join(storm) + (f", {burst} at once" if burst else "")
    for name, value in port["limits"].items():
        if value is not None and name != "max_macs" and not name.startswith("storm_"):
            yield name.replace("_", " "), str(value)
    if port["kind"] in UPLINK_KINDS:
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


def networks(networks: Sequence[NetworkInfo]) -> list[Layout]:
    """`network list`."""
    table = Table("NAME", ">PORTS", ">ADDRESSES", ">AT MOST", ">AGING", "LEARNING")
    for each in networks:
        table.add(
            each["name"],
            len(each["ports"]),
            each["macs"],
            each["fdb_size"],
            _aging(each),
            "learning" if each["learning"] else "hub",
        )
    return [table]


def network(network: NetworkInfo) -> list[Layout]:
    """`network show`."""
    facts = (
        ("learning", "yes" if network["learning"] else "no, it is a hub"),
        ("addresses", f"{network['macs']} known, {network['fdb_size']} at most"),
        ("aging", _aging(network)),
        ("ports", " ".join(network["ports"]) or "none"),
    )
    return [Line(Styled(network["name"], "bold")), Indented(Facts(facts))]


def _aging(network: NetworkInfo) -> str:
    return f"{network['mac_aging_s']} s" if network["mac_aging_s"] else "never"


def links(links: Sequence[LinkInfo]) -> list[Layout]:
    """`link list`."""
    table = Table("NAME", "PORT", "OTHER")
    for each in links:
        table.add(each["name"], *each["ports"])
    return [table]


def fdb(entries: Sequence[FdbEntry]) -> list[Layout]:
    """`fdb show`."""
    table = Table("MAC", ">VLAN", "NETWORK", "PORT", "TYPE", ">AGE")
    for entry in sorted(entries, key=itemgetter("network", "port", "vlan", "mac")):
        static = entry["static"]
        table.add(
            entry["mac"],
            entry["vlan"],
            entry["network"],
            entry["port"],
            "static" if static else "learned",
            None if static else f"{entry['age_s']} s",
        )
    return [table]


def workers(workers: Sequence[WorkerInfo], event_loop: EventLoopInfo) -> list[Layout]:
    """`worker show`."""
    table = Table(
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
        table.add(
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
    queues = Table(">WORKER", "PORT", ">RING", ">FRAMES", ">FRAMES/S", "PINNED")
    for each in workers:
        for queue in each["queues"]:
            queues.add(
                each["id"],
                queue["port"],
                queue["index"],
                queue["frames"],
                queue["frames_per_s"],
                "pinned" if queue["pinned"] else "",
            )
    parts: list[Layout] = [table, Line(), _turns(workers, event_loop)]
    return [*parts, Line(), queues] if queues.row_count else parts


def _turns(workers: Sequence[WorkerInfo], event_loop: EventLoopInfo) -> Table:
    """The longest turn of each loop, and of that the time in which it was not run."""
    table = Table("LONGEST TURN OF", ">LAST 10 S", ">LAST MINUTE", ">SINCE START")
    loops = [("event loop", event_loop["turns"])]
    loops += [(f"worker {each['id']}", each["turns"]) for each in workers]
    for name, turns in loops:
        windows = (
            (None, None, None)
            if turns is None
            else (turns["last_10_s"], turns["last_minute"], turns["since_start"])
        )
        table.add(name, *(None if each is None else _turn(each) for each in windows))
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
