"""What the conformance tests share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.running import RunningSwitch, Wire


@pytest.fixture(scope="module")
def run_dir() -> Iterator[Path]:
    """A directory with a path short enough for sockets (107 bytes is the limit)."""
    with tempfile.TemporaryDirectory(prefix="vswitch-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def switch(run_dir: Path) -> Iterator[RunningSwitch]:
    """`vswitch start` without ports, for all tests of a module."""
    running = RunningSwitch(run_dir)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def wire(switch: RunningSwitch) -> Iterator[Wire]:
    """Ports and guests of one test."""
    wire = Wire(switch)
    try:
        yield wire
    finally:
        wire.close()


@pytest.fixture
def start(run_dir: Path) -> Iterator[Callable[..., Wire]]:
    """Starts switches of their own with the `[switch]` settings given, for one test."""
    wires: list[Wire] = []

    def start(**settings: Any) -> Wire:
        wire = Wire(RunningSwitch(Path(tempfile.mkdtemp(dir=run_dir)), **settings))
        wires.append(wire)
        return wire

    try:
        yield start
    finally:
        for wire in wires:
            try:
                wire.close()
            finally:
                wire.switch.stop()
