"""The benchmarks: what counts as a sample, the statistics, the report; and one very short run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import __main__ as program
from benchmarks import counters, fairness, machine, plot, report, runner
from benchmarks.alone import ENTRIES, table_bytes
from benchmarks.cases import GENERATORS, cases_of, setup_of
from benchmarks.ceilings import CEILINGS
from benchmarks.errors import BenchmarkError, MissingError
from benchmarks.generators import SoftwareGenerator
from benchmarks.goals import Found, goals
from benchmarks.guests import FLOOD_PORTS, TSO_FRAME_LEN, frames_under_way, tso_frame
from benchmarks.hostile import BEHAVIOURS
from benchmarks.machine import (
    Cpus,
    CpuWait,
    choose_cpus,
    cpu_time_ns,
    resident_bytes,
    running_on,
)
from benchmarks.native.ceilings import copies, wakeups
from benchmarks.native.host_load import from_host
from benchmarks.native.null_backend import NullBackend
from benchmarks.native.probe import round_trip_ns
from benchmarks.null import EAGER, RHYTHMS, TRIALS, NullSwitch, Rhythm
from benchmarks.ovs import OvsDpdk
from benchmarks.runner import SWITCHES, TITLES, Results, Runner, Settings
from benchmarks.samples import (
    Case,
    Reading,
    RingFormat,
    Sample,
    Setup,
    dropped,
    enough,
    percentile,
    place_of,
    summarise,
)
from tests.support.measuring import something
from vswitch.lab.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.lab.guest.packets import checksum
from vswitch.lab.guest.vnet import GSO_TCPV4, NEEDS_CSUM, VnetHeader
from vswitch.lab.load.latency import MAX_FRAMES, latencies
from vswitch.lab.load.load import Flow, Load

CASE = Case("rate", "software", 64)


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far two CPUs are apart is asked 60 times and not 10,000 times around each sample.

    Where both have other things to do, each time takes as long as they are given to others.
    """
    short = partial(round_trip_ns, batches=3, rounds=20, timeout_s=60.0)
    monkeypatch.setattr(runner, "round_trip_ns", short)


def sample(
    value: float,
    *,
    switch: str = "vswitch",
    case: Case = CASE,
    probes: tuple[float, float] = (90.0, 95.0),
    waited: float = 0.0,
    lost: int = 0,
    p99: float | None = None,
) -> Sample:
    return Sample(case, switch, Reading(value, p99, lost), *probes, waited)


def results(samples: list[Sample]) -> Results:
    return Results(
        started="2026-01-02T03:04:05+00:00",
        machine={
            "cpu": "Some CPU", "cpus": 2, "virtual": True, "memory_mib": 1024, "kernel": "6.1.0",
            "python": "3.11.2", "vswitch": "0.1.0", "commit": "0123456789", "load_before": 0.25,
        },
        settings={"samples": 3, "seconds": 0.5, "switch_cpu": 1, "generator_cpu": 0},
        versions={"vswitch": "0.1.0", "testpmd io": "DPDK 22.11.11"},
        skipped=["OVS-DPDK with software guests: ovs-vswitchd-dpdk is not installed"],
        samples=samples,
        seconds=12.5,
    )  # fmt: skip


def test_near_and_far() -> None:
    assert place_of(90.0) == "near"
    assert place_of(199.9) == "near"
    assert place_of(200.0) == "far"


@pytest.mark.parametrize(
    ("given", "place", "verdict"),
    [
        (sample(1), "near", "kept"),
        (sample(1, probes=(410, 390)), "far", "kept"),
        (sample(1, probes=(90, 410)), None, "moved"),
        (sample(1, probes=(410, 90)), None, "moved"),
        (sample(1, waited=0.031), "near", "disturbed"),
        (sample(1, waited=0.03), "near", "kept"),
        (sample(1, lost=1), "near", "lossy"),
    ],
)
def test_what_makes_a_sample_count(given: Sample, place: str | None, verdict: str) -> None:
    assert (given.place, given.verdict) == (place, verdict)


