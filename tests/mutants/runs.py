"""Test runs in the tree with the mutants: which files come by which, and which ones kill."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

MUTANTS_MAX = 4096
"""Bytes of the file in which reached mutants are marked: VS_MUTANTS_MAX of mutant.h."""
SLACK_S = 60.0
SLACK = 4
"""A run that takes this many times longer than without a mutant, and SLACK_S more, hangs."""


@dataclass(frozen=True)
class Baseline:
    """A file of tests without any mutant."""

    file: str
    seconds: float
    reached: tuple[int, ...]


def pytest(
    tree: Path, files: Sequence[str], environment: dict[str, str], patience_s: float | None
) -> tuple[bool, str]:
    """Whether all tests passed, and why not. A run that hangs is ended, with its children."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [
                *(tree / ".venv/bin/python", "-m", "pytest", "-x", "-q", "--tb=line"),
                *("-m", "not slow", "-p", "no:cacheprovider", *files),
            ],
            cwd=tree,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | environment,
        )
        try:
            code = process.wait(patience_s)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            _end(process)
        output.seek(0)
        lines = output.read().splitlines()
    said = next((line for line in lines if line.startswith(("E  ", "FAILED", "ERROR"))), "")
    return code == 0, "hung" if code == -1 else said or (lines[-1] if lines else "")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The session's processes: a test that was ended leaves its switch and its guests behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def baselines(tree: Path, files: Iterable[str], jobs: int) -> list[Baseline]:
    """Run each file by itself, without a mutant. Raises RuntimeError when a test fails."""

    def one(file: str) -> Baseline:
        with tempfile.NamedTemporaryFile() as marks:
            marks.truncate(MUTANTS_MAX)
            started = time.monotonic()
            passed, said = pytest(tree, [file], {"VSWITCH_REACHED": marks.name}, None)
            seconds = time.monotonic() - started
            if not passed and "deselected" not in said and "no tests ran" not in said:
                raise RuntimeError(f"{file} fails without a mutant: {said}")
            with mmap.mmap(marks.fileno(), MUTANTS_MAX) as view:
                reached = tuple(number for number, mark in enumerate(view[:]) if mark)
        print(f"{file}: {seconds:.1f} s, comes by {len(reached)} mutants", flush=True)
        return Baseline(file, round(seconds, 1), reached)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, files))


def save(path: Path, found: Sequence[Baseline]) -> None:
    path.write_text(json.dumps([asdict(one) for one in found], indent=1))


def load(path: Path) -> list[Baseline]:
    return [
        Baseline(one["file"], one["seconds"], tuple(one["reached"]))
        for one in json.loads(path.read_text())
    ]


def belonging(known: Sequence[Baseline], mutant: int, budget_s: float) -> list[Baseline]:
    """The files that come by a mutant, in the order in which they are worth trying.

    First those that are quick and come by few others: they are about it. Not more than fit in
    `budget_s`, but one at least.
    """
    fitting = sorted(
        (one for one in known if mutant in one.reached),
        key=lambda one: one.seconds * len(one.reached),
    )
    chosen: list[Baseline] = []
    left = budget_s
    for one in fitting:
        if not chosen or one.seconds <= left:
            chosen.append(one)
            left -= one.seconds
    return chosen


def killed_by(tree: Path, mutant: int, files: Sequence[Baseline]) -> tuple[str, str] | None:
    """The first file that a mutant does not survive and what it said, or None."""
    for one in files:
        patience_s = SLACK * one.seconds + SLACK_S
        passed, said = pytest(tree, [one.file], {"VSWITCH_MUTANT": str(mutant)}, patience_s)
        if not passed:
            return one.file, said
    return None
