"""Wrong command lines of QEMU: the switch says what is wrong, and the others keep forwarding."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.testbed import Testbed, pinging, somebody_listens, wait_until


def test_guest_memory_without_share_on(testbed: Testbed) -> None:
    vm1, vm2 = testbed.require("vm1", "vm2")
    with testbed.in_place_of("vm3", share=False) as vm3, pinging(vm1, vm2):
        logged = testbed.log_len()
        testbed.ctl("add-port", "vm3", testbed.socket("vm3"))
        vm3.start().wait_up()
        wait_until(
            "the switch says so in its log", lambda: "share=on" in testbed.logged_after(logged)
        )
        assert "port vm3: the guest's memory is not shared" in testbed.logged_after(logged)
        shown = testbed.show("vm3")
        assert "share=on" in (shown["warning"] or shown["error"])
        assert not vm3.ping(vm1.ip, timeout_s=1)
        for other in ("vm1", "vm2"):
            assert testbed.show(other)["warning"] is None
    # The same port with a good command line.
    (vm3,) = testbed.require("vm3")
    assert vm3.ping(vm1.ip, count=3)
    assert testbed.show("vm3")["warning"] is None


def test_both_ends_listen_and_qemu_was_first(testbed: Testbed) -> None:
    path = testbed.socket("vm3")
    vm1, vm2 = testbed.require("vm1", "vm2")
    with testbed.in_place_of("vm3", listen=True) as vm3, pinging(vm1, vm2):
        vm3.start()
        wait_until("QEMU listens", lambda: somebody_listens(path))
        refusal = testbed.ctl_refused("add-port", "vm3", path)
        assert refusal.code == "socket"
        assert str(path) in refusal.message
        # As ps calls it; that of Debian 13 is started by a dynamic linker of its own.
        name = Path(f"/proc/{vm3.pid}/comm").read_text().strip()
        assert f"process {vm3.pid} ({name}" in refusal.message
        assert "--client" in refusal.hint
        # What the hint says helps.
        testbed.ctl("add-port", "--client", "vm3", path)
        with testbed.client() as client:
            wait_until("QEMU is connected", lambda: client.port("vm3")["connects"] == 1)


def test_both_ends_listen_and_the_switch_was_first(testbed: Testbed) -> None:
    vm1, vm2 = testbed.require("vm1", "vm2")
    with testbed.in_place_of("vm3", listen=True) as vm3, pinging(vm1, vm2):
        logged = testbed.log_len()
        testbed.ctl("add-port", "vm3", testbed.socket("vm3"))
        vm3.start()  # QEMU removes the switch's socket and puts its own there.
        wait_until("the port says so", lambda: testbed.show("vm3")["error"])
        assert "both ends listen" in testbed.show("vm3")["error"]
        assert "port vm3: " in testbed.logged_after(logged)
        assert "both ends listen" in testbed.logged_after(logged)


def test_both_ends_connect(testbed: Testbed) -> None:
    vm1, vm2 = testbed.require("vm1", "vm2")
    path = testbed.socket("vm3")
    with testbed.in_place_of("vm3") as vm3, pinging(vm1, vm2):
        logged = testbed.log_len()
        testbed.ctl("add-port", "--client", "vm3", path)
        vm3.start()
        testbed.wait_state("vm3", "connecting")
        wait_until("the port says so", lambda: testbed.show("vm3")["error"])
        assert "server=on" in testbed.show("vm3")["error"]
        wait_until("the log says so", lambda: "server=on" in testbed.logged_after(logged))
        # One end listens: QEMU, which tries every second, finds it.
        testbed.ctl("del-port", "vm3")
        testbed.ctl("add-port", "vm3", path)
        with testbed.client() as client:
            wait_until("QEMU is connected", lambda: client.port("vm3")["connects"] == 1)


STARTS = "does not get past its start: it wants more than 1 queue pair (QEMU: queues=N"
RAN = "tries again now and then: its guest's device was made when the port offered more"
"""What is told of frontends that look and leave: never the one instead of the other."""


@pytest.mark.parametrize("first", ["port", "qemu"])
def test_qemu_wants_more_queue_pairs_than_the_port_has(testbed: Testbed, first: str) -> None:
    """It tries again without a pause, hundreds of times a second if it is let."""
    vm1, vm2 = testbed.require("vm1", "vm2")
    with testbed.in_place_of("vm3", queues=4) as vm3, pinging(vm1, vm2):
        logged = testbed.log_len()
        if first == "qemu":
            vm3.start()
        testbed.ctl("add-port", "vm3", testbed.socket("vm3"))
        if first == "port":
            vm3.start()
        wait_until("the port says so", lambda: STARTS in (testbed.show("vm3")["error"] or ""))
        assert "asking more queues than supported: 1" in vm3.qemu_log.read_text()
        # It is in a loop by now: what it does five times more is not in the log.
        so_far = testbed.show("vm3")["connects"]
        wait_until("it goes on", lambda: testbed.show("vm3")["connects"] >= so_far + 5)
        said = [line for line in testbed.logged_after(logged).splitlines() if "port vm3:" in line]
        assert any(STARTS in line for line in said)
        assert not any(RAN in line for line in said)
        assert len(said) < 40
        # What it says helps.
        testbed.ctl("del-port", "vm3")
        testbed.ctl("add-port", "vm3", testbed.socket("vm3"), "--queues", 4)
        vm3.wait_up()
        testbed.wait_state("vm3", "ready")
        assert (testbed.show("vm3")["error"], testbed.show("vm3")["warning"]) == (None, None)


def test_the_port_comes_back_with_less(testbed: Testbed) -> None:
    """The guest's device has what the port had when it was made, and cannot do with less."""
    (vm1,) = testbed.require("vm1")
    whole = {"--queues": "2", "--mtu": "1500", "--offloads": "on"}
    path = testbed.socket("vm3")

    def port(**less: str) -> None:
        if "vm3" in {one["name"] for one in testbed.ctl("list-ports")}:
            testbed.ctl("del-port", "vm3")
        options = whole | {f"--{name}": value for name, value in less.items()}
        testbed.ctl("add-port", "vm3", path, *(word for pair in options.items() for word in pair))

    def complaint() -> str:
        shown = testbed.show("vm3")
        return (shown["error"] or shown["warning"] or "") if shown["connects"] else ""

    with testbed.in_place_of("vm3", queues=2, mtu=1500) as vm3:
        port()
        vm3.start().wait_up()
        for name, value, said in (
            ("offloads", "off", RAN),
            ("queues", "1", RAN),
            ("mtu", "1400", "NET_SET_MTU: MTU 1500 is more than the port's mtu, 1400"),
        ):
            testbed.wait_state("vm3", "ready")
            port(**{name: value})
            # Once is not enough to say why it came.
            wait_until("the port says so", lambda said=said: said in complaint())  # type: ignore[misc]
            assert STARTS not in complaint()
            assert not vm3.ping(vm1.ip, timeout_s=1)
            port()
            wait_until("the guest is back", lambda: vm3.ping(vm1.ip))
            assert complaint() == ""
