"""Linux's virtio driver with other features than the usual ones."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.ringsizes import obeys, ring_sizes
from tests.e2e.testbed import Testbed
from tests.e2e.transfer import Transfer

PLAIN = {
    "mrg_rxbuf": False,
    "event_idx": False,
    "queue_size": 1024,
    "device_options": "indirect_desc=off",
}


@pytest.mark.parametrize(
    ("changes", "pairs", "negotiated", "refused"),
    [
        pytest.param({"modern": False}, 1, {"ANY_LAYOUT"}, {"VERSION_1"}, id="legacy"),
        pytest.param(
            PLAIN,
            1,
            {"VERSION_1"},
            {"MRG_RXBUF", "RING_EVENT_IDX", "RING_INDIRECT_DESC"},
            id="plain",
        ),
        pytest.param({"queues": 2, "cpus": 2}, 2, {"MQ"}, set(), id="multiqueue"),
    ],
)
def test_driver_with_other_features(
    testbed: Testbed,
    changes: dict[str, Any],
    pairs: int,
    negotiated: set[str],
    refused: set[str],
) -> None:
    (vm1,) = testbed.require("vm1")
    with testbed.in_place_of("vm3", **changes) as vm3:
        testbed.ctl("add-port", "--queues", pairs, "vm3", testbed.socket("vm3"))
        vm3.start().wait_up()
        testbed.wait_state("vm3", "ready")
        shown = testbed.show("vm3")
        assert negotiated <= set(shown["feature_names"])
        assert not refused & set(shown["feature_names"])
        assert [ring["enabled"] for ring in shown["rings"]] == [True] * 2 * pairs
        assert [ring["size"] for ring in shown["rings"]] == ring_sizes(vm3) * pairs
        if obeys(vm3):
            assert shown["rings"][0]["size"] == changes.get("queue_size", 256)
        assert vm3.ping(vm1.ip, count=3)
        # Datagrams in fragments of full frames.
        assert "3 packets received" in vm3.check(f"ping -A -c 3 -w 10 -s 8000 {vm1.ip}")
        Transfer(vm3, vm1, 5_000_000).finish()
        Transfer(vm1, vm3, 5_000_000).finish()
