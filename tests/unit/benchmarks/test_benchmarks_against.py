"""`python -m benchmarks --against`: the statistics, the builds, and one very short run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import __main__ as program
from benchmarks import against, revisions
from benchmarks.errors import BenchmarkError
from benchmarks.revisions import Build, Revision
from benchmarks.samples import Case, Reading, Sample

CASE = Case("rate", "software", 64)
PACKED = Case("rate", "software", 64, "packed")


def sample(switch: str, value: float, ns: float = 90.0, waited: float = 0.0) -> Sample:
    return Sample(CASE, switch, Reading(value), ns, ns, waited)


@pytest.mark.parametrize(
    ("count", "left_out"),
    # How many values a sign test leaves out at each end: 2 P(B(n, 1/2) < k) <= 5 %.
    [(6, 0), (8, 0), (9, 1), (12, 2), (15, 3), (25, 7), (50, 17)],
)
def test_interval_of_a_median(count: int, left_out: int) -> None:
    values = [float(n) for n in range(count, 0, -1)]
    assert against.interval(values) == (1.0 + left_out, float(count - left_out))


def test_too_few_for_an_interval() -> None:
    assert against.interval([]) is None
    assert against.interval([1.0] * (against.FEWEST_PAIRS - 1)) is None
    assert against.interval([1.0] * against.FEWEST_PAIRS) == (1.0, 1.0)


def test_what_makes_a_pair() -> None:
    samples = [
        sample("old", 10), sample("new", 20),
        sample("new", 30), sample("old", 10),
        sample("old", 10), sample("new", 1, waited=0.5),
        sample("old", 10), sample("new", 1, ns=300.0),
        sample("new", 50), sample("new", 40), sample("old", 10),
        sample("old", 0), sample("new", 1),
    ]  # fmt: skip
    assert [turn.ratio for turn in against.pairs_of(samples, CASE)] == [2, 3, 4]
    assert list(against.pairs_of(samples, PACKED)) == []


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.0] * 15, "costs nothing"),
        ([0.99] * 12 + [0.5] * 3, "costs nothing"),
        ([0.99] * 11 + [0.5] * 4, "not shown"),
        ([0.97] * 15, "slower"),
        ([1.0] * 5, "too few pairs"),
    ],
)
def test_verdicts(ratios: list[float], verdict: str) -> None:
    samples = []
    for ratio in ratios:
        samples += [sample("old", 100.0), sample("new", 100.0 * ratio)]
    (row,) = against.compare(samples)
    assert row.verdict == verdict
    assert (row.pairs, row.place, row.old) == (len(ratios), "near", 100.0)


def test_classes_are_apart() -> None:
    samples = [sample("old", 10), sample("new", 10)]
    samples += [sample("old", 10, ns=300.0), sample("new", 20, ns=300.0)]
    rows = against.compare(samples)
    assert [(row.place, row.ratio) for row in rows] == [("near", 1.0), ("far", 2.0)]


def git(root: Path, *arguments: str) -> None:
    names = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "-C", str(root), *names, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With one commit, whose set-up fails."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "--quiet")
    (root / "setup.py").write_text("raise SystemExit('this one cannot be built')\n")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "one")
    return root


def test_revisions_by_name(repository: Path) -> None:
    head = revisions.find("HEAD", repository)
    assert len(head.commit) == 40
    # Nothing is changed: the working tree is that commit.
    assert revisions.find(revisions.WORKING_TREE, repository).commit == head.commit
    (repository / "setup.py").write_text("# better\n")
    changed = revisions.find(revisions.WORKING_TREE, repository)
    assert changed.commit != head.commit
    for wrong in ("nosuch", "--help", "HEAD^{tree}"):
        with pytest.raises(BenchmarkError, match="git knows no revision"):
            revisions.find(wrong, repository)


def test_a_revision_that_cannot_be_built(repository: Path, tmp_path: Path) -> None:
    builds = tmp_path / "builds"
    head = revisions.find("HEAD", repository)
    with pytest.raises(BenchmarkError, match=r"(?s)cannot be built:.*this one cannot be built"):
        revisions.build(head, repository, builds)
    assert list(builds.iterdir()) == []


def test_a_revision_is_built_once_and_sees_our_packages(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    (root / "vswitch").mkdir(parents=True)
    (root / "vswitch" / "__init__.py").write_text(
        "def main():\n    import msgpack\n    print(__file__, msgpack.__name__)\n"
    )
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "vswitch"\nversion = "0.0.1"\n'
        '[project.scripts]\nvswitch = "vswitch:main"\n'
        '[tool.setuptools]\npackages = ["vswitch"]\n'
    )
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "one")
    head = revisions.find("HEAD", root)
    built = revisions.build(head, root, tmp_path / "builds")
    ran = subprocess.run([built.program], capture_output=True, text=True, check=True, cwd=tmp_path)
    where, package = ran.stdout.split()
    # Its own vswitch, and not the one that is installed here beside the package that it shares.
    assert Path(where).is_relative_to(tmp_path / "builds" / head.commit)
    assert package == "msgpack"
    made = built.program.stat().st_mtime_ns
    assert revisions.build(head, root, tmp_path / "builds") == built
    assert built.program.stat().st_mtime_ns == made


def test_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole program, with this build on both sides; what it measures here says nothing."""
    ours = Path(sys.executable).with_name("vswitch")
    monkeypatch.setattr(revisions, "find", lambda name: Revision(name, "0" * 40))
    monkeypatch.setattr(revisions, "build", lambda revision: Build(revision, ours))
    arguments = ["--against", "v1", "--samples", "1", "--seconds", "0.05", "--frames", "64"]
    arguments += ["--generators", "software", "--out", str(tmp_path)]
    ran = CliRunner().invoke(program.main, arguments)
    assert ran.exit_code == 0, ran.output
    assert "old: v1 (0000000000), new: working tree (0000000000)" in ran.output
    (path,) = (tmp_path / "against").glob("*.json")
    data = json.loads(path.read_text())
    assert data["failures"] == data["skipped"] == []
    sides = [(one["case"]["ring"], one["switch"]) for one in data["samples"]]
    # Both rings, each side as often as the other, and by turns who is first.
    assert set(sides) == {(r, s) for r in ("split", "packed") for s in ("old", "new")}
    assert sides.count(("split", "old")) == sides.count(("split", "new"))
    assert sides[:2] == [("split", "old"), ("split", "new")]


@pytest.mark.parametrize("more", [["--switches", "vswitch"], ["--write-docs"], ["--quick"]])
def test_options_that_do_not_go_together(more: list[str]) -> None:
    ran = CliRunner().invoke(program.main, ["--against", "HEAD", *more])
    assert ran.exit_code == 2
    assert "--against goes with none of" in ran.output
