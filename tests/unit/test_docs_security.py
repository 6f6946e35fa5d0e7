"""docs/security-cases.md names tests that exist, and no case is without one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security-cases.md").read_text()
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and "| cause |" not in line]


def test_each_case_names_a_test_that_exists() -> None:
    assert len(ROWS) > 30
    for row in ROWS:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4, row
        named = re.fullmatch(r"`(tests/\S+\.py)::(test_\w+)`", cells[3])
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
