"""MTUs that QEMU tells guest and switch, and jumbo frames."""

from __future__ import annotations

import pytest

from tests.e2e.testbed import Kind, Testbed, protocol_counters
from tests.e2e.transfer import Transfer
from vswitch.lab.qemu.guest import Guest

LEN = 2_000_000
ICMP_LEN = 28  # with the IPv4 header
ETHERNET_LEN = 14


@pytest.mark.parametrize(
    "offloads",
    [("--offloads", "off"), pytest.param((), marks=pytest.mark.slow)],
    ids=["no offloads", "offloads"],
)
def test_guests_with_different_mtus(testbed: Testbed, offloads: tuple[str, ...]) -> None:
    mtus = {"vm1": 1400, "vm2": 9000, "vm3": 9000}
    with testbed.kinds(
        vm1=Kind({"mtu": 1400}),
        vm2=Kind({"mtu": 9000, "mrg_rxbuf": False}, offloads),
        vm3=Kind({"mtu": 9000, "packed": True}, offloads),
    ) as guests:
        vm1, vm2, vm3 = guests
        for guest in guests:
            assert int(guest.check("cat /sys/class/net/eth0/mtu")) == mtus[guest.name]
            assert "MTU" in testbed.show(guest.name)["feature_names"]

        for source, target in ((vm2, vm3), (vm3, vm2)):
            pings(source, target, 9000)
        # VLAN tags are not counted in an MTU, so the limit lies a little above it.
        assert vm2.run(f"ping -c 2 -w 2 -s {1500 - ICMP_LEN} {vm1.ip}").exit_code == 1
        assert testbed.ctl("stats", "vm1")[0]["drops"]["egress-mtu"] == 2
        pings(vm2, vm1, 1400)
        assert not any(fragments(guest) for guest in guests)

        for sender, receiver in ((vm2, vm3), (vm3, vm2), (vm2, vm1), (vm1, vm3)):
            (before,) = testbed.ctl("stats", receiver.name)
            Transfer(sender, receiver, LEN).finish()
            (after,) = testbed.ctl("stats", receiver.name)
            frames, length = (after[key] - before[key] for key in ("egress_frames", "egress_bytes"))
            if offloads:
                longest = min(mtus[sender.name], mtus[receiver.name]) + ETHERNET_LEN
                assert longest / 2 < length / frames <= longest
        assert testbed.ctl("stats", "vm1")[0]["drops"]["egress-mtu"] == 2


def pings(source: Guest, target: Guest, mtu: int) -> None:
    """With packets that are as long as the MTU."""
    said = source.check(f"ping -A -c 5 -w 10 -s {mtu - ICMP_LEN} {target.ip}")
    assert "5 packets received" in said


def fragments(guest: Guest) -> int:
    """IP fragments that a guest has made or seen."""
    counters = protocol_counters(guest)["Ip"]
    return counters["FragCreates"] + counters["ReasmReqds"]
