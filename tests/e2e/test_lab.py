"""What the other tests rely on: the guests' shell."""

from __future__ import annotations

from testbed import Testbed


def test_commands_arrive_while_background_jobs_end(testbed: Testbed) -> None:
    [vm1] = testbed.require("vm1")
    vm1.check("for number in $(seq 100); do (usleep ${number}0000) & done")
    for number in range(10):
        assert vm1.check(f"echo {number} # {'x' * 4000}", timeout_s=10) == f"{number}\n"
