"""sigbus.h, compiled alone; tests/conformance/test_switch_truncated_memory.py has it at work."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
FASTPATH = HERE.parents[2] / "vswitch" / "fastpath" / "sys"


def test_a_slot_that_is_used_again_is_never_read_half(tmp_path: Path) -> None:
    program = tmp_path / "slots"
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-Wno-unused-function", "-I", str(FASTPATH),
         str(HERE / "sigbus_slots.c"), "-o", str(program)],
        check=True,
    )  # fmt: skip
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")
