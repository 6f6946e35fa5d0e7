"""The mutants of `make mutants`: where they are, what is changed, and how one is switched on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants import runs, tree
from tests.mutants.operators import mutants
from tests.mutants.sites import statements

SOURCE = '''"""What it is about."""

from libc.stdint cimport uint32_t

cdef enum:
    MOST = 64


cdef inline uint32_t lowest(uint32_t value) noexcept nogil:
    """Of a function nothing but its statements counts."""
    cdef uint32_t at = 0, end
    cdef uint32_t mask = value & 7
    if value > MOST and not (
        mask == 0
    ):
        return <uint32_t>(at + 1)
    value.count += 1
    vs_store_release32(&value.count, 2)
    return at


cdef class Thing:
    def __dealloc__(self):
        free(self.base)

    def first(self):
        self.called(1)
'''


def source(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "module.pxd"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def test_statements_are_those_of_functions(tmp_path: Path) -> None:
    found = {one.text: one.function for one in statements(source(tmp_path))}
    assert found == {
        "cdef uint32_t at = 0, end": "lowest",
        "cdef uint32_t mask = value & 7": "lowest",
        "if value > MOST and not (mask == 0):": "lowest",
        "return <uint32_t>(at + 1)": "lowest",
        "value.count += 1": "lowest",
        "vs_store_release32(&value.count, 2)": "lowest",
        "return at": "lowest",
        "self.called(1)": "Thing.first",
    }


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cdef uint32_t at = 0, end", []),  # which value would be whose?
        (
            "cdef uint32_t mask = value & 7",
            [f"cdef uint32_t mask = value {what}" for what in ("| 7", "& 8", "& 6")],
        ),
        (
            "if value > MOST and not (mask == 0):",
            [
                "if value >= MOST and not (mask == 0):",
                "if value > MOST or not (mask == 0):",
                "if value > MOST and  (mask == 0):",
                "if value > MOST and not (mask != 0):",
                "if value > MOST and not (mask == 1):",
                "if True:",
                "if False:",
            ],
        ),
        # The cast is none of the comparisons that it looks like.
        (
            "return <uint32_t>(at + 1)",
            ["return <uint32_t>(at - 1)", "return <uint32_t>(at + 2)"],
        ),
        ("value.count += 1", ["value.count -= 1", "value.count += 2", ""]),
        ("vs_store_release32(&value.count, 2)", []),  # the models'
        ("self.called(1)", ["self.called(2)", ""]),
    ],
)
def test_operators(tmp_path: Path, text: str, wanted: list[str]) -> None:
    (statement,) = [one for one in statements(source(tmp_path)) if one.text == text]
    assert sorted(one.text for one in mutants(statement)) == sorted(wanted)


def test_each_is_behind_a_switch_and_nothing_else_has_changed(tmp_path: Path) -> None:
    path = source(tmp_path)
    chosen = [made[0] for one in statements(path) if (made := mutants(one))]
    text = tree.instrumented(SOURCE, list(enumerate(chosen)))
    for number in range(len(chosen)):
        assert f"vs_mutated({number})" in text
    assert text.count(tree.IMPORT) == 1
    assert "    cdef uint32_t mask = (value | 7) if vs_mutated(0) else (value & 7)\n" in text
    condition = "(vs_mutated(1) and (value >= MOST and not (mask == 0)))"
    assert f"    if {condition} or (not vs_mutated(1) and (value > MOST" in text
    assert "    vs_store_release32(&value.count, 2)\n    return at\n" in text
    assert tree.instrumented(SOURCE, []) == SOURCE.replace(
        "from libc", tree.IMPORT + "from libc", 1
    )


def test_the_files_that_are_about_a_mutant_come_first() -> None:
    known = [
        runs.Baseline("broad", 4.0, tuple(range(50))),
        runs.Baseline("narrow", 5.0, (1, 7)),
        runs.Baseline("long", 300.0, (7,)),
        runs.Baseline("other", 1.0, (2,)),
    ]
    assert [one.file for one in runs.belonging(known, 7, 120.0)] == ["narrow", "broad"]
    assert [one.file for one in runs.belonging(known, 7, 1000.0)] == ["narrow", "broad", "long"]
    assert runs.belonging(known, 60, 120.0) == []
