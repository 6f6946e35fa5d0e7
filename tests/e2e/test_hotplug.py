"""Ports come and go while others forward."""

from __future__ import annotations

from tests.e2e.testbed import NAMES, NETWORK, Testbed, pinging, pings_until_answered, wait_until
from vswitch.lab.guest import SoftwareGuest


def test_ports_come_and_go_while_others_forward(testbed: Testbed) -> None:
    vm1, vm2 = testbed.require("vm1", "vm2")
    path = testbed.socket("hot")
    with pinging(vm1, vm2):
        for _ in range(5):
            testbed.ctl("add-port", "hot", path)
            with SoftwareGuest("52:54:00:77:00:aa", f"{NETWORK}.100") as guest:
                guest.connect(path)
                assert guest.ping(vm1.ip)
                assert testbed.fdb()["52:54:00:77:00:aa"] == "hot"
                testbed.ctl("del-port", "hot")
            assert not path.exists()
            assert "52:54:00:77:00:aa" not in testbed.fdb()


def test_a_link_that_is_set_down_and_up(testbed: Testbed) -> None:
    """The guest keeps its carrier: QEMU has no way to be told. See docs/cli.md."""
    vm1, vm2, vm3 = testbed.require(*NAMES)
    assert vm3.ping(vm1.ip)
    with pinging(vm1, vm2):
        assert testbed.ctl("set-link", "vm3", "down")["link"] == "down"
        assert not vm3.ping(vm1.ip, timeout_s=1)
        assert not vm1.ping(vm3.ip, timeout_s=1)
        assert vm3.carrier()
        assert testbed.ctl("stats", "vm3")[0]["drops"]["link-down"] > 0
        assert testbed.ctl("set-link", "vm3", "up")["link"] == "up"
        pings_until_answered(vm3, vm1.ip)
    assert vm1.ping(vm3.ip, count=3)


def test_port_of_a_running_guest_is_deleted_and_added_again(testbed: Testbed) -> None:
    vm1, vm2, vm3 = testbed.require(*NAMES)
    with pinging(vm1, vm2):
        testbed.ctl("del-port", "vm3")
        assert testbed.ctl_refused("show", "vm3").code == "not-found"
        wait_until("vm3 sees the link go", lambda: not vm3.carrier())
        assert not vm3.ping(vm1.ip, timeout_s=1)
        testbed.ctl("add-port", "vm3", testbed.socket("vm3"))
        testbed.wait_state("vm3", "ready")
        wait_until("vm3 sees the link come back", vm3.carrier)
    pings_until_answered(vm3, vm1.ip)
    assert vm2.ping(vm3.ip, count=3)
