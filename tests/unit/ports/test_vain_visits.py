"""Frontends that look at what a port offers and leave: what they want, by how they come back."""

from __future__ import annotations

import pytest

from vswitch.ports.diagnosis import AT_ONCE_S, IN_VAIN, SPACING_S, VainVisits

STARTS, RAN, UNKNOWN = "starts", "ran", "unknown"


def told(visits: VainVisits) -> str:
    wants_more = "wants more than 1 queue pair (QEMU: queues=N" in visits.why
    had_more = "its guest's device was made when the port offered more" in visits.why
    assert visits.why.startswith("the frontend looked at what the port offers and left")
    return {(True, False): STARTS, (False, True): RAN, (True, True): UNKNOWN}[wants_more, had_more]


def come(pids: list[int | None], gap_s: float) -> VainVisits:
    visits = VainVisits(1)
    for number, pid in enumerate(pids):
        came = 1000.0 + number * (0.01 + gap_s)
        visits.came_and_went(pid, came, came + 0.01)
    return visits


@pytest.mark.parametrize(
    ("pids", "gap_s", "what"),
    [
        ([7], 0.0, UNKNOWN),
        ([7, 7], 0.001, STARTS),
        ([7, 7], SPACING_S, STARTS),
        ([7, 7], AT_ONCE_S + 0.001, RAN),
        ([7, 7, 7], 1.0, RAN),
        # Each ends, and is started again after a while by whoever does that.
        ([7, 8, 9], 0.5, STARTS),
        ([7, 8, 9], 100.0, STARTS),
        # In another PID namespace, or the port connects itself: its pace tells nothing.
        ([None, None, None], 0.001, UNKNOWN),
        ([None, None, None], 1.0, UNKNOWN),
    ],
)
def test_what_is_told(pids: list[int | None], gap_s: float, what: str) -> None:
    assert told(come(pids, gap_s)) == what


def test_one_that_is_late_once_is_still_told_right() -> None:
    visits = come([7] * IN_VAIN, 0.001)
    visits.came_and_went(7, 2000.0, 2000.01)
    assert told(visits) == STARTS
    visits = come([7] * IN_VAIN, 1.0)
    visits.came_and_went(7, 1003.1, 1003.2)
    assert told(visits) == RAN


def test_how_many_queue_pairs_the_port_has() -> None:
    assert "more than 2 queue pairs (" in VainVisits(2).why
