"""A guest whose network card is behind a virtual IOMMU: intel-iommu with a device IOTLB.

Its driver maps every buffer for itself and takes the mapping back afterwards, so each frame comes
with a miss and an invalidation: the worst there is for an IOTLB.
"""

from __future__ import annotations

import pytest

from tests.e2e.testbed import Kind, Testbed
from tests.e2e.transfer import Transfer


@pytest.mark.parametrize(
    "packed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["split", "packed"]
)
def test_a_guest_behind_an_iommu(testbed: Testbed, packed: bool) -> None:
    [vm1] = testbed.require("vm1")
    with testbed.kinds(vm2=Kind({"iommu": True, "packed": packed})) as [vm2]:
        features = testbed.show("vm2")["feature_names"]
        assert "ACCESS_PLATFORM" in features
        assert ("RING_PACKED" in features) == packed
        # The card's addresses are translated, "identity" would be the guest-physical ones. The
        # device is the virtio bus's; the group is that of the PCI function above it.
        card = "/sys/class/net/eth0/device/../iommu_group/type"
        assert vm2.check(f"cat {card}").strip() == "DMA"
        assert vm1.ping(vm2.ip, count=20)
        for source, target in ((vm1, vm2), (vm2, vm1)):
            Transfer(source, target, 1_000_000).finish()
        vm2.reboot()
        testbed.wait_state("vm2", "ready")
        assert vm1.ping(vm2.ip, count=20)
        shown = testbed.show("vm2")
        assert shown["error"] is None
        # It was the same connection all the time: nothing that QEMU said was refused.
        assert shown["connects"] == 1
        assert all(ring["fault"] is None for ring in shown["rings"])
