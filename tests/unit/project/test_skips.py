"""A skip counts as failed in CI, but for what the distribution has no package of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.distribution import why_missing

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("ci", [True, False])
@pytest.mark.parametrize("packaged", [True, False])
def test_what_cannot_be_installed_is_named_and_not_failed(
    tmp_path: Path, ci: bool, packaged: bool
) -> None:
    why = why_missing("the tool", packaged=packaged)
    (tmp_path / "test_one.py").write_text(
        f"import pytest\n@pytest.mark.skipif(True, reason={why!r})\ndef test_it(): ...\n"
    )
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-rs", "-p", "tests.conftest",
            "-c", os.devnull, "test_one.py",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "", "CI": str(ci).lower()},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert why in done.stdout
    assert "1 skipped" in done.stdout
    assert done.returncode == int(ci and packaged), done.stdout
    assert ("counts as failed" in done.stdout) == (ci and packaged)
