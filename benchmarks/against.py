"""Two revisions of vswitch side by side: is the newer one as fast as the older?

They take turns, so that whatever the machine does besides does it to both. What counts is the
ratio within a pair, two samples that were taken one after the other in one class, and over the
pairs the median with an interval that needs nothing to be known of how the ratios are distributed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from benchmarks.revisions import Build
from benchmarks.runner import Progress, Results, Runner, Settings
from benchmarks.samples import PLACES, Case, Place, Sample
from benchmarks.switches import Switch, Vswitch

OLD, NEW = "old", "new"
PAIRS = 15
"""Pairs of one class that are wanted for a verdict."""
CONFIDENCE = 0.95
COSTS_NOTHING = 0.98
"""The interval of the ratio new to old has to lie above this."""
FEWEST_PAIRS = 6
"""Of fewer pairs not even the smallest and largest ratio enclose the median by CONFIDENCE."""


class Turn(NamedTuple):
    """Two samples of one case, taken one after the other in one class."""

    old: Sample
    new: Sample

    @property
    def ratio(self) -> float:
        """How much of the old one's rate the new one has."""
        return self.new.reading.value / self.old.reading.value


@dataclass(frozen=True, slots=True)
class Comparison:
    """One case in one class. `low` and `high` are None where there are too few pairs.

    `old` and `new` are medians in frames a second.
    """

    case: Case
    place: Place
    pairs: int
    old: float
    new: float
    ratio: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return "too few pairs"
        if self.low > COSTS_NOTHING:
            return "costs nothing"
        return "slower" if self.high < COSTS_NOTHING else "not shown"


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """An interval that has the median in it with at least this confidence, or None.

    From ranks alone: how many of n values lie below the median is binomial with p = 1/2
    (Conover, Practical Nonparametric Statistics, 3.2).
    """
    n = len(values)
    outside, left = 0.0, 0
    # As many values may be left out at each end as the two tails together have room for.
    for k in range(n // 2):
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 1 - confidence:
            break
        left = k + 1
    if left == 0:
        return None
    ordered = sorted(values)
    return ordered[left - 1], ordered[n - left]


def pairs_of(samples: Iterable[Sample], case: Case) -> Iterator[Turn]:
    """The pairs of a case, each sample in one at the most."""
    ours = [one for one in samples if one.case == case]
    taken = -1
    for at, (first, second) in enumerate(pairwise(ours)):
        if at == taken or {first.switch, second.switch} != {OLD, NEW}:
            continue
        taken = at + 1
        counts = first.verdict == second.verdict == "kept" and first.place == second.place
        if counts and first.reading.value and second.reading.value:
            yield Turn(first, second) if first.switch == OLD else Turn(second, first)


def compare(samples: Sequence[Sample]) -> list[Comparison]:
    """Each case and class that has a pair, in the order of their first samples."""
    found = []
    for case in dict.fromkeys(one.case for one in samples):
        pairs = list(pairs_of(samples, case))
        for place in PLACES:
            here = [pair for pair in pairs if pair.old.place == place]
            if not here:
                continue
            ratios = [pair.ratio for pair in here]
            low, high = interval(ratios) or (None, None)
            found.append(
                Comparison(
                    case=case,
                    place=place,
                    pairs=len(here),
                    old=statistics.median(pair.old.reading.value for pair in here),
                    new=statistics.median(pair.new.reading.value for pair in here),
                    ratio=statistics.median(ratios),
                    low=low,
                    high=high,
                )
            )
    return found


class AgainstRunner(Runner):
    """Runs both builds by turns until one class of each case has `settings.samples` pairs."""

    def __init__(self, old: Build, new: Build, settings: Settings, progress: Progress) -> None:
        switches = {OLD: _switch(OLD, old), NEW: _switch(NEW, new)}
        super().__init__(settings, progress, switches=switches)
        self.results.machine["commit"] = new.revision.commit
        self.results.settings |= {"old": old.revision.title, "new": new.revision.title}

    def _enough(self, case: Case, names: Collection[str] | None = None) -> bool:
        if names is not None and len(names) < 2:
            return True  # one of them failed too often, and alone the other says nothing
        pairs = [pair.old.place for pair in pairs_of(self.results.samples, case)]
        wanted = self.settings.samples
        if self.settings.places:
            return all(pairs.count(place) >= wanted for place in self.settings.places)
        return any(pairs.count(place) >= wanted for place in PLACES)


def _switch(name: str, build: Build) -> type[Switch]:
    """vswitch as that build has it, under the name of its side."""
    return type(
        f"{name.title()}Vswitch",
        (Vswitch,),
        {
            "name": name,
            "title": build.revision.title,
            "program": (str(build.program),),
            "host_interface": f"vsb-{name}",  # both are up at once
        },
    )


def markdown(results: Results) -> str:
    """What was compared, as a table with one row a case and class."""
    settings = results.settings
    lines = [f"old: {settings['old']}, new: {settings['new']}", ""]
    lines += ["| case | class | pairs | old, M/s | new, M/s | ratio | 95 % interval | |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in compare(results.samples):
        known = row.low is not None and row.high is not None
        bounds = f"{row.low:.3f} to {row.high:.3f}" if known else "-"
        lines.append(
            f"| {row.case} | {row.place} | {row.pairs} | {row.old / 1e6:.2f} | "
            f"{row.new / 1e6:.2f} | {row.ratio:.3f} | {bounds} | {row.verdict} |"
        )
    return "\n".join(lines) + "\n"


def write(results: Results, folder: Path) -> Path:
    """Write rows and samples as JSON; returns the file.

    Into a folder of their own: they are no results that docs/performance.md could show.
    """
    path = folder / "against" / f"{results.started.replace(':', '')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(row), "verdict": row.verdict} for row in compare(results.samples)]
    data = {**asdict(results), "rows": rows}
    data["samples"] = [one.to_json() for one in results.samples]
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path
