"""No Cython file imports or declares a name that nobody uses.

cython-lint (in `make check`) finds variables of a function and imports of a .pyx. A .pxd it takes
for one whose names are all for others, and it looks at one file at a time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = sorted(
    path
    for folder in ("vswitch", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".pyx", ".pxd"}
)

_CIMPORT = re.compile(
    r"^from +[\w.]+ +c?import +(?:\(([^)]*)\)|([^\n(]+))|^c?import +([\w., ]+)", re.MULTILINE
)
_DEFINED = re.compile(
    r"^ *cdef (?:inline |public |readonly |packed )*"
    r"(?:(?:struct|union|class) (\w+)|(?!extern|enum|struct|union|class)[^\n=(]*?[ *](\w+)\()",
    re.MULTILINE,
)
_BLOCK = re.compile(
    r"^( *)cdef (?:extern from|enum|packed struct|struct|union)[^\n]*:\n((?:\1 +[^\n]*\n|\s*\n)+)",
    re.MULTILINE,
)
_DECLARED = re.compile(r" +(?:[\w.]+[ *]+)+(\w+) *(?:[(\[\"=,]|$)")
_MEMBER = re.compile(r" +(\w+) *(?:=[^,]*)?,? *$")


def code_of(text: str) -> str:
    """A file without comments and docstrings; C in a string is code."""

    def kept(match: re.Match[str]) -> str:
        return match[0] if re.search(r"#define|#include|;", match[0]) else '""'

    text = re.sub(r'"""(.*?)"""', kept, text, flags=re.DOTALL)
    return re.sub(r"#(?!define|include|if|endif|else|undef)[^\n]*", "", text)


def words(code: str) -> Counter[str]:
    return Counter(re.findall(r"\b[A-Za-z_]\w*\b", code))


def imported(code: str) -> Iterator[str]:
    """The names by which a file calls what it imports."""
    for match in _CIMPORT.finditer(code):
        for each in (match[1] or match[2] or match[3]).replace("\n", " ").split(","):
            if each.strip():
                yield each.split()[-1]


def declared(code: str) -> Iterator[str]:
    """Functions, structures and their fields, constants of enums, and what C is said to have."""
    for match in _DEFINED.finditer(code):
        yield match[1] or match[2]
    for match in _BLOCK.finditer(code):
        for line in match[2].splitlines():
            if "cdef" not in line and (found := _DECLARED.match(line) or _MEMBER.match(line)):
                yield found[1]


def unused(codes: dict[str, str], python: str) -> list[str]:
    """What nobody uses in any of these files, or in the stubs, which is `python`."""
    found = [
        f"{name}: {each} is imported"
        for name, code in codes.items()
        for each in imported(code)
        if "." not in each and words(code)[each] < 2
    ]
    everywhere = words("\n".join((*codes.values(), python)))
    places = Counter(each for code in codes.values() for each in declared(code))
    return found + [
        f"{each} is declared" for each, times in places.items() if everywhere[each] <= times
    ]


def test_every_name_is_used() -> None:
    codes = {str(path.relative_to(ROOT)): code_of(path.read_text()) for path in SOURCES}
    assert len({each for code in codes.values() for each in declared(code)}) > 800
    stubs = "\n".join(path.with_suffix(".pyi").read_text() for path in SOURCES if _has_stub(path))
    assert unused(codes, stubs) == []


def _has_stub(path: Path) -> bool:
    return path.suffix == ".pyx" and path.with_suffix(".pyi").exists()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("from libc.stdint cimport uint16_t, uint64_t\ncdef uint64_t n", "uint16_t is imported"),
        ("from a cimport (\n    b,\n    c as d,\n)\nb()\nc()", "d is imported"),
        ("cdef inline int helper(int a) noexcept nogil:\n    return a", "helper is declared"),
        ("cdef struct Row:\n    int field\ncdef Row row", "field is declared"),
        ("cdef enum:\n    LAST = 3\n", "LAST is declared"),
        ('cdef extern from "x.h":\n    int vs_call(int a) nogil\n', "vs_call is declared"),
        ('cdef extern from "x.h":\n    const int LIMIT\n', "LIMIT is declared"),
    ],
)
def test_a_name_without_a_use_is_found(text: str, wanted: str) -> None:
    (said,) = unused({"x.pxd": code_of(text)}, "")
    assert said.endswith(wanted)
