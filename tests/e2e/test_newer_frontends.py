"""What QEMU 10 and Linux 6.12 have and the frontends of Debian 12 do not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.e2e.testbed import Kind, Testbed
from tests.e2e.transfer import Transfer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.parametrize("guest_image", ["debian13"], indirect=True),
]

IN_ORDER = 35
"""A feature bit that QEMU offers with in_order=on; a driver may leave it."""


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"device_options": "in_order=on"}, id="in-order"),
        pytest.param({"device_options": "in_order=on", "packed": True}, id="in-order-packed"),
        pytest.param({"memory_backend": "posix-shm"}, id="memory-backend-shm"),
        pytest.param({"queues": 2, "cpus": 2}, id="two-pairs"),
    ],
)
def test_other_options(testbed: Testbed, changes: dict[str, Any]) -> None:
    [vm1] = testbed.require("vm1")
    pairs = changes.get("queues", 1)
    with testbed.kinds(vm2=Kind(changes, ("--queues", pairs))) as [vm2]:
        shown = testbed.show("vm2")
        bits = vm2.check("cat /sys/class/net/eth0/device/features")
        assert ("IN_ORDER" in shown["feature_names"]) == (bits[IN_ORDER] == "1")
        assert ("RING_PACKED" in shown["feature_names"]) == changes.get("packed", False)
        # An interrupt of its own for the configuration and for each queue.
        assert len(vectors(vm2.check("cat /proc/interrupts"))) == 1 + 2 * pairs
        for source, target in ((vm1, vm2), (vm2, vm1)):
            Transfer(source, target, 5_000_000).finish()
        counts = vectors(vm2.check("cat /proc/interrupts"))
        assert any(count > 0 for name, count in counts.items() if "input" in name)
        assert shown["connects"] == testbed.show("vm2")["connects"]


def vectors(interrupts: str) -> dict[str, int]:
    """How often each of the card's MSI-X vectors was used, on all CPUs, by its name."""
    found = {}
    for line in interrupts.splitlines():
        if "MSI" in line and (name := re.search(r"virtio\d+-\S+", line)):
            found[name[0]] = sum(map(int, re.findall(r"\s(\d+)(?=\s)", line.partition("PCI")[0])))
    return found
