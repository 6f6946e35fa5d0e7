"""The same hostile guests, with a worker that runs and a second CPU that rewrites their memory.

What is checked is what Bed checks, after the storm. When each store falls between two reads of the
switch is up to the machine: a case that failed once need not fail again.
"""

from __future__ import annotations

import array
import threading
import time
from random import Random
from typing import Any

from tests.fuzz import ringcases
from tests.fuzz.bed import Bed, Violation
from tests.native.scribble import scribble

DEADLINE_S = 60.0
STORES = 3000
ROUNDS = 4


class RacingBed(Bed):
    """A bed whose worker polls in a thread of its own, until `close`."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.Thread(target=self.worker.run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.worker.stop()
        self._thread.join(DEADLINE_S)
        if self._thread.is_alive():
            raise Violation("the worker did not stop")
        super().close()

    def turn(self, arm: bool = False) -> None:  # noqa: ARG002
        """Wait until the worker has given back what the bystanders sent."""
        deadline = time.monotonic() + DEADLINE_S
        for other in (self.left, self.right):
            while other.given_back() != other.sent & 0xFFFF:
                if time.monotonic() > deadline:
                    raise Violation(f"a frame of {other.name} was not taken")
                time.sleep(0)

    def drain(self) -> None:
        """Not while the hostile guest may be sending: their memory is looked at as a whole."""

    def _run(self, case: dict[str, Any]) -> None:
        super()._run(case)
        race = case["race"]
        for n in range(race["rounds"]):
            scribble(
                self.map,
                array.array("I", race["places"]),
                array.array("H", race["values"]),
                race["seed"] + n,
                race["stores"],
            )
            for op, *arguments in case["ops"]:
                if op == "start":
                    self._step(op, *arguments)


def make(seed: int) -> dict[str, Any]:
    """A case of `ringcases`, and where and what to rewrite while its rings run."""
    return racing(ringcases.make(seed), "races", seed)


def racing(case: dict[str, Any], kind: str, seed: int) -> dict[str, Any]:
    """A case with somebody who rewrites what its rings and frames are made of."""
    rng = Random(seed ^ 0x5EED)
    setups = [op[2] for op in case["ops"] if op[0] == "start"]
    places: list[int] = []
    for setup in setups:
        spots = [setup["avail"] + 2, setup["avail"], setup["used"] + 2]
        spots += [setup["avail"] + 4 + 2 * i for i in range(min(setup["size"], 8))]
        for i in range(min(setup["size"], 8)):
            row = setup["desc"] + 16 * i
            spots += [row, row + 8, row + 12, row + 14]
        for gpa in (ringcases.TABLES, ringcases.DATA, ringcases.DATA + ringcases.SLOT):
            spots += [gpa + 2 * i for i in range(16)]
        places += rng.sample(spots, min(len(spots), rng.choice([4, 12, 40])))
    offsets = [found[0] & ~1 for gpa in places if (found := Bed.offset(gpa)) and found[1] >= 2]
    case["kind"] = kind
    case["race"] = {
        "rounds": ROUNDS,
        "stores": STORES,
        "seed": seed,
        "places": offsets or [Bed.offset(0)[0]],  # type: ignore[index]
        "values": [
            *ringcases.U16, 0x2000, 0x2400, 0x7FF0, 600, 72, 64, 63, 4, 5, 6, 7, 8,
            rng.randrange(1 << 16),
        ],
    }  # fmt: skip
    return case
