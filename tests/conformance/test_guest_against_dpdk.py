"""The software guest against an implementation that is not ours: DPDK's vhost library.

testpmd joins two vhost ports and moves frames between them unseen. What the guest gets wrong about
the protocol or the rings shows here, so that the tests of the switch can rely on the guest.
The guest is not `strict` here: DPDK leaves num_buffers alone without mergeable buffers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.formats import ALL_COMBINATIONS, FORMATS, name_of
from tests.support.frames import frames, mac
from tests.support.testpmd import Testpmd
from vswitch.lab.guest import DEFAULT_FEATURES, BackendClosedError, SoftwareGuest
from vswitch.lab.guest.options import Wanted, by_subject
from vswitch.lab.load.load import Flow, Load
from vswitch.vhost_user.protocol import Feature

OPTIONS = ["--forward-mode=io", "--mbuf-size=10240", "--total-num-mbufs=4096"]
BASE = Feature.PROTOCOL_FEATURES | Feature.ANY_LAYOUT
A, B = mac(1), mac(2)
AT_ONCE = 32
LENGTHS = [60, 61, 64, 65, 127, 128, 300, 1000, 1513, 1514, 1518]


@pytest.fixture(scope="module")
def backend(run_dir: Path) -> Iterator[tuple[Path, Path]]:
    """Two listening sockets; what goes into one comes out of the other."""
    paths = run_dir / "a.sock", run_dir / "b.sock"
    vdevs = [f"net_vhost{i},iface={path},queues=2" for i, path in enumerate(paths)]
    with Testpmd(vdevs, [*OPTIONS, "--rxq=2", "--txq=2"]) as testpmd:
        testpmd.command("start")
        yield paths


def exchange(a: SoftwareGuest, b: SoftwareGuest, lengths: list[int], rounds: int = 1) -> None:
    """Frames both ways, compared byte by byte; never more under way than a ring has room for."""
    for sender, receiver in itertools.islice(itertools.cycle([(a, b), (b, a)]), 2 * rounds):
        sent = frames(A, B, lengths)
        for i in range(0, len(sent), AT_ONCE):
            sender.send(sent[i : i + AT_ONCE])
            got = receiver.recv(len(sent[i : i + AT_ONCE]))
            assert [len(f) for f in got] == [len(f) for f in sent[i : i + AT_ONCE]]
            assert got == sent[i : i + AT_ONCE]
        sender.drain()


@pytest.mark.parametrize("features", ALL_COMBINATIONS, ids=name_of)
def test_feature_matrix(backend: tuple[Path, Path], features: Feature) -> None:
    wanted = features | BASE
    options = by_subject(features=wanted, required_features=wanted, rx_guard_len=8, strict=False)
    with SoftwareGuest(A, **options) as a, SoftwareGuest(B, **options) as b:
        a.connect(backend[0])
        b.connect(backend[1])
        assert a.features == b.features == wanted
        exchange(a, b, LENGTHS * 6, rounds=2)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("regions", [1, 5, 8])
@pytest.mark.parametrize(
    ("tx_cuts", "rx_cuts", "indirect"),
    [
        ((0,), (0,), False),
        ((0, 1, 14, 59), (0, 700), False),
        ((-5, 6, 30), (100,), True),
        # A table longer than the frame DPDK takes for the buffer itself, in packed receiveqs.
        (tuple(range(0, 60, 4)), (10, 30, 90), True),
    ],
)
def test_shapes_of_chains_and_memory(
    backend: tuple[Path, Path],
    regions: int,
    tx_cuts: tuple[int, ...],
    rx_cuts: tuple[int, ...],
    indirect: bool,
    format: str,
) -> None:
    features = DEFAULT_FEATURES | FORMATS[format]
    options: dict[str, Any] = {
        "features": features, "required_features": features, "regions": regions,
        "indirect": indirect, "strict": False,
    }  # fmt: skip
    with (
        SoftwareGuest(A, **by_subject(tx_cuts=tx_cuts, slot_offset=3, **options)) as a,
        SoftwareGuest(B, **by_subject(rx_cuts=rx_cuts, rx_guard_len=5, **options)) as b,
    ):
        a.connect(backend[0])
        b.connect(backend[1])
        exchange(a, b, LENGTHS * 6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mergeable", [True, False])
def test_jumbo_frames(backend: tuple[Path, Path], mergeable: bool, format: str) -> None:
    features = DEFAULT_FEATURES | FORMATS[format]
    features &= ~Feature(0) if mergeable else ~Feature.MRG_RXBUF
    options = by_subject(features=features, max_frame_len=9018, strict=False)
    with SoftwareGuest(A, **options) as a, SoftwareGuest(B, **options) as b:
        a.connect(backend[0])
        b.connect(backend[1])
        exchange(a, b, [60, 2036, 2037, 4084, 4085, 8999, 9018] * 2)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("event_idx", [True, False])
def test_indices_wrap(backend: tuple[Path, Path], event_idx: bool, format: str) -> None:
    features = DEFAULT_FEATURES | FORMATS[format]
    features &= ~Feature(0) if event_idx else ~Feature.RING_EVENT_IDX
    options: dict[str, Any] = {"features": features, "queue_size": 64, "strict": False}
    with (
        SoftwareGuest(A, **by_subject(first_idx=65500, **options)) as a,
        SoftwareGuest(B, **by_subject(first_idx=65471, **options)) as b,
    ):
        a.connect(backend[0])
        b.connect(backend[1])
        exchange(a, b, LENGTHS * 12)
        assert a.transmitqs[0].ring.used_idx < 1000
        assert b.receiveqs[0].ring.used_idx < 1000


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("size", [33, 100, 1000, 32767])
def test_packed_rings_of_any_size(backend: tuple[Path, Path], size: int, in_order: bool) -> None:
    features = DEFAULT_FEATURES | Feature.RING_PACKED
    features |= Feature.IN_ORDER if in_order else Feature(0)
    options: dict[str, Any] = {
        "features": features, "queue_size": size, "max_frame_len": 300, "rx_buf_len": 312,
        "indirect": False, "tx_cuts": (0, 50), "strict": False,
    }  # fmt: skip
    with (
        SoftwareGuest(A, **by_subject(first_idx=size - 1, **options)) as a,
        SoftwareGuest(B, **by_subject(first_idx=2 * size - 20, rx_guard_len=8, **options)) as b,
    ):
        a.connect(backend[0])
        b.connect(backend[1])
        lengths = list(range(60, 300, 5))
        for i in range(0, len(lengths), 10):
            exchange(a, b, lengths[i : i + 10])
        assert (a.transmitqs[0].ring.skipped > 0) == in_order


def test_several_queue_pairs(backend: tuple[Path, Path]) -> None:
    with (
        SoftwareGuest(A, queues=2, strict=False) as a,
        SoftwareGuest(B, queues=2, strict=False) as b,
    ):
        a.connect(backend[0])
        b.connect(backend[1])
        for queue in (0, 1):
            sent = frames(B, A, LENGTHS, tag=queue)
            a.send(sent, queue=queue)
            assert b.recv(len(sent)) == sent
            assert b.receiveqs[queue].ring.frames == len(sent)


@pytest.mark.parametrize("format", FORMATS)
def test_verified_load(backend: tuple[Path, Path], format: str) -> None:
    features = DEFAULT_FEATURES | FORMATS[format]
    with (
        SoftwareGuest(A, wanted=Wanted(features=features), polling=True, strict=False) as a,
        SoftwareGuest(B, wanted=Wanted(features=features), polling=True, strict=False) as b,
    ):
        a.connect(backend[0])
        b.connect(backend[1])
        templates = frames(B, A, [60, 128, 1514])
        flow = Flow(
            a.transmitqs[0], b.receiveqs[0], templates, window=64, verify=True, write_off_s=60.0
        )
        (result,) = Load([flow]).run(60.0, frames=70_000, settle_s=60.0, quiet_s=30.0)
        assert result.sent == result.received == 70_000
        assert (result.lost, result.misordered, result.corrupt, result.written_off) == (0, 0, 0, 0)
        assert flow.tx is not None
        assert flow.tx.outstanding == 0
        # The queues are as good as before.
        exchange(a, b, LENGTHS)


def test_pings_and_reboot(backend: tuple[Path, Path]) -> None:
    with (
        SoftwareGuest(A, "10.1.0.1", strict=False) as a,
        SoftwareGuest(B, "fd00::2", strict=False) as b,
    ):
        a.connect(backend[0])
        b.connect(backend[1])
        b.stack.addresses.append(type(a.stack.addresses[0])("10.1.0.2"))
        b.start_responder()
        assert a.ping("10.1.0.2")
        a.reboot()
        assert a.ping("10.1.0.2")
        assert a.ping(str(b.stack.addresses[1]))
        assert not a.ping("10.1.0.3", timeout=0.2)
        b.stop_responder()


@pytest.mark.parametrize("format", ["split", "packed"])
def test_backend_in_client_mode(run_dir: Path, format: str) -> None:
    """And rings that are stopped and go on, from the base that the backend told."""
    paths = run_dir / "c.sock", run_dir / "d.sock"
    features = DEFAULT_FEATURES | FORMATS[format]
    with (
        SoftwareGuest(A, wanted=Wanted(features=features), strict=False) as a,
        SoftwareGuest(B, wanted=Wanted(features=features), strict=False) as b,
    ):
        a.listen(paths[0])
        b.listen(paths[1])
        vdevs = [f"net_vhost{i},iface={path},client=1" for i, path in enumerate(paths)]
        with Testpmd(vdevs, OPTIONS) as testpmd:
            a.accept()
            b.accept()
            testpmd.command("start")
            exchange(a, b, LENGTHS)
            for _ in range(2):
                b.disconnect()
                b.reconnect()
                exchange(a, b, LENGTHS * 3)
        with pytest.raises(BackendClosedError):
            a.recv(1)
