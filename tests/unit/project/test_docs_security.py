"""docs/security-cases.md names tests that exist, and no case is without one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "security-cases.md").read_text()
HEADERS = ("| CVE | cause |", "| for whom |")
ROWS = [
    line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(HEADERS)
]
LOOP = TEXT[TEXT.index("## What the event loop does") : TEXT.index("## Found here")]


def test_each_case_names_a_test_that_exists() -> None:
    assert len(ROWS) > 30
    for row in ROWS:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4, row
        named = re.fullmatch(r"`(tests/\S+\.py)::(test_\w+)(\[\w+\])?`", cells[3])
        assert named, row
        source = (ROOT / named[1]).read_text()
        assert re.search(rf"^def {named[2]}\(", source, re.MULTILINE), f"{cells[3]} is not there"


def test_each_known_cause_has_a_row() -> None:
    source = (ROOT / "tests" / "fuzz" / "test_known_causes.py").read_text()
    for name in re.findall(r"^def (test_\w+)\(", source, re.MULTILINE):
        assert f"::{name}`" in TEXT, name
        number = re.fullmatch(r"test_cve_(\d+)_(\d+)", name)
        if number:
            assert f"| CVE-{number[1]}-{number[2]}" in TEXT


def test_each_request_is_bounded() -> None:
    """Whoever adds one says what it costs the event loop."""
    source = (ROOT / "vswitch" / "vhost_user" / "backend.py").read_text()
    requests = re.findall(r"^ +Request\.(\w+): self\.", source, re.MULTILINE)
    assert len(requests) > 30
    for name in requests:
        assert re.search(rf"\b{name}\b", LOOP), name


def test_each_kind_of_hostility_has_a_row() -> None:
    source = (ROOT / "tests" / "conformance" / "hostile.py").read_text()
    kinds = re.findall(r"^def (\w+)\(path: Path.*\) -> Rounds:", source, re.MULTILINE)
    assert len(kinds) > 20
    named = set(re.findall(r"\[(\w+)\]`", LOOP))
    assert named == set(kinds)
