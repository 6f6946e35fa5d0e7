"""QEMU guests on one switch: ping, bulk TCP, reboot, crash."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from tests.e2e.testbed import NAMES, Testbed, pinging
from tests.e2e.transfer import Transfer

TRANSFER_LEN = 50_000_000


def test_two_guests_ping(testbed: Testbed) -> None:
    vm1, vm2 = testbed.require("vm1", "vm2")
    assert vm1.ping(vm2.ip, count=20)
    assert vm2.ping(vm1.ip, count=20)
    fdb = testbed.fdb()
    assert fdb[vm1.settings.mac] == "vm1"
    assert fdb[vm2.settings.mac] == "vm2"


def test_three_guests_ping_each_other(testbed: Testbed) -> None:
    guests = testbed.require(*NAMES)
    lost = [
        f"{source.name} -> {target.name}"
        for source, target in permutations(guests, 2)
        if not source.ping(target.ip, count=3)
    ]
    assert lost == []


@pytest.mark.parametrize(("name", "mapped"), [("vm1", "/memfd:"), ("vm2", "/dev/shm/")])
def test_guest_memory_of_both_kinds_is_mapped(testbed: Testbed, name: str, mapped: str) -> None:
    (guest,) = testbed.require(name)
    maps = Path(f"/proc/{testbed.switch.pid}/maps").read_text().splitlines()
    files = Path(f"/proc/{guest.pid}/maps").read_text().splitlines()
    inodes = {line.split()[4] for line in files if mapped in line}
    assert inodes, f"QEMU has no {mapped} mapped"
    assert inodes & {line.split()[4] for line in maps if mapped in line}
    (region, *_) = testbed.show(name)["memory"]
    assert region["size"] >= 64 << 20


@pytest.mark.parametrize(("source", "target"), [("vm1", "vm2"), ("vm2", "vm1")])
def test_tcp_transfer_arrives_unchanged(testbed: Testbed, source: str, target: str) -> None:
    sender, receiver = testbed.require(source, target)
    before = {stats["name"]: stats for stats in testbed.ctl("stats")}
    Transfer(sender, receiver, TRANSFER_LEN).finish()
    after = {stats["name"]: stats for stats in testbed.ctl("stats")}
    assert after[source]["ingress_bytes"] - before[source]["ingress_bytes"] >= TRANSFER_LEN
    assert after[target]["egress_bytes"] - before[target]["egress_bytes"] >= TRANSFER_LEN


def test_guest_reboots_while_others_forward(testbed: Testbed) -> None:
    vm1, vm2, vm3 = testbed.require(*NAMES)
    with pinging(vm1, vm2):
        vm3.reboot()
        testbed.wait_state("vm3", "ready")
    assert vm3.ping(vm1.ip, count=3)
    assert vm2.ping(vm3.ip, count=3)


def test_qemu_is_killed_and_started_again(testbed: Testbed) -> None:
    vm1, vm2, vm3 = testbed.require(*NAMES)
    connects = testbed.show("vm3")["connects"]
    with pinging(vm1, vm2):
        vm3.kill()
        testbed.wait_state("vm3", "listening")
        testbed.require("vm3")
    assert vm3.ping(vm1.ip, count=3)
    assert testbed.show("vm3")["connects"] == connects + 1
