"""The hand-over between threads, exhaustively, with spin: it holds, and each fence is needed.

Models of what engine.pyx, worker.pyx, loop.pxd, split.pxd and events.pxd do, by hand, under
x86-TSO.
docs/architecture.md says what they cover and what not.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent

HOLDS = [
    ("publish", ()),
    ("kicks", ()),
    ("kicks", ("FLAGS",)),
    ("events", ()),
]
BREAKS = [
    ("publish", ("NO_FENCE_PUBLISH",)),
    ("publish", ("NO_FENCE_LOOP",)),
    ("publish", ("NO_FENCE_SLEEP",)),
    ("publish", ("NO_FENCE_WAKE",)),
    ("kicks", ("NO_FENCE_DRIVER",)),
    ("kicks", ("NO_FENCE_ARM",)),
    ("kicks", ("NO_FENCE_DRIVER", "FLAGS")),
    ("kicks", ("NO_FENCE_ARM", "FLAGS")),
    ("events", ("NO_FENCE_POST",)),
    ("events", ("NO_FENCE_ARM",)),
    ("events", ("UNORDERED_WRITE",)),
]


def check(model: str, defines: tuple[str, ...], folder: Path) -> tuple[int, str]:
    """Number of errors found in the whole state space, and what spin says of it."""
    options = [f"-D{name}" for name in defines]
    source = HERE / f"{model}.pml"
    run = subprocess.run(
        ["spin", "-a", *options, str(source)], cwd=folder, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    subprocess.run(
        ["gcc", "-O2", "-w", "-DSAFETY", "-DVECTORSZ=2048", "-o", "pan", "pan.c"],
        cwd=folder, check=True,
    )  # fmt: skip
    run = subprocess.run(["./pan", "-m200000"], cwd=folder, capture_output=True, text=True)
    text = run.stdout + run.stderr
    assert "Search not completed" not in text or "errors: 1" in text, text
    assert "max search depth too small" not in text, text
    return int(text.split("errors: ")[1].split()[0]), text


@pytest.mark.parametrize(("model", "defines"), HOLDS)
def test_it_holds(model: str, defines: tuple[str, ...], tmp_path: Path) -> None:
    errors, text = check(model, defines, tmp_path)
    assert errors == 0, text
    # Everything that the model says happens somewhere; threads that go on for ever have no end.
    unreached = [line for line in text.splitlines() if ", state " in line and '"-end-"' not in line]
    assert not unreached


@pytest.mark.slow
def test_more_views_than_places(tmp_path: Path) -> None:
    errors, text = check("publish", ("PUBLISHES=4",), tmp_path)
    assert errors == 0, text


@pytest.mark.slow
@pytest.mark.parametrize(("model", "defines"), BREAKS)
def test_each_fence_is_needed(model: str, defines: tuple[str, ...], tmp_path: Path) -> None:
    errors, text = check(model, defines, tmp_path)
    assert errors > 0, text
