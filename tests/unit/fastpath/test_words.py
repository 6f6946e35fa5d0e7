"""What is declared once is the same everywhere: the fast path's numbers, their words, bounds."""

from __future__ import annotations

import pytest

from vswitch import bounds
from vswitch.api import PortCounters, PortStats, WorkerInfo
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.shared import words

ALONE = {"MTU_MIN", "SUN_PATH_LEN_MAX", "PAGE_MAX"}
"""Nothing compiled has to know them."""


@pytest.mark.parametrize("table", [words.DROP_REASONS, words.RING_FAULTS])
def test_each_word_is_there_once_and_has_a_meaning(table: tuple[tuple[str, str], ...]) -> None:
    names = [name for name, _ in table if name]
    assert names
    assert len(set(names)) == len(names)
    assert all(bool(name) == bool(text) for name, text in table)


def test_a_row_in_the_place_of_another_is_found() -> None:
    assert words.rows(2, (0, "a", "x"), (1, "b", "y")) == (("a", "x"), ("b", "y"))
    assert words.rows(1, (0, "a")) == ("a",)
    for count, table in (
        (2, ((1, "b"), (0, "a"))),
        (2, ((0, "a"),)),
        (1, ((0, "a"), (1, "b"))),
        (2, ((0, "a"), (0, "b"))),
    ):
        with pytest.raises(ImportError, match="a row is missing"):
            words.rows(count, *table)


def test_the_counters_of_a_port_are_those_of_the_fast_path() -> None:
    engine = Engine()
    stats = engine.stats(engine.add_port("vm1"))
    assert list(stats) == [*PortCounters.__annotations__, "drops"]
    assert PortStats.__annotations__.keys() == {"name", "id", *stats}


def test_what_a_worker_counts_reaches_clients() -> None:
    (worker,) = Engine().workers
    assert worker.stats().keys() <= WorkerInfo.__annotations__.keys()


def test_bounds_are_those_of_the_fast_path() -> None:
    mine = {name: value for name, value in vars(bounds).items() if name.isupper()}
    assert {name: value for name, value in mine.items() if name not in ALONE} == words.BOUNDS
