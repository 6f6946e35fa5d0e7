"""The switch ends and comes back; QEMU (reconnect=1) finds it again, the guests go on."""

from __future__ import annotations

import pytest
from testbed import Testbed, Transfer, pings_until_answered, wait_until

BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_traffic_resumes_after_a_restart(testbed: Testbed, how: str) -> None:
    guests = vm1, vm2 = testbed.require("vm1", "vm2")
    assert vm1.ping(vm2.ip)
    boots = [guest.check(BOOT_ID) for guest in guests]
    transfer = Transfer(vm1, vm2, 20_000_000)

    if how == "SIGTERM":
        assert testbed.switch.stop() == 0
        assert not testbed.control.exists()
        assert not testbed.socket("vm1").exists()
    else:
        testbed.switch.kill()
        assert testbed.socket("vm1").exists()
    wait_until("the guests see the link go", lambda: not (vm1.carrier() or vm2.carrier()))
    assert transfer.under_way(), "the transfer was over before the switch was stopped"
    testbed.switch.start()

    for guest in guests:
        testbed.wait_state(guest.name, "ready")
        wait_until(f"{guest.name} sees the link come back", guest.carrier)
    pings_until_answered(vm1, vm2.ip)
    assert vm2.ping(vm1.ip, count=10, timeout_s=5)
    transfer.finish()
    assert [guest.check(BOOT_ID) for guest in guests] == boots
