"""What a frontend has mapped behind an IOMMU, kept in the plainest way: a list, and no tables.

Ranges are of the hostile guest's memory file, from a first byte to the one after the last.
"""

from __future__ import annotations

from tests.fuzz.bed import PLACES, Place

LAST = (1 << 64) - 1
"""The last I/O virtual address."""

Range = tuple[int, int]


def merged(ranges: list[Range]) -> list[Range]:
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def minus(ranges: list[Range], others: list[Range]) -> list[Range]:
    """What is in merged `ranges` and not in merged `others`."""
    found = []
    for start, end in ranges:
        for low, high in others:
            if high <= start or low >= end:
                continue
            if low > start:
                found.append((start, low))
            start = max(start, high)
        if start < end:
            found.append((start, end))
    return found


EVERYWHERE = [(place.file_offset, place.file_offset + place.size) for place in PLACES]


class Mappings:
    """What a frontend has mapped: rows of first and last I/O virtual address, where, and access."""

    def __init__(self, rows: list[tuple[int, int, int, int]], places: list[Place]) -> None:
        self.rows = rows
        self.places = places
        self._open: dict[int, list[Range]] = {}

    @staticmethod
    def offset(places: list[Place], uva: int, size: int) -> int | None:
        """File offset of memory that lies in one region, else None."""
        for place in places:
            if place.uva <= uva and uva + size <= place.uva + place.size:
                return place.file_offset + uva - place.uva
        return None

    def without(self, iova: int, last: int) -> Mappings:
        rows = []
        for row in self.rows:
            first, end, at, access = row
            if end < iova or first > last:
                rows.append(row)
                continue
            if first < iova:
                rows.append((first, iova - 1, at, access))
            if end > last:
                rows.append((last + 1, end, at + last + 1 - first, access))
        return Mappings(rows, self.places)

    def updated(self, iova: int, size: int, uva: int, access: int) -> Mappings | None:
        """The same with another one; None for one that cannot be."""
        at = self.offset(self.places, uva, size)
        if size == 0 or iova + size - 1 > LAST or uva + size - 1 > LAST or at is None:
            return None
        found = self.without(iova, iova + size - 1)
        found.rows.append((iova, iova + size - 1, at, access))
        return found

    def invalidated(self, iova: int, size: int) -> Mappings:
        return self.without(iova if size else 0, min(iova + size - 1, LAST) if size else LAST)

    def unplugged(self, which: Place) -> Mappings:
        low, high = which.file_offset, which.file_offset + which.size
        rows = [row for row in self.rows if not low <= row[2] < high]
        return Mappings(rows, [place for place in self.places if place != which])

    def open_for(self, access: int) -> list[Range]:
        """Where in the file what is mapped with this access lies."""
        if access not in self._open:
            self._open[access] = merged(
                [(at, at + last - iova + 1) for iova, last, at, how in self.rows if how & access]
            )
        return self._open[access]
