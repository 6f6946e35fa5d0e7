"""Measurements in tests: that something is measured, never how much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def something(measure: Callable[[float], Any]) -> Any:
    """What a measurement finds, given more time where other programs had the CPU all along."""
    for seconds in (0.05, 0.2, 0.8, 3.2, 12.8):
        if found := measure(seconds):
            return found
    return None
