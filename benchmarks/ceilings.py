"""What no switch on this machine can exceed, measured in turn with the switches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.generators import GAP_S, WARM_UP, reading_of_times
from benchmarks.guests import (
    TSO_BUF_LEN,
    TSO_FRAME_LEN,
    TSO_QUEUE_SIZE,
    TSO_RX_QUEUE_SIZE,
    frames_under_way,
)
from benchmarks.native.ceilings import copies, wakeups
from benchmarks.samples import Kind, Reading
from vswitch.lab.guest.shapes import MAX_HEADER_LEN


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A measurement without a switch: of one kind of case, with the helper on the switch's CPU."""

    name: str
    title: str
    kind: Kind
    run: Callable[[int, float], Reading]


def _wakeup(cpu: int, seconds: float) -> Reading:
    wakeups(cpu, seconds * WARM_UP, gap_s=GAP_S)
    return reading_of_times(wakeups(cpu, seconds, gap_s=GAP_S))


def _memcpy(cpu: int, seconds: float) -> Reading:
    """As many places and pieces, of the same sizes, as the rings of the two guests have."""
    rate = copies(
        cpu,
        seconds,
        MAX_HEADER_LEN + TSO_FRAME_LEN,
        slots=TSO_QUEUE_SIZE,
        piece_len=TSO_BUF_LEN,
        pieces=TSO_RX_QUEUE_SIZE,
        window=frames_under_way(TSO_FRAME_LEN, TSO_BUF_LEN, TSO_RX_QUEUE_SIZE),
        warm_up_s=seconds * WARM_UP,
    )
    return Reading(rate)


CEILINGS: dict[str, Ceiling] = {
    one.name: one
    for one in (
        Ceiling("eventfd", "bare eventfd wake-up", "wakeup", _wakeup),
        Ceiling("memcpy", "memcpy alone", "tso", _memcpy),
    )
}
