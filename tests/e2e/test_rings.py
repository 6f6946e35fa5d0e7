"""Linux's virtio driver with every kind of ring that QEMU can offer it, and its queue pairs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ringsizes import obeys, ring_sizes
from tests.e2e.testbed import Kind, Testbed, wait_until
from tests.e2e.transfer import Transfer, make_data
from vswitch.lab.qemu.guest import Guest
from vswitch.lab.qemu.image import GuestImage

TRANSFER_LEN = 20_000_000

KINDS: dict[str, dict[str, Any]] = {
    "packed": {"packed": True, "queue_size": 512, "tx_queue_size": 1024},
    "packed-no-event-idx": {"packed": True, "event_idx": False},
    "packed-no-mrg-rxbuf": {"packed": True, "mrg_rxbuf": False},
    "packed-no-indirect": {"packed": True, "device_options": "indirect_desc=off"},
    "split-no-event-idx": {"event_idx": False},
    "split-no-mrg-rxbuf": {"mrg_rxbuf": False},
    "legacy": {"modern": False, "listen": True, "tx_queue_size": 512},
    "legacy-no-event-idx": {"modern": False, "event_idx": False},
    "legacy-no-mrg-rxbuf": {"modern": False, "mrg_rxbuf": False},
}


def negotiated(settings: dict[str, Any]) -> dict[str, bool]:
    """Which features a guest with these settings has, as `vswitchctl show` names them."""
    return {
        "RING_PACKED": settings.get("packed", False),
        "VERSION_1": settings.get("modern", True),
        "RING_EVENT_IDX": settings.get("event_idx", True),
        "MRG_RXBUF": settings.get("mrg_rxbuf", True),
        "RING_INDIRECT_DESC": "indirect_desc=off" not in settings.get("device_options", ""),
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("packed", "split-no-event-idx"),
        ("packed-no-event-idx", "legacy"),
        ("packed-no-mrg-rxbuf", "split-no-mrg-rxbuf"),
        pytest.param("packed-no-indirect", "legacy-no-event-idx", marks=pytest.mark.slow),
        pytest.param("packed", "legacy-no-mrg-rxbuf", marks=pytest.mark.slow),
    ],
)
def test_rings_that_differ(testbed: Testbed, one: str, other: str) -> None:
    check_pair(testbed, KINDS[one], KINDS[other])


def check_pair(testbed: Testbed, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Boot two guests with these settings; what they send each other must arrive unchanged."""
    settings = {"vm2": one, "vm3": other}
    kinds = {
        name: Kind(chosen, ("--client",) if chosen.get("listen") else ())
        for name, chosen in settings.items()
    }
    with testbed.kinds(**kinds) as guests:
        for guest in guests:
            shown, chosen = testbed.show(guest.name), settings[guest.name]
            expected = negotiated(chosen)
            assert {name: name in shown["feature_names"] for name in expected} == expected
            sizes = [ring["size"] for ring in shown["rings"]]
            assert sizes == ring_sizes(guest)
            if obeys(guest):
                assert sizes == [chosen.get(key, 256) for key in ("queue_size", "tx_queue_size")]
        vm2, vm3 = guests
        assert vm2.ping(vm3.ip, count=10)
        assert "3 packets received" in vm3.check(f"ping -A -c 3 -w 10 -s 8000 {vm2.ip}")
        Transfer(vm2, vm3, TRANSFER_LEN).finish()
        Transfer(vm3, vm2, TRANSFER_LEN).finish()


def every_kind() -> list[dict[str, Any]]:
    """Each format with event_idx, mrg_rxbuf and indirect_desc on and off.

    Sizes, memory and who listens on the socket go along with them, each with each format.
    """
    formats: tuple[dict[str, bool], ...] = ({}, {"packed": True}, {"modern": False})
    memory = ("memfd", "shm", "hugetlb", "hugetlbfs")
    sizes = ((256, 256), (512, 1024), (1024, 512))
    return [
        {
            **format,
            "event_idx": bool(choice & 1),
            "mrg_rxbuf": bool(choice & 2),
            "device_options": "" if choice & 4 else "indirect_desc=off",
            "memory_backend": memory[(choice + number) % 4],
            "listen": bool((choice ^ choice >> 2) & 1),
            "queue_size": sizes[(choice + number) % 3][0],
            "tx_queue_size": sizes[(choice + number) % 3][1],
        }
        for choice in range(8)
        for number, format in enumerate(formats)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(0, len(every_kind()), 2))
