"""A run as JSON, as Markdown tables, and as the part of docs/performance.md between markers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cases import GENERATORS
from benchmarks.errors import BenchmarkError
from benchmarks.goals import PEERS, Found, goals
from benchmarks.guests import TSO_FRAME_LEN
from benchmarks.plot import draw
from benchmarks.runner import TITLES, Results
from benchmarks.samples import (
    MAX_WAIT,
    Case,
    Kind,
    Reading,
    Sample,
    Summary,
    dropped,
    summarise,
)

FORMAT = 1
BEGIN = "<!-- results: begin -->"
END = "<!-- results: end -->"
_COSTS = ("vswitch", *PEERS)
_OTHERS: dict[Kind, tuple[str, str, float]] = {
    "flood": ("broadcast to 32 ports", "M copies/s", 1e6),
    "spread": ("unicast to 32 ports by turns", "M frames/s", 1e6),
    "tap-out": ("to the host", "k frames/s", 1e3),
    "tap-in": ("from the host", "k frames/s", 1e3),
    "idle": ("CPU of an idle switch", "% of a CPU", 1),
    "startup": ("start to first listening socket", "s", 1e9),
    "memory": ("resident memory with 2 ports", "MB", 1e6),
    "fdb": ("a lookup", "ns", 1),
}
"""What has no table of its own: a name, the unit and what it is in those of samples.UNITS."""


def to_json(results: Results) -> str:
    """One sample a line, so that runs can be compared with diff."""
    head = {
        "format": FORMAT,
        "started": results.started,
        "seconds": results.seconds,
        "machine": results.machine,
        "settings": results.settings,
        "versions": results.versions,
        "skipped": results.skipped,
        "failures": results.failures,
        "summaries": [asdict(summary) for summary in summarise(results.samples)],
    }
    lines = ",\n  ".join(json.dumps(sample.to_json()) for sample in results.samples)
    return json.dumps(head, indent=1)[:-2] + f',\n "samples": [\n  {lines}\n ]\n}}\n'


def from_json(text: str) -> Results:
    """What `to_json` wrote. BenchmarkError for anything else."""
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise BenchmarkError(f"results have format {data['format']}, not {FORMAT}")
        return Results(
            started=data["started"],
            machine=data["machine"],
            settings=data["settings"],
            versions=data["versions"],
            skipped=data["skipped"],
            failures=data["failures"],
            samples=[_sample(one) for one in data["samples"]],
            seconds=data["seconds"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"these are no results of a benchmark run: {error!r}") from error


def _sample(data: dict[str, Any]) -> Sample:
    return Sample(
        case=Case(**data["case"]),
        switch=data["switch"],
        reading=Reading(**data["reading"]),
        before_ns=data["before_ns"],
        after_ns=data["after_ns"],
        waited=data["waited"],
        counters=data.get("counters", {}),
    )


def write(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write both files of a run, named by its time; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    name = results.started.split("+")[0].replace(":", "").replace("-", "")
    as_json, as_table = folder / f"{name}.json", folder / f"{name}.md"
    as_json.write_text(to_json(results))
    as_table.write_text("# A benchmark run\n\n" + markdown(results))
    return as_json, as_table


def picture(results: Results, path: Path) -> bool:
    """Draw the rates; False where there is not enough of them."""
    return draw(summarise(results.samples), TITLES, path)


def newest(folder: Path) -> Path:
    """The last run in `folder`."""
    found = sorted(folder.glob("*.json"))
    if not found:
        raise BenchmarkError(
            f"{folder}: there are no results", hint="run `python -m benchmarks` first"
        )
    return found[-1]


def between_markers(document: str, text: str) -> str:
    """`document` with `text` in place of what lies between the markers."""
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise BenchmarkError(f"the document has no {BEGIN} ... {END}")
    return f"{head}{BEGIN}\n\n{text.strip()}\n\n{END}{tail}"


def markdown(results: Results) -> str:
    """Every table of a run, with the machine and what did not count."""
    summaries = summarise(results.samples)
    parts = [_machine(results), _counts(results)]
    if summaries:
        parts += ["### What is to be reached", _goals(summaries)]
    for name, generator in GENERATORS.items():
        of_generator = [one for one in summaries if one.case.generator == name]
        for place in ("near", "far"):
            here = [one for one in of_generator if one.place == place]
            if rates := [one for one in here if one.case.kind == "rate"]:
                title = f"### Million frames a second, {place} ({generator.title})"
                parts += [title, _rates(rates), _cycles(rates, results.machine)]
            if latencies := [one for one in here if one.case.kind in ("latency", "wakeup")]:
                title = f"### One frame in flight, {place} ({generator.title})"
                parts += [title, _latencies(latencies)]
            if segments := [one for one in here if one.case.kind == "tso"]:
                title = f"### TCP segments of {TSO_FRAME_LEN} bytes, {place} ({generator.title})"
                parts += [title, _segments(segments)]
    if others := [one for one in summaries if one.case.kind in _OTHERS]:
        parts += ["### Everything else", _others(others, results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _goals(summaries: Sequence[Summary]) -> str:
    found = Found(summaries)
    rows = []
    for goal in goals(TSO_FRAME_LEN):
        outcome = goal.judge(found)
        rows.append([goal.row, goal.wanted, outcome.text, outcome.verdict])
    lines = [("case", "to reach", "measured", "verdict"), ("---",) * 4, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _others(summaries: Sequence[Summary], results: Results) -> str:
    """What is measured once or for our own switch alone, a line each."""
    rows = []
    for one in sorted(summaries, key=lambda one: list(_OTHERS).index(one.case.kind)):
        what, unit, scale = _OTHERS[one.case.kind]
        if one.case.kind in ("tap-out", "tap-in"):
            what += f", {one.case.frame_len} B"
            what += ", beside AF_PACKET" if one.case.generator == "host-afp" else ""
        if one.case.entries:
            size = results.settings.get("fdb_bytes", {}).get(str(one.case.entries))
            what += f", {one.case.entries:,} addresses"
            what += f" in {size / (1 << 20):.1f} MiB" if size else ""
        value = f"{one.median / scale:.2f} {unit}"
        rows.append([what, TITLES[one.switch], one.place, value, str(one.count)])
    return _table(["", "", "", "median", "samples"], rows)


def _machine(results: Results) -> str:
    machine = results.machine
    kind = "virtual CPUs" if machine["virtual"] else "CPUs"
    versions = "; ".join(f"{name} {version}" for name, version in results.versions.items())
    lines = [
        f"Measured {results.started[:10]} on {machine['cpus']} {kind} of {machine['cpu']}, "
        f"Linux {machine['kernel']}, Python {machine['python']}.",
        f"Versions: {versions}" + (f"; commit {machine['commit']}." if machine["commit"] else "."),
        f"Samples of {results.settings['seconds']:g} s; the load average was "
        f"{machine['load_before']:.2f} before the run.",
    ]
    return "\n".join(lines)


def _counts(results: Results) -> str:
    total = len(results.samples)
    lines = [f"{total} samples were taken."]
    reasons = {
        "moved": "the CPUs moved between near and far",
        "disturbed": f"other programs held a CPU for more than {MAX_WAIT:.0%} of the time",
        "lossy": "frames fell out of the closed loop",
    }
    for verdict, count in dropped(results.samples).items():
        lines.append(f"{count} do not count because {reasons[verdict]}.")
    if not any(sample.verdict == "kept" for sample in results.samples):
        lines.append("So there are no numbers: measure again when nothing else runs.")
    if reason := results.machine.get("no_counters"):
        lines.append(f"Instructions and cache misses were not counted: {reason}.")
    lines += [f"Not measured: {text}." for text in results.skipped]
    lines += [f"Failed ({n} times): {text}." for text, n in Counter(results.failures).items()]
    return "\n".join(lines)


def _titles(summaries: Iterable[Summary]) -> dict[str, str]:
    present = {one.switch for one in summaries}
    return {name: title for name, title in TITLES.items() if name in present}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rates(summaries: Sequence[Summary]) -> str:
    titles = _titles(summaries)
    rows = []
    for length, ring in sorted({(one.case.frame_len, one.case.ring) for one in summaries}):
        found = {
            one.switch: one
            for one in summaries
            if (one.case.frame_len, one.case.ring) == (length, ring)
        }
        cells = [
            f"{found[name].median / 1e6:.2f} ({found[name].count})" if name in found else "-"
            for name in titles
        ]
        frame = f"{length} B, packed ring" if ring == "packed" else f"{length} B"
        rows.append([frame, *cells, _ratio(found)])
    rows.sort(key=lambda row: "packed" in row[0])
    return _table(["frame", *titles.values(), "vswitch / best peer"], rows)


def _cycles(summaries: Sequence[Summary], machine: dict[str, Any]) -> str:
    """What a frame costs each switch in cycles of its CPU, which is busy all the time."""
    plain = [one for one in summaries if one.case.ring == "split" and one.switch in _COSTS]
    lines = []
    for name, title in _titles(plain).items():
        costs = []
        for one in sorted(plain, key=lambda one: one.case.frame_len):
            if one.switch != name:
                continue
            if one.counters:
                counts = ", ".join(f"{n:.0f} {event}" for event, n in one.counters.items())
                costs.append(f"{one.case.frame_len} B {counts}")
            elif machine.get("cycle_hz"):
                costs.append(f"{one.case.frame_len} B {machine['cycle_hz'] / one.median:.0f}")
        if costs:
            lines.append(f"{title}: {'; '.join(costs)}.")
    if not lines:
        return ""
    how = "by perf" if any(one.counters for one in plain) else "of the time-stamp counter"
    return "\n".join([f"Cycles a frame ({how}), split rings:", *[f"- {line}" for line in lines]])


def _segments(summaries: Sequence[Summary]) -> str:
    titles = _titles(summaries)
    found = {one.switch: one for one in summaries}
    limit = found.get("memcpy")
    rows = []
    for name, title in titles.items():
        one = found[name]
        share = f"{one.median / limit.median:.0%}" if limit else "-"
        rate = f"{one.median * 8 * one.case.frame_len / 1e9:.1f} ({one.count})"
        rows.append([title, f"{one.median / 1e3:.1f}", rate, share])
    return _table(["", "thousand a second", "Gbit/s", "of memcpy"], rows)


def _ratio(found: dict[str, Summary]) -> str:
    peers = [one.median for name, one in found.items() if name in PEERS]
    if "vswitch" not in found or not peers:
        return "-"
    return f"{found['vswitch'].median / max(peers):.2f}"


def _latencies(summaries: Sequence[Summary]) -> str:
    titles = _titles(summaries)
    rows = []
    for name, title in titles.items():
        cells = [title]
        for kind in ("latency", "wakeup"):
            one = next(
                (one for one in summaries if one.switch == name and one.case.kind == kind), None
            )
            if one is None or one.p99 is None:
                cells += ["-", "-"]
            else:
                cells += [f"{one.median / 1e3:.2f} ({one.count})", f"{one.p99 / 1e3:.2f}"]
        rows.append(cells)
    header = ["", "median µs", "p99 µs", "after 1 ms idle: median µs", "p99 µs"]
    return _table(header, rows)
