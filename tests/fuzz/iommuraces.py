"""Hostile guests behind an IOMMU whose memory a second CPU rewrites, while a worker runs."""

from __future__ import annotations

import array
import threading
from typing import Any

from tests.fuzz.iommu import IommuBed
from tests.fuzz.mappings import Range
from tests.fuzz.races import RacingBed
from tests.native.scribble import scribble


class RacingIommuBed(RacingBed, IommuBed):
    """Memory that may be read is the guest's to change and not watched; what is covered, is."""

    def __init__(self) -> None:
        self._scribbled: list[Range] = []
        super().__init__()

    def _unwatched(self) -> list[Range]:
        return self._visible + self._scribbled

    def turn(self, arm: bool = False) -> None:
        RacingBed.turn(self, arm)
        with self._watched():
            self._hear()

    def _run(self, case: dict[str, Any]) -> None:
        for op, *arguments in case["ops"]:
            self._step(op, *arguments)
        race = case["race"]
        self._scribbled = [(at, at + 2) for at in race["places"]]
        for n in range(race["rounds"]):
            other = threading.Thread(
                target=scribble,
                args=(
                    self.map, array.array("I", race["places"]), array.array("H", race["values"]),
                    race["seed"] + n, race["stores"],
                ),
            )  # fmt: skip
            other.start()
            try:
                for op, *arguments in case["ops"]:
                    if op not in ("write", "send", "drain"):
                        self._step(op, *arguments)
            finally:
                other.join()
        self._scribbled = []
        self._come_to_rest()
