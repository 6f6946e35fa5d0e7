"""A guest moves to another QEMU on another port of the switch while it receives data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.testbed import Testbed, pings_until_answered, wait_until
from tests.e2e.transfer import Transfer
from vswitch.lab.errors import MachineError
from vswitch.lab.qemu.guest import Guest

# A pair of guests boots, one moves, and data moves: each wait has a limit of its own.
pytestmark = pytest.mark.timeout(300)

BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


def neighbours_know(testbed: Testbed, mac: str, port: str) -> None:
    wait_until(f"{mac} is behind {port}", lambda: testbed.fdb().get(mac) == port)


@pytest.mark.parametrize("how", ["announce", "rarp"])
def test_a_guest_moves_while_it_receives(testbed: Testbed, tmp_path: Path, how: str) -> None:
    """The switch says RARP for a guest whose driver cannot announce itself."""
    options = "guest_announce=off" if how == "rarp" else ""
    [vm1] = testbed.require("vm1")
    with (
        testbed.in_place_of("vm2", device_options=options) as source,
        testbed.in_place_of(
            "vm3",
            mac=testbed.settings("vm2").mac,
            ip=testbed.settings("vm2").ip,
            memory_backend=testbed.settings("vm2").memory_backend,
            device_options=options,
            incoming=True,
        ) as target,
    ):
        for name, guest in (("vm2", source), ("vm3", target)):
            testbed.ctl("add-port", name, testbed.socket(name))
            guest.start()
        source.wait_up()
        testbed.wait_state("vm2", "ready")
        testbed.wait_state("vm3", "connected")
        mac = source.settings.mac
        pings_until_answered(vm1, source.ip)
        neighbours_know(testbed, mac, "vm2")
        boot = source.check(BOOT_ID)
        log_len = testbed.log_len()
        transfer = Transfer(vm1, source, 60_000_000, until_told=True)
        assert "LOG_ALL" not in testbed.show("vm2")["feature_names"]
        transfer.moves_on()
        source.migrate_to(target, tmp_path / "migration.sock")
        transfer.goes_on_in(target)
        testbed.wait_state("vm3", "ready")
        neighbours_know(testbed, mac, "vm3")
        assert vm1.ping(target.ip, count=10)
        transfer.finish(100)
        assert target.check(BOOT_ID) == boot
        announced = f"port vm3: announcing {mac} (RARP)" in testbed.logged_after(log_len)
        assert announced == (how == "rarp")
        source.stop()
        assert vm1.ping(target.ip, count=3)


@pytest.mark.root("QEMU takes a userfaultfd")
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="split"),
        pytest.param({"packed": True}, id="packed", marks=pytest.mark.slow),
        pytest.param({"memory_backend": "shm"}, id="shm", marks=pytest.mark.slow),
        pytest.param({"queues": 2, "cpus": 2}, id="queues", marks=pytest.mark.slow),
        pytest.param({"memory_backend": "hugetlb"}, id="huge-pages", marks=pytest.mark.slow),
    ],
)
def test_a_guest_moves_before_its_memory(
    testbed: Testbed, tmp_path: Path, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Postcopy: it receives on, into buffers that are still on the other side."""
    if changes.get("memory_backend") == "hugetlb":
        request.getfixturevalue("huge_pages")
    [vm1] = testbed.require("vm1")
    kind: dict[str, Any] = {"memory_backend": "memfd"} | changes
    with (
        testbed.in_place_of("vm2", **kind) as source,
        testbed.in_place_of(
            "vm3",
            mac=testbed.settings("vm2").mac,
            ip=testbed.settings("vm2").ip,
            incoming=True,
            **kind,
        ) as target,
    ):
        for name, guest in (("vm2", source), ("vm3", target)):
            testbed.ctl("add-port", "--queues", kind.get("queues", 1), name, testbed.socket(name))
            guest.start()
        source.wait_up()
        testbed.wait_state("vm2", "ready")
        testbed.wait_state("vm3", "connected")
        pings_until_answered(vm1, source.ip)
        boot = source.check(BOOT_ID)
        log_len = testbed.log_len()
        transfer = Transfer(vm1, source, 20_000_000, until_told=True)
        transfer.moves_on()

        def it_receives() -> None:
            with testbed.client() as client:
                wait_until(
                    "the guest receives over there",
                    lambda: client.stats("vm3")[0]["egress_bytes"] > 100_000,
                )

        result = source.migrate_to(
            target, tmp_path / "migration.sock", before_its_memory=it_receives
        )
        assert "postcopy-active" in result.seen
        assert result.postcopy_requests > 0
        transfer.goes_on_in(target)
        transfer.finish(100)
        testbed.wait_state("vm3", "ready")
        assert target.check(BOOT_ID) == boot
        said = testbed.logged_after(log_len)
        began = said.index("port vm3: postcopy migration: the guest's memory comes while it runs")
        ended = re.search(r"port vm3: postcopy migration has ended, (\d+) pages were", said[began:])
        assert ended is not None
        assert int(ended[1]) > 0
        source.stop()
        assert vm1.ping(target.ip, count=3)


def test_memory_is_plugged_into_a_running_guest(testbed: Testbed) -> None:
    """What is received fills all memory, the plugged part too, and is as it was sent."""
    [vm1] = testbed.require("vm1")
    with testbed.in_place_of("vm2", memory_mib=160, max_memory_mib=512) as vm2:
        testbed.ctl("add-port", "vm2", testbed.socket("vm2"))
        vm2.start().wait_up()
        testbed.wait_state("vm2", "ready")
        pings_until_answered(vm1, vm2.ip)
        before = testbed.show("vm2")
        transfer = Transfer(vm1, vm2, 20_000_000, until_told=True)
        transfer.moves_on()
        vm2.plug_memory(256)
        # The region reaches the switch when the guest's firmware has enabled it.
        online = "for one in /sys/devices/system/memory/memory*/state; do echo online >$one; done"
        wait_until("the guest has its memory", lambda: memory_kib(vm2, online) > 300_000)
        after = testbed.show("vm2")
        assert len(after["memory"]) > len(before["memory"])
        assert after["connects"] == before["connects"]
        transfer.moves_on()
        transfer.finish(100)
        # Page cache and socket buffers come from the new memory, which is the larger part.
        Transfer(vm1, vm2, 30_000_000).finish()
        assert testbed.show("vm2")["state"] == "ready"
        assert vm1.ping(vm2.ip, count=5)


def memory_kib(guest: Guest, online: str) -> int:
    try:
        return int(guest.check(f"({online}) 2>/dev/null; grep MemTotal /proc/meminfo").split()[1])
    except MachineError:
        return 0
