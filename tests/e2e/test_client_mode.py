"""QEMU creates the vhost-user socket (server=on) and the switch connects to it."""

from __future__ import annotations

from tests.e2e.testbed import Testbed, pinging, somebody_listens, wait_until


def test_qemu_listens_and_either_side_may_come_first(testbed: Testbed) -> None:
    vm1, vm2 = testbed.require("vm1", "vm2")
    path = testbed.socket("vm3")
    with testbed.in_place_of("vm3", listen=True) as vm3, pinging(vm1, vm2):
        # QEMU first: it waits for the switch before it boots the guest.
        vm3.start()
        wait_until("QEMU listens", lambda: somebody_listens(path))
        testbed.ctl("add-port", "--client", "vm3", path)
        vm3.wait_up()
        testbed.wait_state("vm3", "ready")
        assert vm3.ping(vm1.ip, count=3)
        assert testbed.show("vm3")["mode"] == "client"

        # The switch first: it tries again and again until QEMU is back.
        vm3.kill()
        testbed.wait_state("vm3", "connecting")
        wait_until("the port says what it waits for", lambda: testbed.show("vm3")["error"])
        vm3.start().wait_up()
        testbed.wait_state("vm3", "ready")
        assert vm3.ping(vm1.ip, count=3)
        assert vm2.ping(vm3.ip, count=3)
        # A QEMU that is being killed may still be connected to once.
        assert testbed.show("vm3")["connects"] >= 2
