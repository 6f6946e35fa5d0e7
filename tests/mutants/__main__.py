"""`make mutants`: are the tests of the fast path worth anything? They are if they kill.

About 120 statements of the fast path, chosen by a seed, are each changed in one place by an
operator that is chosen likewise. All mutants are in one build, one of them on at a time by an
environment variable; each runs against the test files that come by it, which is found out first by
running every file once. What orders memory between threads is left to tests/model: an x86 does not
reorder it. Memory that is not freed is left to the sanitizers and the soak test.

Survivors are listed in survivors.toml beside this file, each with the reason why no test can or
need kill it.
"""

from __future__ import annotations

import os
import random
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from tests.mutants import runs, tree
from tests.mutants.operators import Mutant, mutants
from tests.mutants.sites import statements

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "mutants"
EXPLAINED = Path(__file__).with_name("survivors.toml")
FOLDERS = ("shared", "ring", "worker", "main")
TESTS = ("tests/unit", "tests/conformance", "tests/fuzz")


def candidates(only: str | None) -> list[list[Mutant]]:
    """All mutants that there can be, by statement."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / "vswitch/fastpath" / folder).glob("*.p*")):
            if path.suffix in {".pxd", ".pyx"}:
                found += [mutants(statement) for statement in statements(path)]
    if only is not None:
        found = [[one for one in some if only in one.name] for some in found]
    return [some for some in found if some]


def choose(count: int, seed: int, only: str | None) -> list[Mutant]:
    """Write a tree with that many mutants that Cython takes, and say which they are."""
    everything = candidates(only)
    chance = random.Random(seed)
    chance.shuffle(everything)
    spare = [chance.choice(some) for some in everything]
    chosen, spare = spare[:count], spare[count:]
    while True:
        tree.write(ROOT, WORK / "tree", enumerate(chosen))
        if not (bad := tree.refused(WORK / "tree", Path(sys.executable))):
            return chosen
        print(f"{len(bad)} of the mutants are not Cython; others take their place", flush=True)
        chosen = [one for number, one in enumerate(chosen) if number not in bad]
        chosen += spare[: len(bad)]
        spare = spare[len(bad) :]


def test_files() -> list[str]:
    return [
        str(path.relative_to(WORK / "tree"))
        for folder in TESTS
        for path in sorted((WORK / "tree" / folder).rglob("test_*.py"))
    ]


@click.command(help=__doc__)
@click.option("--count", default=120, show_default=True, help="Mutants.")
@click.option("--seed", default=1, show_default=True)
@click.option(
    "--only", help="Of those with this in their name: file, function, text before, text after."
)
@click.option(
    "--jobs", default=os.cpu_count() or 1, show_default=True, help="Test runs side by side."
)
@click.option("--budget", default=120.0, show_default=True, help="Seconds of tests for a mutant.")
@click.option("--files", multiple=True, help="Test files to try instead of all that come by it.")
def main(
    count: int, seed: int, only: str | None, jobs: int, budget: float, files: tuple[str, ...]
) -> None:
    started = time.monotonic()
    WORK.mkdir(parents=True, exist_ok=True)
    chosen = choose(count, seed, only)
    (WORK / "list.txt").write_text("".join(f"{n} {one.name}\n" for n, one in enumerate(chosen)))
    tree.build(WORK / "tree")
    known = runs.baselines(WORK / "tree", files or test_files(), jobs)
    runs.save(WORK / "mapping.json", known)

    def one(number: int) -> tuple[int, tuple[str, str] | None]:
        killer = runs.killed_by(WORK / "tree", number, runs.belonging(known, number, budget))
        print(
            f"{number} {'killed by ' + killer[0] if killer else 'SURVIVED'}: {chosen[number].name}",
            flush=True,
        )
        return number, killer

    with ThreadPoolExecutor(jobs) as pool:
        results = dict(pool.map(one, range(len(chosen))))
    survivors = [chosen[number] for number, killer in results.items() if killer is None]
    explained = tomllib.loads(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
    killed = len(chosen) - len(survivors)
    print(
        f"\n{killed} of {len(chosen)} mutants killed ({100 * killed / max(1, len(chosen)):.1f} %),"
        f" seed {seed}, in {(time.monotonic() - started) / 60:.0f} min"
    )
    unexplained = 0
    for mutant in survivors:
        why = explained.get(mutant.name)
        unexplained += why is None
        print(f"survived: {mutant.name}\n  {why or 'NOT EXPLAINED in ' + EXPLAINED.name}")
    sys.exit(unexplained > 0 or killed < 0.95 * len(chosen))


if __name__ == "__main__":
    main()
