"""The cases of a run: which generator measures what, and what has to be started for it."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.alone import ALONE, ENTRIES
from benchmarks.generators import Generator, SoftwareGenerator, TestpmdGenerator
from benchmarks.guests import FLOOD_PORTS, TSO_FRAME_LEN
from benchmarks.host import HostBesideAfPacket, HostGenerator
from benchmarks.samples import Case, Kind, RingFormat, Setup
from benchmarks.switches import Switch

GENERATORS: dict[str, type[Generator]] = {
    one.name: one
    for one in (SoftwareGenerator, TestpmdGenerator, HostGenerator, HostBesideAfPacket)
}
SHORT_LEN = 64
"""Frame length of what is measured with one length only."""
PACKED_LENS = (64, 1500)
"""Frame lengths that are measured in packed rings too."""
STANDARD_LEN = 1514
_ONCE: tuple[Kind, ...] = ("latency", "wakeup", "idle", "memory", "flood", "spread")


def cases_of(generator: str, frames: Sequence[int]) -> list[Case]:
    """What this generator measures: rates for every frame length, the rest for one each."""
    if generator == ALONE:
        tables = [Case("fdb", ALONE, SHORT_LEN, entries=entries) for entries in ENTRIES]
        return [Case("startup", ALONE, STANDARD_LEN), *tables]
    if issubclass(GENERATORS[generator], HostGenerator):
        ways: tuple[Kind, ...] = ("tap-out", "tap-in")
        sizes = (SHORT_LEN, TSO_FRAME_LEN) if generator == HostGenerator.name else (SHORT_LEN,)
        return [Case(way, generator, size) for size in sizes for way in ways]
    kinds = GENERATORS[generator].kinds
    cases = [Case("rate", generator, length) for length in frames]
    cases += [
        Case("rate", generator, length, "packed") for length in frames if length in PACKED_LENS
    ]
    cases += [Case(kind, generator, SHORT_LEN) for kind in _ONCE if kind in kinds]
    return cases + ([Case("tso", generator, TSO_FRAME_LEN)] if "tso" in kinds else [])


def setup_of(case: Case) -> Setup:
    """What has to be started for a case; cases with equal setups are measured with one start.

    Apart from each other: buffers for long frames would slow the short ones down, and so may
    offloads. The software guests choose their rings' format anew for every sample.
    """
    longest = STANDARD_LEN if case.whole else max(STANDARD_LEN, case.frame_len)
    if case.kind in ("tap-out", "tap-in"):
        return Setup(longest, tso=case.whole, ports=1, uplink=True)
    ring: RingFormat = "split" if case.generator == SoftwareGenerator.name else case.ring
    ports = 1 + FLOOD_PORTS if case.kind in ("flood", "spread") else 2
    return Setup(longest, tso=case.whole, ring=ring, ports=ports)


def can(switch: type[Switch], generator: type[Generator], case: Case) -> bool:
    """Whether this case can be measured with these two."""
    if switch.software_guests_only and generator is not SoftwareGenerator:
        return False
    if not case.whole and case.frame_len > generator.max_frame_len:
        return False
    return case.kind in generator.kinds and switch.can(case)
