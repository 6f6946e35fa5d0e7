"""A look-up beside whoever empties and fills the same place of the FDB: every run there can be.

A model of fdb_insert, fdb_remove and fdb_read (fdb.pxd), by hand, under the rules of C11 for
relaxed, acquire and release accesses, which are weaker than any machine's. Writers hold a lock, so
theirs is one order of stores; a reader may see any store to a place that is not older than one it
knows of, and by an acquire load learns what the writer of a release store knew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

EMPTY = "empty"
KEY, VALUE = 0, 1
View = tuple[int, int]
"""The oldest store of each place that whoever has this may still see."""


@dataclass(frozen=True)
class Store:
    what: object
    view: View
    """What an acquire load of it teaches."""


@dataclass(frozen=True)
class Value:
    port: str
    round: int


class Entry:
    """All stores to one place of the table, in their order."""

    def __init__(self, weak: frozenset[str] = frozenset()) -> None:
        self.stores: tuple[list[Store], list[Store]] = (
            [Store(EMPTY, (0, 0))],
            [Store(Value("nobody's", 0), (0, 0))],
        )
        self._weak = weak
        self._known = [0, 0]

    def _store(self, place: int, what: object, release: bool) -> None:
        self._known[place] = len(self.stores[place])
        view = (self._known[0], self._known[1])
        if not release:
            # It teaches of itself only.
            view = (view[0], 0) if place == KEY else (0, view[1])
        self.stores[place].append(Store(what, view))

    def insert(self, key: str) -> None:
        last = self.stores[VALUE][-1].what
        assert isinstance(last, Value)
        round = last.round + ("no rounds" not in self._weak)
        self._store(VALUE, Value(f"{key}'s", round), "value" not in self._weak)
        self._store(KEY, key, "key" not in self._weak)

    def move(self, port: str) -> None:
        last = self.stores[VALUE][-1].what
        assert isinstance(last, Value)
        self._store(VALUE, Value(port, last.round), release=True)

    def remove(self) -> None:
        self._store(KEY, EMPTY, release=False)
        if "cleared" in self._weak:
            self._store(VALUE, Value("nobody's", 0), release=False)


def loads(
    entry: Entry, place: int, view: View, acquire: bool = True
) -> Iterator[tuple[object, View]]:
    """What a load may give, and what the reader knows then."""
    for at in range(view[place], len(entry.stores[place])):
        store = entry.stores[place][at]
        seen = (at, view[1]) if place == KEY else (view[0], at)
        if acquire:
            seen = (max(seen[0], store.view[0]), max(seen[1], store.view[1]))
        yield store.what, seen


def answers(entry: Entry, wanted: str, *, once_more: bool = True) -> set[str]:
    """The ports that a look-up of `wanted` may give."""
    found = set()
    for key, at_key in loads(entry, KEY, (0, 0)):
        if key != wanted:
            continue
        for value, at_value in loads(entry, VALUE, at_key):
            assert isinstance(value, Value)
            for again, at_again in loads(entry, KEY, at_value):
                if again != wanted:
                    continue
                for last, _ in loads(entry, VALUE, at_again, acquire=False):
                    assert isinstance(last, Value)
                    if last.round == value.round or not once_more:
                        found.add(value.port)
    return found


def replaced(entry: Entry) -> None:
    entry.insert("a")
    entry.remove()
    entry.insert("b")


def removed(entry: Entry) -> None:
    entry.insert("a")
    entry.remove()


def back_again(entry: Entry) -> None:
    replaced(entry)
    entry.remove()
    entry.insert("a")


def moved(entry: Entry) -> None:
    back_again(entry)
    entry.move("a's other")
    entry.remove()
    entry.insert("b")
    entry.move("b's other")


CASES = (removed, replaced, back_again, moved)


@pytest.mark.parametrize("case", CASES)
def test_a_look_up_gives_a_port_of_that_address_or_none(case: Callable[[Entry], None]) -> None:
    entry = Entry()
    case(entry)
    given = answers(entry, "a")
    assert "a's" in given  # an old answer is one
    assert given <= {"a's", "a's other"}


@pytest.mark.parametrize(
    ("weak", "case", "wrong"),
    [
        ({"cleared"}, removed, "nobody's"),  # as it was: port 0
        ({"value"}, replaced, "b's"),
        ({"key"}, removed, "nobody's"),
        ({"no rounds"}, back_again, "b's"),
    ],
)
def test_each_order_is_needed(weak: set[str], case: Callable[[Entry], None], wrong: str) -> None:
    entry = Entry(frozenset(weak))
    case(entry)
    assert wrong in answers(entry, "a")


def test_the_round_is_needed_once_more() -> None:
    entry = Entry()
    back_again(entry)
    assert "b's" in answers(entry, "a", once_more=False)
