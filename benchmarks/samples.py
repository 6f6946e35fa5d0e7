"""Samples, what makes one count, and the medians over those that do."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

NEAR_BELOW_NS = 200.0
"""Core-to-core round trips under this are called near: the CPUs share a cache."""
MAX_WAIT = 0.03
"""Share of a sample that its threads may have waited for their CPU because of other programs."""

Kind = Literal[
    "rate",
    "latency",
    "wakeup",
    "tso",
    "flood",
    "spread",
    "idle",
    "memory",
    "startup",
    "fdb",
    "tap-out",
    "tap-in",
]
RingFormat = Literal["split", "packed"]
Place = Literal["near", "far"]
PLACES: tuple[Place, ...] = get_args(Place)
Verdict = Literal["kept", "moved", "disturbed", "lossy"]

LONGEST_FRAME_LEN = 9000
"""Longest frame in bytes that is no segment to be cut."""

UNITS: dict[Kind, str] = {
    "rate": "frames/s",
    "latency": "ns",
    "wakeup": "ns",
    "tso": "frames/s",
    "flood": "copies/s",
    "spread": "frames/s",
    "idle": "% of a CPU",
    "memory": "bytes",
    "startup": "ns",
    "fdb": "ns",
    "tap-out": "frames/s",
    "tap-in": "frames/s",
}


def place_of(round_trip_ns: float) -> Place:
    return "near" if round_trip_ns < NEAR_BELOW_NS else "far"


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: `kind`, by which generator, with frames of `frame_len` bytes.

    "rate" is frames a second in a closed loop. "latency" is the time of one frame in flight, from
    before it is sent until it has arrived; "wakeup" is the same after a pause. "tso" is the rate of
    frames that nobody segments on the way, each of them written anew by the sender. "flood" is
    copies of broadcasts to FLOOD_PORTS other ports, "spread" unicast frames to them by turns.

    "tap-out" is frames a second from a guest to the host, "tap-in" the other way.

    "idle" is the CPU time of a switch whose guests send nothing, "memory" its resident memory with
    two ports, "startup" the time until a socket listens. "fdb" is a lookup among `entries`
    addresses.
    """

    kind: Kind
    generator: str
    frame_len: int
    ring: RingFormat = "split"
    entries: int = 0

    @property
    def whole(self) -> bool:
        """Whether frames are TCP segments that nobody is to cut."""
        return self.frame_len > LONGEST_FRAME_LEN

    def __str__(self) -> str:
        ring = " in packed rings" if self.ring == "packed" else ""
        entries = f" among {self.entries} addresses" if self.entries else ""
        return f"{self.kind} of {self.frame_len} B{ring}{entries} by {self.generator}"


@dataclass(frozen=True, slots=True)
class Setup:
    """What switch and generator are started for.

    `longest` is the length of the longest frame in bytes. With `tso` there are frames that are not
    to be segmented. `ring` is the format of the rings where a generator fixes it at its start.
    `ports` is the number of ports with a guest that takes part. `uplink`: the switch has a port to
    the host, Switch.host_interface.
    """

    longest: int
    tso: bool = False
    ring: RingFormat = "split"
    ports: int = 2
    uplink: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """What a generator found in one sample. `value` is in UNITS; latencies have a p99 too.

    `lost` counts frames that fell out of the closed loop.
    """

    value: float
    p99: float | None = None
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading, and what the machine was like around it.

    `before_ns`, `after_ns`: core-to-core round trips. `waited`: the largest share of the sample
    that one of the polling threads spent runnable without running. `counters`: what the switch did
    for each frame, of benchmarks.counters.EVENTS, where the machine counts it.
    """

    case: Case
    switch: str
    reading: Reading
    before_ns: float
    after_ns: float
    waited: float
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def place(self) -> Place | None:
        """Near or far; None if it changed during the sample."""
        before, after = place_of(self.before_ns), place_of(self.after_ns)
        return before if before == after else None

    @property
    def verdict(self) -> Verdict:
        """Whether the sample counts, or why not."""
        if self.place is None:
            return "moved"
        if self.waited > MAX_WAIT:
            return "disturbed"
        if self.reading.lost:
            return "lossy"
        return "kept"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "place": self.place, "verdict": self.verdict}


def enough(
    samples: Iterable[Sample],
    case: Case,
    wanted: int,
    places: Collection[Place] = (),
    names: Collection[str] | None = None,
) -> bool:
    """Whether these switches (None: those with any sample) have so many that count of a case.

    That is in each of `places`, or in any one where there are none.
    """
    ours = [one for one in samples if one.case == case]
    kept = Counter((one.switch, one.place) for one in ours if one.verdict == "kept")
    if names is None:
        names = {one.switch for one in ours}
        if not names:
            return False

    def complete(place: Place) -> bool:
        return all(kept[name, place] >= wanted for name in names)

    return all(map(complete, places)) if places else any(map(complete, PLACES))


@dataclass(frozen=True, slots=True)
class Summary:
    """One switch in one case and one place: median and spread of the samples that count."""

    case: Case
    switch: str
    place: Place
    count: int
    median: float
    low: float
    high: float
    p99: float | None
    round_trip_ns: float
    counters: dict[str, float] = field(default_factory=dict)


def summarise(samples: Iterable[Sample]) -> list[Summary]:
    """A Summary for each case, place and switch that has samples, in the order they appeared."""
    groups: dict[tuple[Case, Place, str], list[Sample]] = {}
    for sample in samples:
        if sample.verdict == "kept" and sample.place is not None:
            groups.setdefault((sample.case, sample.place, sample.switch), []).append(sample)
    return [_summary(*key, group) for key, group in groups.items()]


def _summary(case: Case, place: Place, switch: str, group: Sequence[Sample]) -> Summary:
    values = [sample.reading.value for sample in group]
    p99s = [sample.reading.p99 for sample in group if sample.reading.p99 is not None]
    return Summary(
        case=case,
        switch=switch,
        place=place,
        count=len(values),
        median=statistics.median(values),
        low=min(values),
        high=max(values),
        p99=statistics.median(p99s) if p99s else None,
        round_trip_ns=statistics.median((s.before_ns + s.after_ns) / 2 for s in group),
        counters={
            event: statistics.median(s.counters[event] for s in group if event in s.counters)
            for event in {event: None for s in group for event in s.counters}
        },
    )


def dropped(samples: Iterable[Sample]) -> dict[str, int]:
    """How many samples do not count, by reason."""
    counts: dict[str, int] = {}
    for sample in samples:
        if sample.verdict != "kept":
            counts[sample.verdict] = counts.get(sample.verdict, 0) + 1
    return counts


def percentile(ordered: Sequence[int], share: float) -> float:
    """The value that `share` (0 to 1) of the `ordered` values do not exceed."""
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])
