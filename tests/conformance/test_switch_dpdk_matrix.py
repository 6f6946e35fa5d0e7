"""DPDK's virtio-user with every kind of ring against a running switch.

One testpmd has a port for each kind; it returns what it gets with the addresses swapped. Every
frame crosses the switch twice and is compared byte by byte.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.support.frames import frames, mac
from tests.support.running import Wire
from tests.support.testpmd import Testpmd
from vswitch.lab.guest import SoftwareGuest

A = mac(1)
SOURCES = [f"52:54:00:ab:00:{n:02x}" for n in range(12)]
LENGTHS = [60, 61, 64, 65, 127, 128, 300, 1000, 1499, 1513, 1514]


class Kind(NamedTuple):
    """Options of virtio-user, and the receive function that DPDK is to choose for them."""

    name: str
    packed: int
    in_order: int
    vectorized: int
    path: str


PLAIN = [
    Kind("split", 0, 0, 0, "standard"),
    Kind("split-in-order", 0, 1, 0, "inorder"),
    Kind("packed", 1, 0, 0, "packed ring standard"),
    Kind("packed-in-order", 1, 1, 0, "packed ring standard"),
]
MERGEABLE = [
    PLAIN[0]._replace(path="mergeable buffer"),
    PLAIN[1],
    PLAIN[2]._replace(path="packed ring mergeable buffer"),
    PLAIN[3]._replace(path="packed ring mergeable buffer"),
]
VECTORIZED = [
    Kind("split-vectorized", 0, 0, 1, "vectorized"),
    # Vectorized on CPUs with AVX-512 only; which of the two it is, is not ours to test.
    Kind("packed-vectorized", 1, 1, 1, "packed ring"),
]


def port_mac(number: int) -> str:
    return f"52:54:00:00:dd:{number:02x}"


def echo(guest: SoftwareGuest, to: str, source: str, lengths: list[int], tag: int) -> None:
    sent = frames(to, source, lengths, tag)
    guest.send(sent)
    back = guest.recv(len(sent))
    assert back == [f[6:12] + f[:6] + f[12:] for f in sent]


@pytest.mark.parametrize("mode", ["server", "client"])
@pytest.mark.parametrize("queues", [1, 4])
@pytest.mark.parametrize("mergeable", [0, 1])
def test_matrix(wire: Wire, mergeable: int, queues: int, mode: str) -> None:
    kinds = MERGEABLE if mergeable else [*PLAIN, *VECTORIZED]
    a = wire.guest("a", 1)
    devices = []
    for number, kind in enumerate(kinds):
        socket = wire.port(kind.name, mode=mode, queues=queues)
        # Nothing is flooded, or testpmd's ports would answer for each other.
        wire.client.fdb_add(port_mac(number), kind.name)
        devices.append(
            f"net_virtio_user{number},path={socket},mac={port_mac(number)},queue_size=256,"
            f"queues={queues},mrg_rxbuf={mergeable},packed_vq={kind.packed},"
            f"in_order={kind.in_order},vectorized={kind.vectorized},server={int(mode == 'client')}"
        )
    for source in (A, *SOURCES):
        wire.client.fdb_add(source, "a")
    options = ["--total-num-mbufs=16384", "--forward-mode=macswap", "--port-topology=loop"]
    options += [f"--rxq={queues}", f"--txq={queues}"]
    eal = ["--log-level=pmd.net.virtio.init,info"]
    with Testpmd(devices, options, eal=eal, memory_mib=512) as testpmd:
        for number, kind in enumerate(kinds):
            wire.wait_state(kind.name, "ready")
            names = wire.info(kind.name)["feature_names"]
            assert ("RING_PACKED" in names) == bool(kind.packed)
            assert ("IN_ORDER" in names) == bool(kind.in_order)
            assert ("MRG_RXBUF" in names) == bool(mergeable)
            function = testpmd.log.partition(f" Rx path on port {number}")[0].rpartition("using ")[
                2
            ]
            assert function.startswith(kind.path)
        testpmd.command("start")
        for number in range(len(kinds)):
            to = port_mac(number)
            # More than once around every ring.
            for turn in range(26):
                echo(a, to, A, LENGTHS, turn)
            for turn in range(2 * queues):
                for source in SOURCES:
                    echo(a, to, source, LENGTHS[turn % 3 :: 3], turn)
        a.drain()
        testpmd.command("stop")
        for number, kind in enumerate(kinds):
            count = 26 * len(LENGTHS) + len(SOURCES) * sum(
                len(LENGTHS[turn % 3 :: 3]) for turn in range(2 * queues)
            )
            stats, dpdk = wire.stats(kind.name), testpmd.counters(number)
            assert dpdk["rx_packets"] == dpdk["tx_packets"] == count
            assert stats["ingress_frames"] == stats["egress_frames"] == count
            assert dpdk["rx_bytes"] == dpdk["tx_bytes"] == stats["ingress_bytes"]
            assert stats["ingress_bytes"] == stats["egress_bytes"]
            assert stats["drops"] == {}
            rings = wire.info(kind.name)["rings"]
            running = [ring for ring in rings if ring["started"] and ring["enabled"]]
            assert len(running) == 2 * queues
            # Both ends of every queue pair were used.
            assert all(ring["used_idx"] for ring in running) or kind.packed
    assert wire.drops("a") == {}
