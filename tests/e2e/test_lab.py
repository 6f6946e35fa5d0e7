"""What the other tests rely on: the guests' shell."""

from __future__ import annotations

from tests.e2e.testbed import Testbed
from vswitch.lab.qemu.accel import accelerator


def test_commands_arrive_while_background_jobs_end(testbed: Testbed) -> None:
    [vm1] = testbed.require("vm1")
    vm1.check("for number in $(seq 100); do (usleep ${number}0000) & done")
    for number in range(10):
        assert vm1.check(f"echo {number} # {'x' * 4000}", timeout_s=10) == f"{number}\n"


def test_a_guest_boots_on_a_busy_host(testbed: Testbed) -> None:
    """Whether its emulated timer ticks in time is not asked while it boots."""
    [vm1] = testbed.require("vm1")
    if accelerator(testbed.image) == "tcg":
        assert "no_timer_check" in vm1.check("cat /proc/cmdline").split()
        assert "doesn't work" not in vm1.check("dmesg")
