"""What vswitch is to reach, and whether a run shows that it does: a table, never a failed test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.samples import LONGEST_FRAME_LEN, Case, Kind, Place, RingFormat, Summary

PEERS = ("testpmd", "ovs")
UPLINK_PEERS = {"host": "ovs-tap", "host-afp": "ovs-afp"}
_LEAST_SAMPLES = 7
"""With fewer samples of one that is compared, a verdict is a guess and says so."""


class Found:
    """The medians of a run."""

    def __init__(self, summaries: Sequence[Summary]) -> None:
        self._by = {(one.switch, one.case, one.place): one for one in summaries}
        self.titles: dict[str, str] = {}

    def get(self, switch: str, case: Case, place: Place | None) -> Summary | None:
        """One switch's median; without a place, that of the class with more samples."""
        if place is not None:
            return self._by.get((switch, case, place))
        both = [self._by.get((switch, case, each)) for each in ("near", "far")]
        there = [one for one in both if one is not None]
        return max(there, key=lambda one: one.count, default=None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row: what was found, and whether it is enough; None where that was not measured."""

    text: str
    reached: bool | None
    samples: int = _LEAST_SAMPLES

    @property
    def verdict(self) -> str:
        if self.reached is None:
            return "not measured"
        return ("reached" if self.reached else "missed") + (
            "" if self.samples >= _LEAST_SAMPLES else f" (only {self.samples} samples)"
        )


@dataclass(frozen=True, slots=True)
class Goal:
    row: str
    wanted: str
    judge: Callable[[Found], Outcome]


_OUT: Kind = "tap-out"
_IN: Kind = "tap-in"
NOTHING = Outcome("-", None)


def _beside(
    ours: Summary | None, other: Summary | None, least: float, unit: Callable[[Summary], str]
) -> Outcome:
    """Our rate against another's: `least` times as much is wanted."""
    if ours is None or other is None:
        return NOTHING
    ratio = ours.median / other.median
    text = f"{ratio:.2f} x: {unit(ours)} against {unit(other)}"
    return Outcome(text, ratio >= least, min(ours.count, other.count))


def _mframes(one: Summary) -> str:
    return f"{one.median / 1e6:.2f} M/s ({one.switch}, {one.count})"


def _best_peer(
    found: Found, case: Case, place: Place | None, *, low: bool = False
) -> Summary | None:
    there = [one for name in PEERS if (one := found.get(name, case, place)) is not None]
    if not there:
        return None
    return (min if low else max)(there, key=lambda one: one.median)


def _rate(length: int, place: Place, least: float, ring: RingFormat = "split") -> Goal:
    def judge(found: Found) -> Outcome:
        case = Case("rate", "software", length, ring)
        outcome = _beside(
            found.get("vswitch", case, place), _best_peer(found, case, place), least, _mframes
        )
        ceiling = found.get("null", case, place)
        if outcome.reached is None or ceiling is None:
            return outcome
        text = f"{outcome.text}; the generator's ceiling is {ceiling.median / 1e6:.2f}"
        return Outcome(text, outcome.reached, outcome.samples)

    name = "packed" if ring == "packed" else "split"
    return Goal(f"{length} B, {name} ring, {place}", f">= {least:g} x the best peer", judge)


def _one_in_flight(found: Found) -> Outcome:
    case = Case("latency", "software", 64)
    ours, peer = found.get("vswitch-busy", case, None), _best_peer(found, case, None, low=True)
    if ours is None or peer is None or ours.place != peer.place:
        return NOTHING
    text = f"{ours.median:.0f} ns against {peer.median:.0f} ns ({peer.switch}), {ours.place}"
    return Outcome(text, ours.median <= peer.median, min(ours.count, peer.count))


def _first_frame(found: Found) -> Outcome:
    case = Case("wakeup", "software", 64)
    ours, limit = found.get("vswitch", case, None), found.get("eventfd", case, None)
    if ours is None or ours.p99 is None:
        return NOTHING
    text = f"p99 {ours.p99 / 1e3:.1f} µs, median {ours.median / 1e3:.1f} µs"
    if limit is not None and limit.p99 is not None:
        text += (
            f"; waking a bare thread: p99 {limit.p99 / 1e3:.1f} µs, "
            f"median {limit.median / 1e3:.1f} µs"
        )
    return Outcome(text, ours.p99 <= 30e3, ours.count)


def _idle(found: Found) -> Outcome:
    case = Case("idle", "software", 64)
    ours = found.get("vswitch-64", case, None)
    if ours is None:
        return NOTHING
    peers = [one for name in PEERS if (one := found.get(name, case, None)) is not None]
    text = f"{ours.median:.2f} %" + "".join(
        f"; {one.switch} with 2 ports {one.median:.0f} %" for one in peers
    )
    return Outcome(text, ours.median < 1, ours.count)


def _ours(row: str, wanted: str, name: str, base: str, case: Case, least: float) -> Goal:
    """One of our own against another of our own, in the class with more samples."""

    def judge(found: Found) -> Outcome:
        one, other = found.get(name, case, None), found.get(base, case, None)
        if one is None or other is None or one.place != other.place:
            return NOTHING
        return _beside(one, other, least, _mframes)

    return Goal(row, wanted, judge)


def _flood(found: Found) -> Outcome:
    """A copy of a broadcast against a frame to one port: both come in bursts of up to 32 a port."""
    flood = found.get("vswitch", Case("flood", "software", 64), None)
    rate = found.get("vswitch", Case("rate", "software", 64), flood.place if flood else None)
    if flood is None or rate is None:
        return NOTHING
    text = f"{1e9 / flood.median:.1f} ns a copy against {1e9 / rate.median:.1f} ns a frame"
    spread = found.get("vswitch", Case("spread", "software", 64), flood.place)
    if spread is not None:
        text += (
            f"; {1e9 / spread.median:.1f} ns where each frame goes to another port than the last"
        )
    return Outcome(text, flood.median >= rate.median, min(flood.count, rate.count))


def _tso(tso: Case) -> Callable[[Found], Outcome]:
    def judge(found: Found) -> Outcome:
        ours, limit = found.get("vswitch", tso, None), found.get("memcpy", tso, None)
        if ours is None or limit is None or ours.place != limit.place:
            return NOTHING
        gbit = [one.median * 8 * tso.frame_len / 1e9 for one in (ours, limit)]
        text = f"{gbit[0] / gbit[1]:.0%}: {gbit[0]:.0f} Gbit/s against {gbit[1]:.0f}, {ours.place}"
        return Outcome(text, gbit[0] >= 0.8 * gbit[1], min(ours.count, limit.count))

    return judge


def _fdb(found: Found) -> Outcome:
    few, many = (
        found.get("vswitch", Case("fdb", "alone", 64, entries=entries), None)
        for entries in (10, 1_000_000)
    )
    if few is None or many is None:
        return NOTHING
    ratio = many.median / few.median
    text = f"{ratio:.2f} x: {many.median:.1f} ns a lookup against {few.median:.1f} ns"
    return Outcome(text, ratio <= 1.5, min(few.count, many.count))


def _startup(found: Found) -> Outcome:
    case = Case("startup", "alone", 1514)
    ours = found.get("vswitch", case, None)
    if ours is None:
        return NOTHING
    text = f"{ours.median / 1e9:.2f} s" + _of_peers(found, case, 1e9, "s")
    return Outcome(text, ours.median < 0.5e9, ours.count)


def _memory(found: Found) -> Outcome:
    case = Case("memory", "software", 64)
    ours = found.get("vswitch", case, None)
    if ours is None:
        return NOTHING
    text = f"{ours.median / 1e6:.0f} MB" + _of_peers(found, case, 1e6, "MB")
    return Outcome(text, ours.median < 60e6, ours.count)


def _of_peers(found: Found, case: Case, scale: float, unit: str) -> str:
    there = [one for name in PEERS if (one := found.get(name, case, None)) is not None]
    return "".join(f"; {one.switch} {one.median / scale:.2f} {unit}" for one in there)


def _tap(kind: Kind, length: int) -> Goal:
    def judge(found: Found) -> Outcome:
        beside = []
        for generator, name in UPLINK_PEERS.items():
            case = Case(kind, generator, length)
            ours = found.get("vswitch", case, None)
            peer = found.get(name, case, ours.place) if ours else None
            if ours is not None and peer is not None:
                beside.append((ours, peer))
        if not beside:
            return NOTHING
        # Each of them has its own samples of ours beside it.
        ours, peer = min(beside, key=lambda pair: pair[0].median / pair[1].median)
        return _beside(ours, peer, 1.0, _kframes)

    what = "64 KiB segments" if length > LONGEST_FRAME_LEN else f"{length} B"
    way = "to the host" if kind == "tap-out" else "from the host"
    return Goal(f"TAP, {what}, {way}", "> OVS-DPDK's TAP and AF_PACKET ports", judge)


def _kframes(one: Summary) -> str:
    return f"{one.median / 1e3:.0f} k/s ({one.switch}, {one.count})"


def goals(tso_frame_len: int) -> list[Goal]:
    """All rows, in the order of the table."""
    short = Case("rate", "software", 64)
    return [
        _rate(64, "near", 1.2),
        _rate(64, "far", 1.0),
        _rate(1500, "near", 2.0),
        _rate(1500, "far", 1.5),
        _rate(64, "near", 1.2, "packed"),
        _rate(1500, "near", 2.0, "packed"),
        Goal("one frame in flight, busy polling", "<= 1 x the best peer's", _one_in_flight),
        Goal("first frame after idle", "p99 <= 30 µs", _first_frame),
        Goal("CPU of an idle switch, 64 ports", "< 1 % of a CPU", _idle),
        _ours(
            "62 idle ports beside two busy ones", ">= 0.95 x without them",
            "vswitch-64", "vswitch", short, 0.95,
        ),
        Goal("flood to 32 ports", "a copy <= a unicast frame", _flood),
        Goal(
            "64 KiB segments between guests", ">= 80 % of memcpy",
            _tso(Case("tso", "software", tso_frame_len)),
        ),
        *(
            _tap(kind, length)
            for length in (64, tso_frame_len)
            for kind in (_OUT, _IN)
        ),
        Goal("1 million addresses learned", "lookup <= 1.5 x that with 10", _fdb),
        _ours(
            "two workers configured, one with work", "what sharing costs; no third CPU here",
            "vswitch-2w", "vswitch", short, 0.95,
        ),
        Goal("start to first listening socket", "< 0.5 s", _startup),
        Goal("memory with 2 ports", "< 60 MB", _memory),
    ]  # fmt: skip
