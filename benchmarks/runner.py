"""Runs the cases: all switches side by side, a probe around every sample."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import counters
from benchmarks.alone import ALONE, ENTRIES, Starter, Table, table_bytes
from benchmarks.cases import GENERATORS, can, cases_of, setup_of
from benchmarks.ceilings import CEILINGS
from benchmarks.contestants import Bound, Contestant, Pair
from benchmarks.errors import BenchmarkError, MissingError
from benchmarks.generators import Generator
from benchmarks.host import OvsAfPacket, OvsTap
from benchmarks.machine import Cpus, CpuWait, choose_cpus, describe, hugepages, running_on
from benchmarks.native.probe import round_trip_ns
from benchmarks.null import NullSwitch
from benchmarks.ovs import OvsDpdk
from benchmarks.samples import UNITS, Case, Kind, Place, Sample, Setup, enough
from benchmarks.switches import (
    BusyVswitch,
    CrowdedVswitch,
    Switch,
    TestpmdIo,
    TwoWorkers,
    Vswitch,
)
from vswitch.errors import VswitchError
from vswitch.lab.errors import LabError
from vswitch.lab.guest.errors import GuestError

SWITCHES: dict[str, type[Switch]] = {
    one.name: one
    for one in (
        Vswitch,
        BusyVswitch,
        CrowdedVswitch,
        TwoWorkers,
        TestpmdIo,
        OvsDpdk,
        OvsTap,
        OvsAfPacket,
        NullSwitch,
    )
}
TITLES = {one.name: one.title for one in SWITCHES.values()} | {
    one.name: one.title for one in CEILINGS.values()
}
"""Of everything that can be measured, by name."""
MAX_ROUNDS = 3
"""Times the wanted number of samples that are taken at most to make up for those that drop out."""
_SAME = ("cpu", "cpus", "kernel", "commit")
"""What of a machine's description must not differ between runs whose samples are compared."""
_PROBES = 5
_MAX_FAILURES = 3

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure. `samples` that count are wanted of each switch, `seconds` long each.

    With `places` so many are wanted in each of these; without, in any one.
    """

    samples: int = 9
    seconds: float = 0.5
    frames: tuple[int, ...] = (64, 512, 1500, 9000)
    switches: tuple[str, ...] = tuple(TITLES)
    generators: tuple[str, ...] = (*GENERATORS, ALONE)
    cpus: tuple[int, ...] = ()
    kinds: tuple[Kind, ...] = tuple(UNITS)
    places: tuple[Place, ...] = ()


@dataclass
class Results:
    """Everything a run found out. `skipped` says what was not measured and why."""

    started: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0


class Runner:
    """One run: `run` may be called once.

    `earlier` is a run of the same commit on the same machine that is to be gone on with: only what
    it has too few samples of is measured. Raises BenchmarkError where it is another. `switches` are
    those that settings.switches may name.
    """

    def __init__(
        self,
        settings: Settings,
        progress: Progress,
        earlier: Results | None = None,
        switches: Mapping[str, type[Switch]] = SWITCHES,
    ) -> None:
        self.settings = settings
        self.progress = progress
        self._switches = switches
        self._counted = False
        self.cpus: Cpus = choose_cpus(settings.cpus)
        self.results = earlier or Results(
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=describe(),
            settings={
                "samples": settings.samples,
                "seconds": settings.seconds,
                "switch_cpu": self.cpus.switch,
                "generator_cpu": self.cpus.generator,
                "fdb_bytes": {str(entries): table_bytes(entries) for entries in ENTRIES},
            },
        )
        here = describe()
        for what in _SAME:
            if self.results.machine[what] != here[what]:
                raise BenchmarkError(
                    f"the run to go on with has {what} {self.results.machine[what]!r}, "
                    f"here it is {here[what]!r}"
                )

    def run(self) -> Results:
        start = time.monotonic()
        try:
            counters.check()
            self._counted = True
        except MissingError as error:
            self.results.machine["no_counters"] = error.message
        # Also keeps what Python does besides away from the switch's CPU.
        with running_on({self.cpus.generator}):
            for name in self.settings.generators:
                groups: dict[Setup, list[Case]] = {}
                for case in cases_of(name, self.settings.frames):
                    if case.kind not in self.settings.kinds or self._enough(case):
                        continue
                    groups.setdefault(setup_of(case), []).append(case)
                for setup, cases in groups.items():
                    if name == ALONE:
                        self._run_alone(cases)
                    else:
                        self._run_group(GENERATORS[name], setup, cases)
        self.results.seconds = round(self.results.seconds + time.monotonic() - start, 1)
        if not self.results.samples:
            raise BenchmarkError(
                "nothing was measured: " + "; ".join(self.results.skipped or ["nothing was chosen"])
            )
        return self.results

    def _run_group(self, generator: type[Generator], setup: Setup, cases: list[Case]) -> None:
        """Start what these cases need, run them, and end it all."""
        chosen = self.settings.switches
        switches = [self._switches[name] for name in chosen if name in self._switches]
        switches = [one for one in switches if any(can(one, generator, case) for case in cases)]
        if not switches:
            return
        with contextlib.ExitStack() as stack:
            mib = sum(one.hugepages_mib + generator.hugepages_mib for one in switches)
            try:
                stack.enter_context(hugepages(mib) if mib else contextlib.nullcontext())
            except MissingError as error:
                self._skip(f"all that need hugepages with {generator.title}", error)
                if generator.hugepages_mib:
                    return
                switches = [one for one in switches if not one.hugepages_mib]
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vswitch-bench-")))
            pairs: list[Pair] = []
            for kind in switches:
                try:
                    pairs.append(self._start(kind, generator, setup, folder, stack))
                except (BenchmarkError, GuestError, LabError) as error:
                    self._skip(f"{kind.title} with {generator.title}", error)
            for case in cases:
                able: list[Contestant] = [
                    pair for pair in pairs if can(type(pair.switch), generator, case)
                ]
                able += [
                    Bound(CEILINGS[name], self.cpus.switch)
                    for name in chosen
                    if name in CEILINGS and CEILINGS[name].kind == case.kind
                ]
                if able:
                    self._run_case(case, able)

    def _run_alone(self, cases: list[Case]) -> None:
        """Cases without a generator, in which nothing is running but what is being measured."""
        chosen = [self._switches[one] for one in self.settings.switches if one in self._switches]
        for case in cases:
            if case.kind == "fdb":
                if Vswitch in chosen:
                    self._run_case(case, [Table(self.cpus.switch)])
                continue
            able = [one for one in chosen if one.can(case)]
            mib = max((one.hugepages_mib for one in able), default=0)
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(hugepages(mib) if mib else contextlib.nullcontext())
                except MissingError as error:
                    self._skip("starting what needs hugepages", error)
                    able = [one for one in able if not one.hugepages_mib]
                self._run_case(case, [Starter(one, self.cpus.switch) for one in able])

    def _skip(self, what: str, error: VswitchError) -> None:
        self.results.skipped.append(f"{what}: {error.message}")
        self.progress(f"skipping {what}: {error.message}")

    def _start(
        self,
        kind: type[Switch],
        generator: type[Generator],
        setup: Setup,
        folder: Path,
        stack: contextlib.ExitStack,
    ) -> Pair:
        self.progress(f"starting {kind.title} for {generator.title}")
        own = folder / kind.name
        own.mkdir()
        with contextlib.ExitStack() as starting:
            switch = kind(own, self.cpus.switch, setup)
            starting.callback(switch.close)
            switch.start()
            pair = Pair(switch, generator(switch, self.cpus.generator, setup.ring))
            starting.callback(pair.generator.close)
            pair.generator.connect()
            pair.generator.pause()
            switch.pause()
            # Until here, a failure ends it at once: it polls, and would take the others' CPU.
            stack.push(starting.pop_all())
        self.results.versions[kind.title] = switch.version()
        return pair

    def _run_case(self, case: Case, contestants: list[Contestant]) -> None:
        for one in contestants:
            with one.running():
                one.prepare(case)
        if not contestants:
            return
        failures = dict.fromkeys((one.name for one in contestants), 0)
        for turn in range(MAX_ROUNDS * self.settings.samples):
            if self._enough(case, {name for name, n in failures.items() if n < _MAX_FAILURES}):
                break
            # Nobody is always the one after somebody.
            first = turn % len(contestants)
            for one in [*contestants[first:], *contestants[:first]]:
                if failures[one.name] >= _MAX_FAILURES:
                    continue
                try:
                    sample = self._sample(case, one)
                except MissingError as error:
                    failures[one.name] = _MAX_FAILURES
                    self._skip(f"{case.kind} of {one.title}", error)
                    continue
                except (BenchmarkError, GuestError, LabError) as error:
                    failures[one.name] += 1
                    self.results.failures.append(f"{case}, {one.title}: {error}")
                    self.progress(f"FAILED {self.results.failures[-1]}")
                    continue
                self.results.samples.append(sample)
                self.progress(_line(sample, turn))

    def _enough(self, case: Case, names: Collection[str] | None = None) -> bool:
        settings = self.settings
        return enough(self.results.samples, case, settings.samples, settings.places, names)

    def _sample(self, case: Case, one: Contestant) -> Sample:
        with one.running():
            one.arrange(case)
        before = self._probe()
        with one.running():
            # Connecting keeps a switch's other threads busy, on the same CPU: not before here.
            wait = CpuWait(one.pids)
            with self._counting(case, one) as counts:
                reading = one.measure(case, self.settings.seconds)
            waited = wait.share()
        per_frame = {event: round(n / reading.value, 2) for event, n in counts.items()}
        after = self._probe()
        return Sample(case, one.name, reading, before, after, round(waited, 4), per_frame)

    def _counting(
        self, case: Case, one: Contestant
    ) -> contextlib.AbstractContextManager[dict[str, float]]:
        """Count events a second in a switch that does nothing but forward."""
        if self._counted and isinstance(one, Pair) and case.kind == "rate" and one.counted:
            return counters.counting(one.switch.pid)
        return contextlib.nullcontext({})

    def _probe(self) -> float:
        """Core-to-core round trip in nanoseconds, while everything else of ours is paused."""
        for _ in range(_PROBES):
            with contextlib.suppress(TimeoutError):
                return round(round_trip_ns(self.cpus.generator, self.cpus.switch), 1)
        raise BenchmarkError(
            f"CPUs {self.cpus.generator} and {self.cpus.switch} are too busy to be measured",
            hint="see with `top` what else runs on this machine, and stop it",
        )


def _line(sample: Sample, turn: int) -> str:
    value = f"{sample.reading.value:>12,.0f} {UNITS[sample.case.kind]}"
    where = sample.place or "moved"
    note = "" if sample.verdict in ("kept", "moved") else f"  dropped: {sample.verdict}"
    return (
        f"{sample.case.generator:>8} {sample.case.kind:<7} {sample.case.frame_len:>5} B "
        f"{sample.case.ring:<6} "
        f"#{turn + 1:<2} {sample.switch:<12} {value:<21} {where} "
        f"({sample.before_ns:.0f}/{sample.after_ns:.0f} ns){note}"
    )
