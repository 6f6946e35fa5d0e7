"""DPDK's virtio-user as guest: a frontend and a driver that are not ours, on a running switch.

testpmd needs no hugepages for it: without them its memory is one memfd.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.frames import BROADCAST, frame, frames, mac
from tests.support.running import Wire
from tests.support.testpmd import Testpmd
from vswitch.lab.guest import SoftwareGuest

P, Q = "52:54:00:00:dd:01", "52:54:00:00:dd:02"
"""Addresses of testpmd's two ports."""
A, B = mac(1), mac(2)
OPTIONS = ["--total-num-mbufs=8192"]


def vdev(number: int, socket: Path, address: str, **options: int) -> str:
    rest = "".join(f",{key}={value}" for key, value in options.items())
    return f"net_virtio_user{number},path={socket},mac={address},queue_size=256{rest}"


def echo(guest: SoftwareGuest, lengths: list[int], at_once: int = 32) -> None:
    """Frames to P, which come back with their addresses swapped (macswap) and otherwise whole."""
    sent = frames(P, A, lengths)
    for i in range(0, len(sent), at_once):
        batch = sent[i : i + at_once]
        guest.send(batch)
        back = guest.recv(len(batch))
        assert back == [f[6:12] + f[:6] + f[12:] for f in batch]
    guest.drain()


@pytest.mark.parametrize("mergeable", [1, 0])
@pytest.mark.parametrize("mode", ["server", "client"])
def test_echo(wire: Wire, mode: str, mergeable: int) -> None:
    """Every frame crosses the switch twice and is compared byte by byte."""
    a = wire.guest("a", 1)
    socket = wire.port("p", mode=mode)
    server = {"server": 1} if mode == "client" else {}
    device = vdev(0, socket, P, mrg_rxbuf=mergeable, **server)
    with Testpmd([device], [*OPTIONS, "--forward-mode=macswap"]) as testpmd:
        wire.wait_state("p", "ready")
        assert ("MRG_RXBUF" in wire.info("p")["feature_names"]) == bool(mergeable)
        testpmd.command("start")
        echo(a, [*range(60, 1515, 5), 1514, 60] * 3)
        testpmd.command("stop")
        dpdk, stats = testpmd.counters(0), wire.stats("p")
        count = a.receiveqs[0].ring.frames
        assert dpdk["rx_packets"] == dpdk["tx_packets"] == count
        assert stats["ingress_frames"] == stats["egress_frames"] == count
        assert dpdk["rx_bytes"] == dpdk["tx_bytes"] == stats["ingress_bytes"]
    wire.wait_state("p", "connecting" if mode == "client" else "listening")
    assert wire.drops("a") == wire.drops("p") == {}


def test_jumbo_echo(wire: Wire) -> None:
    """Frames over several of testpmd's mergeable buffers, and sent back from several mbufs."""
    a = wire.guest("a", 1, max_frame_len=9018)
    socket = wire.port("p")
    options = [*OPTIONS, "--forward-mode=macswap", "--max-pkt-len=9018", "--mbuf-size=2176"]
    options += ["--enable-scatter", "--tx-offloads=0x8000"]
    with Testpmd([vdev(0, socket, P, mrg_rxbuf=1)], options) as testpmd:
        wire.wait_state("p", "ready")
        testpmd.command("start")
        echo(a, [60, 1514, 2035, 2036, 2037, 4072, 4073, 8999, 9018] * 4, at_once=4)
    assert wire.drops("p") == {}


@pytest.mark.parametrize(("first", "second"), [(1, 1), (0, 0), (1, 0)])
def test_traffic_both_ways(wire: Wire, first: int, second: int) -> None:
    """Two testpmd ports keep frames going round in a closed loop; nothing is lost, all add up."""
    a = wire.guest("a", 1)
    p, q = wire.port("p"), wire.port("q")
    devices = [vdev(0, p, P, mrg_rxbuf=first), vdev(1, q, Q, mrg_rxbuf=second)]
    # What comes in on one port goes out of the other, addressed to the other's peer.
    peers = [f"--eth-peer=0,{Q}", f"--eth-peer=1,{P}"]
    with Testpmd(devices, [*OPTIONS, *peers, "--forward-mode=mac"]) as testpmd:
        for name in ("p", "q"):
            wire.wait_state(name, "ready")
        testpmd.command("start tx_first 2")
        wire.wait_until(
            lambda: wire.stats("p")["egress_frames"] > 50_000, "50000 frames have gone round"
        )
        wire.wait_until(
            lambda: wire.stats("q")["egress_frames"] > 50_000, "50000 frames have gone round"
        )
        # A third guest is heard meanwhile, and hears none of it.
        hello = frame(BROADCAST, A)
        a.send([hello])
        a.drain()
        testpmd.command("stop")
        # What was under way is taken without sending more.
        testpmd.command("set fwd rxonly")
        testpmd.command("start")
        for number, name in enumerate("pq"):

            def all_came(number: int = number, name: str = name) -> bool:
                received = testpmd.counters(number)["rx_packets"]
                return received == wire.stats(name)["egress_frames"]

            wire.wait_until(
                all_came, f"testpmd has received all that the switch delivered to {name}"
            )
        testpmd.command("stop")
        p_dpdk, q_dpdk = testpmd.counters(0), testpmd.counters(1)
        p_stats, q_stats = wire.stats("p"), wire.stats("q")
    for dpdk, stats in ((p_dpdk, p_stats), (q_dpdk, q_stats)):
        assert dpdk["tx_packets"] == stats["ingress_frames"]
        assert dpdk["rx_packets"] == stats["egress_frames"]
        assert dpdk["tx_bytes"] == stats["ingress_bytes"]
        assert dpdk["rx_bytes"] == stats["egress_bytes"]
        assert stats["drops"] == {}
    heard = len(a.poll_frames(256))
    assert wire.drops("a") == {}
    # Only what was flooded before P and Q were known reaches the third guest.
    assert heard == wire.stats("a")["egress_frames"] <= 256
    assert q_stats["egress_frames"] == p_stats["ingress_frames"] + 1
    assert p_stats["egress_frames"] == q_stats["ingress_frames"] + 1
    assert wire.learned() == {A: "a"}


def test_several_queue_pairs(wire: Wire) -> None:
    """Two pairs in testpmd, four in the software guest."""
    a = wire.guest("a", 1, queues=4)
    socket = wire.port("p", queues=2)
    options = [*OPTIONS, "--forward-mode=macswap", "--rxq=2", "--txq=2"]
    with Testpmd([vdev(0, socket, P, queues=2, mrg_rxbuf=1)], options) as testpmd:
        wire.wait_state("p", "ready")
        testpmd.command("start")
        echo(a, [60, 300, 1514] * 10)
        rings = wire.info("p")["rings"]
        assert [ring["index"] for ring in rings if ring["started"] and ring["enabled"]] == [
            0, 1, 2, 3,
        ]  # fmt: skip
        # Other senders are other flows: both of testpmd's receiveqs get some.
        for n in range(32):
            source = f"52:54:00:ab:00:{n:02x}"
            sent = frames(P, source, [60, 61])
            a.send(sent)
            assert a.recv(2) == [f[6:12] + f[:6] + f[12:] for f in sent]
        used = {r["index"]: r["used_idx"] for r in wire.info("p")["rings"]}
        assert used[0] > 0
        assert used[2] > 0
        assert used[0] + used[2] == wire.stats("p")["egress_frames"]
