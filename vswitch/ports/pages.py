"""What a list has, a page of it at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from vswitch.api import PAGE_MAX, Page

Row = TypeVar("Row")
T = TypeVar("T")


def page(
    rows: Iterable[tuple[int, Row]], after: int, most: int, one: Callable[[Row], tuple[T, int]]
) -> Page[T]:
    """What `one` makes of each row whose number is above `after`; rows come by their numbers.

    It also says what that weighs: a page is full with `most` of them, or PAGE_MAX of weight.
    """
    items: list[T] = []
    room = PAGE_MAX
    last = after
    for number, row in rows:
        if number <= after:
            continue
        if room <= 0 or len(items) == most:
            return Page(items, last)
        item, weight = one(row)
        items.append(item)
        room -= weight
        last = number
    return Page(items, None)