def test_medians_of_each_class() -> None:
    samples = [
        sample(3.0, probes=(80, 100)),
        sample(1.0, probes=(100, 120)),
        sample(8.0, probes=(90, 90)),
        sample(100.0, waited=0.5),
        sample(100.0, probes=(90, 400)),
        sample(0.5, probes=(400, 420)),
        sample(0.7, probes=(400, 440)),
        sample(2.0, switch="testpmd"),
        sample(9.0, case=Case("rate", "software", 512)),
    ]
    near, far, peer, longer = summarise(samples)
    assert (near.switch, near.place, near.count) == ("vswitch", "near", 3)
    assert (near.low, near.median, near.high) == (1.0, 3.0, 8.0)
    assert near.round_trip_ns == 90.0
    assert (far.place, far.count, far.median) == ("far", 2, 0.6)
    assert (peer.switch, peer.count, peer.median) == ("testpmd", 1, 2.0)
    assert (longer.case.frame_len, longer.median) == (512, 9.0)
    assert dropped(samples) == {"disturbed": 1, "moved": 1}


def test_median_of_p99() -> None:
    case = Case("latency", "software", 64)
    samples = [sample(500, case=case, p99=p99) for p99 in (900.0, 700.0, 5000.0)]
    (summary,) = summarise(samples)
    assert summary.p99 == 900.0


def test_percentile() -> None:
    ordered = list(range(1, 101))
    assert percentile(ordered, 0.5) == 51
    assert percentile(ordered, 0.99) == 100
    assert percentile([7], 0.99) == 7


def test_cases() -> None:
    cases = cases_of("software", (64, 1500))
    assert [(case.kind, case.frame_len) for case in cases] == [
        ("rate", 64),
        ("rate", 1500),
        ("rate", 64),
        ("rate", 1500),
        *[(kind, 64) for kind in ("latency", "wakeup", "idle", "memory", "flood", "spread")],
        ("tso", TSO_FRAME_LEN),
    ]
    assert [case.ring for case in cases].count("packed") == 2
    assert len({setup_of(case) for case in cases}) == 3
    of_testpmd = {setup_of(case) for case in cases_of("testpmd", (64, 9000))}
    assert of_testpmd == {Setup(1514), Setup(1514, ring="packed"), Setup(9000)}


def test_json_and_back() -> None:
    before = results([sample(1e6), sample(2.5e6, probes=(400, 410), p99=7.0, lost=3)])
    text = report.to_json(before)
    assert report.from_json(text) == before
    data = json.loads(text)
    assert [one["verdict"] for one in data["samples"]] == ["kept", "lossy"]
    assert data["summaries"][0]["median"] == 1e6


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1}'])
def test_what_is_no_result(text: str) -> None:
    with pytest.raises(BenchmarkError):
        report.from_json(text)


def test_table() -> None:
    late = Case("wakeup", "software", 64)
    text = report.markdown(
        results(
            [
                *[sample(value) for value in (11e6, 12e6, 13e6)],
                sample(10e6, switch="testpmd"),
                sample(50e6, switch="null"),
                sample(4e6, probes=(400, 400)),
                sample(9e6, probes=(90, 400)),
                sample(30_000, case=late, p99=41_000.0),
            ]
        )
    )
    lines = text.splitlines()
    near = lines.index("### Million frames a second, near (software guests, one direction)")
    assert lines[near + 2] == ("| frame | vswitch | testpmd io | no switch | vswitch / best peer |")
    assert lines[near + 4] == "| 64 B | 12.00 (3) | 10.00 (1) | 50.00 (1) | 1.20 |"
    far = lines.index("### Million frames a second, far (software guests, one direction)")
    assert lines[far + 4] == "| 64 B | 4.00 (1) | - |"
    assert "| vswitch | - | - | 30.00 (1) | 41.00 |" in lines
    assert "8 samples were taken." in lines
    assert "1 do not count because the CPUs moved between near and far." in lines
    assert any("ovs-vswitchd-dpdk is not installed" in line for line in lines)
    assert any("Some CPU" in line for line in lines)


def test_report_of_a_run_without_numbers() -> None:
    run = results([sample(1e6, waited=0.5)])
    run.failures = ["rate of 64 B by software, vswitch: no answer"] * 2
    text = report.markdown(run)
    assert "So there are no numbers" in text
    assert "Failed (2 times): rate of 64 B by software, vswitch: no answer." in text
    assert "|" not in text


def test_document_between_markers() -> None:
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.between_markers(document, "new")
    assert new == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.between_markers(new, "new") == new
    with pytest.raises(BenchmarkError, match="the document has no"):
        report.between_markers("no markers", "new")


def test_the_document_shows_the_results_beside_it() -> None:
    """docs/performance.md is made from a run: nobody edits its numbers."""
    document = program.DOCUMENT.read_text()
    shown = report.markdown(report.from_json(program.DOCUMENT_RESULTS.read_text()))
    assert report.between_markers(document, shown) == document


