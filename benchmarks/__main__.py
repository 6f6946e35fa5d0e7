"""`python -m benchmarks`, which `make bench` runs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import click

from benchmarks import against, report, revisions
from benchmarks.alone import ALONE
from benchmarks.cases import GENERATORS
from benchmarks.errors import BenchmarkError, MissingError
from benchmarks.generators import SoftwareGenerator
from benchmarks.runner import TITLES, Runner, Settings
from benchmarks.samples import PLACES, UNITS, Kind, Place
from vswitch.errors import VswitchError
from vswitch.lab import programs
from vswitch.lab.qemu.process import sigterm_unwinds

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
DOCUMENT_RESULTS = ROOT / "docs" / "performance.json"
DOCUMENT_PICTURE = ROOT / "docs" / "performance.svg"
_DEFAULTS = Settings()
_QUICK = replace(
    _DEFAULTS, samples=1, seconds=0.1, frames=(64, 1500), kinds=("rate", "latency", "wakeup")
)
_AGAINST = Settings(samples=against.PAIRS, switches=(against.OLD, against.NEW), kinds=("rate",))
_MIN_FRAME_LEN = 64
_GENERATORS = (*GENERATORS, ALONE)


def _names(
    known: Collection[str],
) -> Callable[[object, object, str | None], tuple[str, ...] | None]:
    def parse(_context: object, _parameter: object, value: str | None) -> tuple[str, ...] | None:
        if value is None:
            return None
        names = tuple(value.split(","))
        for name in names:
            if name not in known:
                raise click.BadParameter(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def _numbers(_context: object, _parameter: object, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers like 64,1500") from error


@click.command(context_settings={"max_content_width": 100})
@click.option("--samples", type=click.IntRange(min=1), help="Samples that count, of each switch.")
@click.option("--seconds", type=click.FloatRange(min=0.01), help="Length of a sample.")
@click.option("--frames", callback=_numbers, help="Frame sizes in bytes, like 64,1500.")
@click.option("--switches", callback=_names(TITLES), help=f"Of {','.join(TITLES)}.")
@click.option("--generators", callback=_names(_GENERATORS), help=f"Of {','.join(_GENERATORS)}.")
@click.option("--cpus", callback=_numbers, help="The switch's CPU and the generator's, like 1,0.")
@click.option("--kinds", callback=_names(UNITS), help=f"Of {','.join(UNITS)}.")
@click.option(
    "--places", callback=_names(PLACES),
    help="Where so many samples are wanted, like near,far.  [default: in either]",
)  # fmt: skip
@click.option(
    "--add-to", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Go on with a run of the same commit: measure what its JSON file has too little of.",
)  # fmt: skip
@click.option(
    "--against", "old", metavar="REV",
    help="Build that revision and this one and measure them by turns, 15 pairs in one class.",
)  # fmt: skip
@click.option(
    "--revision", "new", metavar="REV", default=revisions.WORKING_TREE, show_default=True,
    help="With --against: which revision is the newer one.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="A few short samples: shows that it works, no more.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=RESULTS,
    help="Folder for the results.  [default: benchmarks/results]",
)  # fmt: skip
@click.option(
    "--write-docs", is_flag=True,
    help="Measure nothing: put the newest results of --out into docs/performance.md.",
)  # fmt: skip
def main(
    samples: int | None,
    seconds: float | None,
    frames: tuple[int, ...] | None,
    switches: tuple[str, ...] | None,
    generators: tuple[str, ...] | None,
    cpus: tuple[int, ...] | None,
    kinds: tuple[Kind, ...] | None,
    places: tuple[Place, ...] | None,
    add_to: Path | None,
    old: str | None,
    new: str,
    quick: bool,
    out: Path,
    write_docs: bool,
) -> None:
    """Measure vswitch beside other switches on this machine, or beside an older vswitch."""
    programs.only_installed()
    if old is not None and (switches or add_to or write_docs or quick):
        raise click.UsageError(
            "--against goes with none of --switches, --add-to, --quick and --write-docs"
        )
    base = _AGAINST if old is not None else _QUICK if quick else _DEFAULTS
    settings = Settings(
        samples=samples or base.samples,
        seconds=seconds or base.seconds,
        frames=frames or base.frames,
        switches=switches or base.switches,
        generators=generators or base.generators,
        cpus=cpus or (),
        kinds=kinds or base.kinds,
        places=places or (),
    )
    try:
        if old is not None:
            _compare(old, new, settings, out)
        elif write_docs:
            _write_docs(report.newest(out))
        else:
            _measure(settings, out, add_to)
    except VswitchError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


def _check_lengths(settings: Settings) -> None:
    for length in settings.frames:
        if not _MIN_FRAME_LEN <= length <= SoftwareGenerator.max_frame_len:
            raise BenchmarkError(f"frames of {length} bytes cannot be measured, 64 to 9000 can")


def _say(line: str) -> None:
    click.echo(line, err=True)


def _compare(old: str, new: str, settings: Settings, out: Path) -> None:
    """Whatever comes out is no failure: a number decides, and a person reads it."""
    _check_lengths(settings)
    sides = [revisions.find(old), revisions.find(new)]
    with sigterm_unwinds():
        builds = []
        for side in sides:
            _say(f"building {side.title}")
            builds.append(revisions.build(side))
        results = against.AgainstRunner(builds[0], builds[1], settings, _say).run()
    click.echo(against.markdown(results))
    _say(f"written to {against.write(results, out)}")


def _measure(settings: Settings, out: Path, add_to: Path | None) -> None:
    _check_lengths(settings)
    earlier = report.from_json(add_to.read_text()) if add_to else None
    with sigterm_unwinds():
        results = Runner(settings, _say, earlier).run()
    as_json, as_table = report.write(results, out)
    click.echo(report.markdown(results))
    try:
        report.picture(results, as_json.with_suffix(".svg"))
    except MissingError as error:
        click.echo(f"no plot: {error}", err=True)
    click.echo(f"written to {as_json} and {as_table}", err=True)


def _write_docs(source: Path) -> None:
    """The document and, beside it, the results that it shows."""
    results = report.from_json(source.read_text())
    if not report.picture(results, DOCUMENT_PICTURE):
        click.echo(f"{DOCUMENT_PICTURE.name} stays as it is: too few frame sizes", err=True)
    DOCUMENT.write_text(report.between_markers(DOCUMENT.read_text(), report.markdown(results)))
    shutil.copyfile(source, DOCUMENT_RESULTS)
    click.echo(f"{DOCUMENT.name} shows {source.name} now", err=True)


if __name__ == "__main__":
    main()