def test_every_kind_of_ring(testbed: Testbed, hugetlbfs: Path, number: int) -> None:
    """The two ends have different formats."""
    one, other = (kind | {"hugetlbfs": hugetlbfs} for kind in every_kind()[number : number + 2])
    check_pair(testbed, one, other)


@pytest.fixture(scope="module")
def two_workers(
    tmp_path_factory: pytest.TempPathFactory, guest_image: GuestImage
) -> Iterator[Testbed]:
    testbed = Testbed(tmp_path_factory.mktemp("workers"), guest_image, workers=2)
    try:
        yield testbed
    finally:
        testbed.close()


FLOWS = 4
FLOW_LEN = 3_000_000


def flows_both_ways(one: Guest, other: Guest, size: int = FLOW_LEN) -> None:
    """As many TCP connections at a time as there are queue pairs, each way."""
    made = {guest.name: make_data(guest, size) for guest in (one, other)}
    transfers = [
        Transfer(sender, receiver, size, port=5000 + number, made=made[sender.name])
        for sender, receiver in ((one, other), (other, one))
        for number in range(FLOWS)
    ]
    for transfer in transfers:
        transfer.finish(90)


def moved(testbed: Testbed, name: str, kind: str) -> list[int]:
    """How far each of a port's receiveqs or transmitqs has got."""
    return [ring["used_idx"] for ring in testbed.show(name)["rings"] if ring["type"] == kind]


@pytest.mark.parametrize(
    "packed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["split", "packed"]
)
@pytest.mark.timeout(240)
def test_four_queue_pairs_and_two_workers(two_workers: Testbed, packed: bool) -> None:
    testbed = two_workers
    four = Kind({"queues": 4, "cpus": 4, "packed": packed}, ("--queues", 4))
    with testbed.kinds(vm1=four, vm2=four) as (vm1, vm2):
        for guest in (vm1, vm2):
            assert "MQ" in testbed.show(guest.name)["feature_names"]
            use_pairs(testbed, guest, 4)
        before = {kind: moved(testbed, "vm2", kind) for kind in ("receiveq", "transmitq")}
        flows_both_ways(vm1, vm2)
        for kind, at_first in before.items():
            now = moved(testbed, "vm2", kind)
            changed = [was != is_now for was, is_now in zip(at_first, now, strict=True)]
            assert changed.count(True) > 1, f"only one {kind} was used"
        assert all(worker["frames"] > 0 for worker in testbed.ctl("worker", "show")["workers"])

        # Fewer pairs, and all again, while data flows.
        transfer = Transfer(vm1, vm2, FLOW_LEN, until_told=True)
        for pairs in (1, 3, 4):
            transfer.moves_on()
            use_pairs(testbed, vm2, pairs)
            transfer.moves_on()
            assert vm1.ping(vm2.ip, count=3)
        transfer.finish(90)
        use_pairs(testbed, vm2, 2)
        flows_both_ways(vm1, vm2)


def use_pairs(testbed: Testbed, guest: Guest, pairs: int) -> None:
    guest.run(f"ethtool -L eth0 combined {pairs}")  # it fails where they are that many already
    assert f"Combined:\t{pairs}" in guest.check("ethtool -l eth0 | tail -1").replace(" ", "")
    enabled = [True] * 2 * pairs + [False] * 2 * (4 - pairs)
    wait_until(
        f"the switch uses {pairs} queue pairs of {guest.name}",
        lambda: [ring["enabled"] for ring in testbed.show(guest.name)["rings"]] == enabled,
    )