def test_cpus() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    with running_on({allowed[0]}), pytest.raises(BenchmarkError, match="needs two CPUs"):
        choose_cpus()
    assert choose_cpus() == Cpus(switch=allowed[1], generator=allowed[0])
    assert choose_cpus((allowed[0], allowed[1])) == Cpus(allowed[0], allowed[1])
    for wrong in [(allowed[0],), (allowed[0], allowed[0]), (allowed[0], 100_000)]:
        with pytest.raises(BenchmarkError, match="not two different ones"):
            choose_cpus(wrong)


SPINS = """
import os
import sys
os.sched_setaffinity(0, {int(sys.argv[1])})
print("spinning", flush=True)
while True:
    pass
"""


def test_waiting_for_another_program_is_seen() -> None:
    cpu = min(os.sched_getaffinity(0))
    spinning = [
        subprocess.Popen([sys.executable, "-c", SPINS, str(cpu)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for one in spinning:
            assert one.stdout is not None
            one.stdout.readline()

        def waited(seconds: float) -> bool:
            wait = CpuWait({spinning[0].pid})
            threading.Event().wait(seconds)
            # More than 1 is possible: the kernel counts a wait when it is over, from its beginning.
            return wait.share() > 0.1

        assert something(waited)
    finally:
        for one in spinning:
            one.kill()
            one.communicate()


def test_waiting_for_a_thread_of_its_own_is_no_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one CPU A ran for 60 ms, B of the same process for 30, somebody else for 10 of 100."""
    ms = 1_000_000
    here, there = (1, 0), (1, 1)
    zero = {
        name: machine.Thread(0, 0, place)
        for name, place in zip("ABC", (here, here, there), strict=True)
    }
    after = {
        "A": machine.Thread(60 * ms, 40 * ms, here),
        "B": machine.Thread(30 * ms, 70 * ms, here),
        "C": machine.Thread(95 * ms, 5 * ms, there),
    }
    readings = iter([zero, after])
    clock = iter([0, 100 * ms])
    monkeypatch.setattr(CpuWait, "_read", lambda _: next(readings))
    monkeypatch.setattr(time, "monotonic_ns", lambda: next(clock))
    assert CpuWait({1}).share() == pytest.approx(0.1)


def test_hugepages_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_HUGEPAGES", tmp_path)
    with pytest.raises(MissingError, match="no 2 MiB hugepages"), machine.hugepages(64):
        pass
    count = tmp_path / "nr_hugepages"
    count.write_text("100\n")
    (tmp_path / "free_hugepages").write_text("20\n")
    with machine.hugepages(64):
        assert int(count.read_text()) == 112
    assert int(count.read_text()) == 100
    with machine.hugepages(40):
        assert int(count.read_text()) == 100


def test_a_program_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="no-such-switch is not installed"):
        machine.program("no-such-switch")
    tool = tmp_path / "tool"
    tool.write_text("")
    tool.chmod(0o755)
    assert machine.program("tool") == str(tool)


def test_a_peer_that_is_not_installed_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_switch: OvsDpdk) -> None:
        raise MissingError("ovs-vswitchd-dpdk is not installed")

    monkeypatch.setattr(OvsDpdk, "start", start)
    monkeypatch.setattr(OvsDpdk, "hugepages_mib", 0)
    said: list[str] = []
    settings = Settings(samples=1, seconds=0.01, switches=("ovs",), generators=("software",))
    with pytest.raises(BenchmarkError, match="nothing was measured"):
        Runner(settings, said.append).run()
    assert any("skipping OVS-DPDK" in line for line in said)


def test_round_trip() -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    before = os.sched_getaffinity(0)
    assert round_trip_ns(first, second, batches=3, rounds=20, timeout_s=30.0) > 0
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ValueError, match="needs two CPUs"):
        round_trip_ns(first, first)
    with pytest.raises(ValueError, match="CPU 100000 cannot be used"):
        round_trip_ns(100_000, first)
    with pytest.raises(ValueError, match="CPU 100000 cannot be used"):
        round_trip_ns(first, 100_000, timeout_s=0.05)
    with pytest.raises(ValueError, match="batches"):
        round_trip_ns(first, second, batches=0)
    assert os.sched_getaffinity(0) == before


def test_latencies_without_a_switch() -> None:
    with SoftwareGuest("52:54:00:00:00:01") as a, SoftwareGuest("52:54:00:00:00:02") as b:
        for guest in (a, b):
            guest.build_offline(DEFAULT_FEATURES)
        backend = NullBackend(a.transmitqs[0], b.receiveqs[0], 64)
        thread = threading.Thread(target=backend.run)
        thread.start()
        try:
            flow = Flow(a.transmitqs[0], b.receiveqs[0], [bytes(64)])
            # More than a ring has entries, so descriptors come round.
            spent = latencies(flow, 30.0, limit=600)
            few = latencies(flow, 30.0, gap_s=0.001, limit=5)
        finally:
            backend.stop()
            thread.join()
        assert len(spent) == 600
        assert min(spent) > 0
        assert len(few) == 5
        assert backend.forwarded == 605
        assert b.receiveqs[0].ring.frames == 605
        with pytest.raises(ValueError, match=f"0 frames, must be 1 to {MAX_FRAMES}"):
            latencies(flow, 1.0, limit=0)
        with pytest.raises(ValueError, match="latencies need both"):
            latencies(Flow(a.transmitqs[0], None, [bytes(64)]), 1.0)


def test_a_run(tmp_path: Path) -> None:
    """The whole program on the real switch; what it measures here says nothing."""
    arguments = ["--samples", "1", "--seconds", "0.05", "--frames", "64,1500"]
    arguments += ["--switches", "vswitch", "--generators", "software", "--out", str(tmp_path)]
    ran = CliRunner().invoke(program.main, arguments)
    assert ran.exit_code == 0, ran.output
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert data["failures"] == data["skipped"] == []
    assert data["machine"]["cpus"] == os.cpu_count()
    assert data["versions"].keys() == {"vswitch"}
    found = {(one["case"]["kind"], one["case"]["frame_len"]) for one in data["samples"]}
    assert found == {(case.kind, case.frame_len) for case in cases_of("software", (64, 1500))}
    for one in data["samples"]:
        # On a machine that is busy with other things, no frame may get through in so short a time;
        # for the first one whose time is taken they wait.
        assert one["reading"]["value"] > 0 or one["case"]["kind"] not in ("latency", "wakeup")
        assert one["before_ns"] > 0
        assert (one["reading"]["p99"] is None) == (one["case"]["kind"] not in ("latency", "wakeup"))
    assert report.newest(tmp_path) == path
    assert "# A benchmark run" in path.with_suffix(".md").read_text()


def test_a_run_is_gone_on_with(tmp_path: Path) -> None:
    """What it has too few samples of is measured, and nothing else."""
    arguments = ["--samples", "1", "--seconds", "0.05", "--frames", "64", "--out", str(tmp_path)]
    arguments += ["--switches", "vswitch", "--generators", "software"]
    arguments += ["--kinds", "latency,wakeup"]
    ran = CliRunner().invoke(program.main, arguments)
    assert ran.exit_code == 0, ran.output
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    for one in data["samples"]:
        one.update(before_ns=50.0, after_ns=50.0, waited=0.0)
    path.write_text(json.dumps(data))

    def go_on(*more: str) -> list[str]:
        ran = CliRunner().invoke(program.main, [*arguments, "--add-to", str(path), *more])
        assert ran.exit_code == 0, ran.output
        samples = json.loads(path.read_text())["samples"]
        before = len(data["samples"])
        return [one["case"]["kind"] for one in samples[before:]]

    assert go_on() == []
    assert go_on("--places", "near") == []
    data["samples"] = [one for one in data["samples"] if one["case"]["kind"] == "wakeup"]
    path.write_text(json.dumps(data))
    assert set(go_on("--kinds", "wakeup")) == set()
    assert set(go_on()) == {"latency"}
    data["machine"]["commit"] = "another"
    path.write_text(json.dumps(data))
    other = CliRunner().invoke(program.main, [*arguments, "--add-to", str(path)])
    assert other.exit_code == 1
    assert "the run to go on with has commit 'another', here it is" in other.output


def test_enough_samples() -> None:
    case, other = Case("rate", "software", 64), Case("rate", "software", 1500)

    def sample(switch: str, ns: float, of: Case = case, waited: float = 0.0) -> Sample:
        return Sample(of, switch, Reading(1.0), ns, ns, waited)

    samples = [sample("a", 50), sample("a", 50), sample("b", 50), sample("b", 300)]
    assert not enough([], case, 1)
    assert enough([], case, 1, names=())
    assert enough(samples, case, 1)
    assert not enough(samples, other, 1)
    assert not enough(samples, case, 2)
    assert not enough(samples, case, 1, names={"a", "c"})
    assert enough(samples, case, 1, ["near"])
    assert not enough(samples, case, 1, ["near", "far"])
    assert enough([*samples, sample("a", 300)], case, 1, ["near", "far"])
    assert not enough([*samples, sample("b", 50, waited=0.5)], case, 2)
    assert enough([*samples, sample("b", 50)], case, 2)


def test_fairness(tmp_path: Path) -> None:
    """The whole program; as above, what it measures here says nothing."""
    out = tmp_path / "fairness.json"
    arguments = ["--samples", "1", "--seconds", "0.05", "--json", str(out)]
    ran = CliRunner().invoke(fairness.main, arguments)
    assert ran.exit_code == 0, ran.output
    rates = json.loads(out.read_text())["rates"]
    assert list(rates) == [behaviour.name for behaviour in BEHAVIOURS]
    assert ran.output.count("\n") == 2 + len(rates)


def test_shares_kept() -> None:
    rates = {"good order": [2.0, 4.0, 8.0], "bad order": [1.0, 1.0, 8.0]}
    assert fairness.shares(rates) == {"good order": 1.0, "bad order": 0.5}
    assert fairness.table(rates).splitlines()[-1] == "| bad order | 0.00 | 50 % |"
    # Nothing came through at all, not even beside a guest in good order: there is no share.
    assert fairness.shares({"good order": [0.0], "alone": [1.0]}) == {
        "good order": 0.0, "alone": 0.0,
    }  # fmt: skip


def test_wrong_options(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert "is not one of vswitch" in run(program.main, ["--switches", "vpp"]).output
    assert "not a list of numbers" in run(program.main, ["--frames", "64,x"]).output
    wrong = run(program.main, ["--frames", "63", "--out", str(tmp_path)])
    assert wrong.exit_code == 1
    assert "frames of 63 bytes cannot be measured" in wrong.output
    nothing = run(program.main, ["--write-docs", "--out", str(tmp_path)])
    assert nothing.exit_code == 1
    assert "there are no results" in nothing.output


def test_every_switch_and_generator_has_a_title() -> None:
    titles = [one.title for one in SWITCHES.values()] + [one.title for one in GENERATORS.values()]
    assert len(set(titles)) == len(titles)


def test_limits_of_the_machine() -> None:
    """That they are measured at all; what comes out depends on the machine."""
    cpu = sorted(os.sched_getaffinity(0))[1]
    spent = wakeups(cpu, 30.0, gap_s=0.0001, limit=20)
    assert len(spent) == 20
    assert min(spent) > 0
    sizes = {"slots": 4, "piece_len": 4096, "pieces": 64, "window": 4}
    assert something(lambda seconds: copies(cpu, seconds, 65238, warm_up_s=0.01, **sizes))
    with pytest.raises(ValueError, match="0 wake-ups, must be 1 to"):
        wakeups(cpu, 1.0, limit=0)
    with pytest.raises(ValueError, match="64 pieces of 4096 bytes do not hold 5 messages"):
        copies(cpu, 1.0, 65238, slots=8, piece_len=4096, pieces=64, window=5)
    with pytest.raises(ValueError, match="must be positive"):
        copies(cpu, 1.0, 100, slots=2, piece_len=4096, pieces=64, window=3)
    with pytest.raises(ValueError, match="CPU 100000 cannot be used"):
        wakeups(100_000, 0.01)
    assert something(lambda seconds: CEILINGS["memcpy"].run(cpu, seconds).value)


def test_segments_that_stay_whole() -> None:
    """What a "tso" sample sends is TCP that any device can cut, and fits the window."""
    frame, header = tso_frame(b"\2" * 6, b"\4" * 6)
    assert len(frame) == TSO_FRAME_LEN
    assert VnetHeader.unpack(header) == (NEEDS_CSUM, GSO_TCPV4, 66, 1448, 34, 16, 0)
    assert checksum(frame[14:34]) == 0
    assert int.from_bytes(frame[16:18], "big") == TSO_FRAME_LEN - 14
    assert frames_under_way(TSO_FRAME_LEN, 4096, 256) == 16
    assert frames_under_way(64, 2048, 256) == 128
    assert frames_under_way(9000, 2048, 256) == 51


def test_no_switch_in_every_rhythm() -> None:
    """A patient backend moves what there is in the end, and single frames whatever its rhythm."""
    for burst, patience in ((1, 0), (128, 50), (256, 5000)):
        with SoftwareGuest("52:54:00:00:00:01") as a, SoftwareGuest("52:54:00:00:00:02") as b:
            for guest in (a, b):
                guest.build_offline(DEFAULT_FEATURES)
            backend = NullBackend(
                a.transmitqs[0], b.receiveqs[0], 64, burst=burst, patience=patience
            )
            thread = threading.Thread(target=backend.run)
            thread.start()
            try:
                flow = Flow(a.transmitqs[0], b.receiveqs[0], [bytes(64)], window=128)
                (result,) = Load([flow]).run(60.0, frames=1001, settle_s=60.0, quiet_s=30.0)
                assert (result.sent, result.received) == (1001, 1001)
            finally:
                backend.stop()
                thread.join()
            with pytest.raises(ValueError, match="bursts of 257, must be 1 to 256"):
                NullBackend(a.transmitqs[0], b.receiveqs[0], 64, burst=257)


def test_no_switch_chooses_its_rhythm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the best single trial: what disturbs one makes it slower and never faster."""
    null = NullSwitch(tmp_path, sorted(os.sched_getaffinity(0))[1], Setup(1514))
    for best in RHYTHMS:
        tried: Counter[Rhythm] = Counter()

        def trial(_null: NullSwitch, rhythm: Rhythm, *, best: Rhythm = best) -> float:
            tried[rhythm] += 1  # noqa: B023 - called in this round only
            if rhythm != best:
                return 2.0
            return 3.0 if tried[rhythm] == TRIALS - 1 else 1.0  # noqa: B023

        monkeypatch.setattr(NullSwitch, "_try", trial)
        null.prepare(CASE)
        assert null.rhythm == best
        assert tried == dict.fromkeys(RHYTHMS, TRIALS)
        null.prepare(Case("latency", "software", 64))
        assert null.rhythm == EAGER


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_no_switch_in_the_place_of_one(ring: RingFormat, tmp_path: Path) -> None:
    """Chosen by real trials, with a generator that measures something then."""
    null = NullSwitch(tmp_path, sorted(os.sched_getaffinity(0))[1], Setup(1514))
    case = Case("rate", "software", 64, ring)
    generator = SoftwareGenerator(null, 0)
    null.prepare(case)
    try:
        assert null.rhythm in RHYTHMS
        generator.arrange(case)
        assert something(lambda seconds: generator.measure(case, seconds).value)
    finally:
        generator.close()
        null.close()


def test_what_is_measured_without_a_generator(tmp_path: Path) -> None:
    settings = Settings(samples=1, seconds=0.01, switches=("vswitch",), generators=("alone",))
    run = Runner(settings, lambda _line: None).run()
    assert run.failures == run.skipped == []
    # More than one of each where the machine has other things to do.
    assert {one.case.entries for one in run.samples if one.case.kind == "fdb"} == set(ENTRIES)
    assert all(one.reading.lost == 0 for one in run.samples)
    starts = [one.reading.value for one in run.samples if one.case.kind == "startup"]
    assert starts
    assert all(0 < value < 60e9 for value in starts)
    assert table_bytes(1_000_000) > table_bytes(10) > 0


def test_frames_to_many_ports() -> None:
    """Floods and unicast to as many ports."""
    setup = setup_of(Case("flood", "software", 64))
    assert setup.ports == 1 + FLOOD_PORTS
    cases = [Case(kind, "software", 64) for kind in ("flood", "spread")]

    def measure(seconds: float) -> bool:
        settings = Settings(
            samples=1, seconds=seconds, switches=("vswitch",), generators=("software",)
        )
        run = Runner(settings, lambda _line: None)
        run._run_group(SoftwareGenerator, setup, cases)
        assert run.results.failures == []
        kinds = {one.case.kind for one in run.results.samples if one.reading.value > 0}
        return kinds == {"flood", "spread"}

    assert something(measure)


def test_time_and_memory_of_a_process() -> None:
    before = cpu_time_ns(os.getpid())
    # The kernel does the sums now and then.
    while cpu_time_ns(os.getpid()) == before:
        sum(range(10_000))
    assert resident_bytes(os.getpid()) > 1 << 20


def _case_samples(switch: str, case: Case, value: float, p99: float | None = None) -> list[Sample]:
    return [sample(value, switch=switch, case=case, p99=p99)] * 7


def test_goals() -> None:
    """The table says what was reached, missed and not measured, with what it was compared to."""
    rate, packed = Case("rate", "software", 64), Case("rate", "software", 64, "packed")
    tso = Case("tso", "software", TSO_FRAME_LEN)
    samples = [
        *_case_samples("vswitch", rate, 20e6),
        *_case_samples("vswitch-64", rate, 18e6),
        *_case_samples("testpmd", rate, 12e6),
        *_case_samples("ovs", rate, 9e6),
        *_case_samples("null", rate, 40e6),
        *_case_samples("vswitch", packed, 11e6)[:3],
        *_case_samples("ovs", packed, 10e6),
        *_case_samples("vswitch-busy", Case("latency", "software", 64), 400.0, 500.0),
        *_case_samples("testpmd", Case("latency", "software", 64), 420.0, 600.0),
        *_case_samples("ovs", Case("latency", "software", 64), 480.0, 600.0),
        *_case_samples("vswitch", Case("wakeup", "software", 64), 30e3, 45e3),
        *_case_samples("eventfd", Case("wakeup", "software", 64), 24e3, 35e3),
        *_case_samples("vswitch-64", Case("idle", "software", 64), 0.2),
        *_case_samples("ovs", Case("idle", "software", 64), 100.0),
        *_case_samples("vswitch", tso, 200e3),
        *_case_samples("memcpy", tso, 240e3),
        *_case_samples("vswitch", Case("tap-out", "host", 64), 2e6),
        *_case_samples("ovs-tap", Case("tap-out", "host", 64), 1e6),
        *_case_samples("vswitch", Case("tap-in", "host", 64), 1e6),
        *_case_samples("ovs-tap", Case("tap-in", "host", 64), 0.5e6),
        *_case_samples("vswitch", Case("tap-in", "host-afp", 64), 1e6),
        *_case_samples("ovs-afp", Case("tap-in", "host-afp", 64), 1.5e6),
        *_case_samples("vswitch", Case("flood", "software", 64), 40e6),
        *_case_samples("vswitch", Case("spread", "software", 64), 20e6),
        *_case_samples("vswitch", Case("fdb", "alone", 64, entries=10), 4.0),
        *_case_samples("vswitch", Case("fdb", "alone", 64, entries=1_000_000), 10.0),
        *_case_samples("vswitch", Case("startup", "alone", 1514), 0.4e9),
        *_case_samples("vswitch", Case("memory", "software", 64), 50e6),
    ]
    found = Found(summarise(samples))
    by_row = {goal.row: goal.judge(found) for goal in goals(TSO_FRAME_LEN)}
    assert by_row["64 B, split ring, near"].text == (
        "1.67 x: 20.00 M/s (vswitch, 7) against 12.00 M/s (testpmd, 7); "
        "the generator's ceiling is 40.00"
    )
    assert {row: outcome.verdict for row, outcome in by_row.items()} == {
        "64 B, split ring, near": "reached",
        "64 B, split ring, far": "not measured",
        "1500 B, split ring, near": "not measured",
        "1500 B, split ring, far": "not measured",
        "64 B, packed ring, near": "missed (only 3 samples)",
        "1500 B, packed ring, near": "not measured",
        "one frame in flight, busy polling": "reached",
        "first frame after idle": "missed",
        "CPU of an idle switch, 64 ports": "reached",
        "62 idle ports beside two busy ones": "missed",
        "flood to 32 ports": "reached",
        "64 KiB segments between guests": "reached",
        "TAP, 64 B, to the host": "reached",
        "TAP, 64 B, from the host": "missed",
        "TAP, 64 KiB segments, to the host": "not measured",
        "TAP, 64 KiB segments, from the host": "not measured",
        "1 million addresses learned": "missed",
        "two workers configured, one with work": "not measured",
        "start to first listening socket": "reached",
        "memory with 2 ports": "reached",
    }
    text = report.markdown(results(samples))
    assert "| first frame after idle | p99 <= 30 µs | p99 45.0 µs, median 30.0 µs; " in text
    assert "| a lookup, 1,000,000 addresses | vswitch | near | 10.00 ns | 7 |" in text
    assert "| vswitch | 200.0 | 104.4 (7) | 83% |" in text


def test_counters_of_perf() -> None:
    text = (
        "# started on Wed\n\n"
        "2600000000,,cycles:u,1000000000,100.00,,\n"
        "5200000000,,instructions,2000000000,100.00,2.0,insn per cycle\n"
        "<not counted>,,cache-misses,0,100.00,,\n"
        "17,,page-faults,1000000000,100.00,,\n"
    )
    assert counters.parse(text) == {"cycles": 2.6e9, "instructions": 2.6e9}
    assert counters.parse("<not supported>,,cycles,0,100.00,,\n") == {}
    counted = {"cycles": 130.0, "instructions": 260.0}
    samples = [replace(sample(20e6), counters=counted) for _ in range(3)]
    text = report.markdown(results(samples))
    assert "- vswitch: 64 B 130 cycles, 260 instructions." in text
    assert report.from_json(report.to_json(results(samples))).samples == samples


def test_cycles_without_perf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The time-stamp counter tells them too: a switch under load has no time for anything else."""
    run = results([sample(20e6), sample(5e6, switch="ovs"), sample(40e6, switch="null")])
    run.machine["cycle_hz"] = 2_600_000_000
    text = report.markdown(run)
    assert "- vswitch: 64 B 130." in text
    assert "- OVS-DPDK: 64 B 520." in text
    assert "- no switch" not in text
    perf = tmp_path / "perf"
    perf.write_text("#!/bin/sh\necho '<not supported>,,cycles,0,100.00,,' >&2\n")
    perf.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(MissingError, match="perf counts no cycles on this machine"):
        counters.check()
    perf.write_text("#!/bin/sh\necho 'No permission' >&2; exit 1\n")
    with pytest.raises(MissingError, match="perf failed: No permission"):
        counters.check()


def test_counting_beside_a_switch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What stands for perf writes when it is interrupted, as perf does."""
    perf = tmp_path / "perf"
    perf.write_text(
        "#!/bin/sh\nout=$4\n"
        "trap 'echo 3000,,cycles,1000000000,100.00,, >$out; exit' INT\n"
        "touch $out.ready\nwhile :; do sleep 0.01; done\n"
    )
    perf.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda **_: nullcontext(tmp_path))
    # A shell cannot trap what its parent ignores, as a shell's background jobs do.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with counters.counting(os.getpid()) as counts:
            while not (tmp_path / "perf.ready").exists():
                time.sleep(0.001)  # between two looks
    finally:
        signal.signal(signal.SIGINT, before)
    assert counts == {"cycles": 3000.0}


def test_lines_of_the_plot() -> None:
    long = Case("rate", "software", 1500)
    samples = [
        sample(20e6), sample(10e6, case=long), sample(30e6, case=long, switch="null"),
        sample(4e6, probes=(400, 400)), sample(9e6, case=Case("rate", "testpmd", 64)),
        sample(9e6, case=Case("rate", "software", 64, "packed")),
    ]  # fmt: skip
    assert plot.lines(summarise(samples)) == ("near", {"vswitch": [(64, 20.0), (1500, 10.0)]})
    assert plot.lines(summarise(samples[:1])) == (None, {})
    assert plot.lines([]) == (None, {})


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summaries = summarise([sample(20e6), sample(10e6, case=Case("rate", "software", 1500))])
    assert not plot.draw([], TITLES, tmp_path / "none.svg")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _name: None)
        with pytest.raises(MissingError, match="matplotlib is not installed"):
            plot.draw(summaries, TITLES, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
    assert plot.draw(summaries, TITLES, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


@pytest.mark.root("makes TAP interfaces")
def test_frames_to_and_from_the_host() -> None:
    wanted = {(case.kind, case.frame_len) for case in cases_of("host", ())}
    assert len(wanted) == 4

    def measure(seconds: float) -> bool:
        settings = Settings(samples=1, seconds=seconds, switches=("vswitch",), generators=("host",))
        run = Runner(settings, lambda _line: None).run()
        assert run.failures == []
        got = {(one.case.kind, one.case.frame_len) for one in run.samples if one.reading.value > 0}
        return got == wanted

    assert something(measure)
    assert setup_of(Case("tap-in", "host", TSO_FRAME_LEN)) == Setup(
        1514, True, ports=1, uplink=True
    )


def test_from_host_refuses() -> None:
    with SoftwareGuest("52:54:00:00:00:01") as guest:
        guest.build_offline(DEFAULT_FEATURES)
        sending = Flow(guest.transmitqs[0], None, [bytes(64)])
        with pytest.raises(ValueError, match="a receiveq and a window are needed"):
            from_host(sending, 0, bytes(64), 0.1, 1)
        receiving = Flow(None, guest.receiveqs[0], [bytes(64)])
        with Path(os.devnull).open("rb") as file, pytest.raises(OSError, match="non-socket"):
            from_host(receiving, file.fileno(), bytes(64), 0.1, 1)
