"""The switch ends and comes back; QEMU (reconnect=1) finds it again, the guests go on."""

from __future__ import annotations

import pytest

from tests.e2e.testbed import Kind, Testbed, pings_until_answered, wait_until
from tests.e2e.transfer import Transfer

BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_traffic_resumes_after_a_restart(testbed: Testbed, how: str) -> None:
    guests = vm1, vm2 = testbed.require("vm1", "vm2")
    assert vm1.ping(vm2.ip)
    boots = [guest.check(BOOT_ID) for guest in guests]
    transfer = Transfer(vm1, vm2, 10_000_000, until_told=True)
    transfer.moves_on()

    if how == "SIGTERM":
        assert testbed.switch.stop() == 0
        assert not testbed.control.exists()
        assert not testbed.socket("vm1").exists()
    else:
        testbed.switch.kill()
        assert testbed.socket("vm1").exists()
    wait_until("the guests see the link go", lambda: not (vm1.carrier() or vm2.carrier()))
    assert transfer.under_way(), "the connection ended with the switch"
    testbed.switch.start()

    for guest in guests:
        testbed.wait_state(guest.name, "ready")
        wait_until(f"{guest.name} sees the link come back", guest.carrier)
    pings_until_answered(vm1, vm2.ip)
    assert vm2.ping(vm1.ip, count=10)
    transfer.moves_on()
    transfer.finish(100)
    assert [guest.check(BOOT_ID) for guest in guests] == boots


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("packed", "times"),
    [
        pytest.param(True, 3, id="packed"),
        pytest.param(True, 15, marks=pytest.mark.slow, id="packed, often"),
        pytest.param(False, 15, marks=pytest.mark.slow, id="split, often"),
    ],
)
def test_traffic_survives_a_killed_switch_again_and_again(
    testbed: Testbed, packed: bool, times: int
) -> None:
    """QEMU says a packed ring starts anew; what it has got to, the switch must know."""
    kind = Kind({"packed": packed})
    with testbed.kinds(vm2=kind, vm3=kind) as guests:
        boots = [guest.check(BOOT_ID) for guest in guests]
        for number in range(times):
            sender, receiver = guests if number % 2 else reversed(guests)
            assert sender.ping(receiver.ip)
            transfer = Transfer(sender, receiver, 10_000_000, until_told=True)
            assert receiver.ping(sender.ip)
            transfer.moves_on()
            testbed.switch.kill()
            wait_until("the guests see it", lambda: not any(one.carrier() for one in guests))
            assert transfer.under_way(), "the connection ended with the switch"
            testbed.switch.start()
            for guest in guests:
                testbed.wait_state(guest.name, "ready")
                wait_until(f"{guest.name} sees the link come back", guest.carrier)
            transfer.moves_on()
            transfer.finish(100)
            assert sender.ping(receiver.ip, count=5)
        assert [guest.check(BOOT_ID) for guest in guests] == boots
