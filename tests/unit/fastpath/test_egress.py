"""Egress lists: what stands on them, how often, and with which addresses it leaves."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.native.lists import send
from tests.support.frames import ETHERTYPE_TEST
from tests.support.ippackets import Packet
from tests.support.rig import ALL, Rig, stepping
from vswitch.fastpath.main.mapping import Memory
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.guest.raw import DESC_F_NEXT, RawDesc
from vswitch.lab.guest.vnet import NEEDS_CSUM, VnetHeader
from vswitch.ports import offloads
from vswitch.vhost_user.protocol import Feature

BURST = 64
HEADER_LEN = 12
BROADCAST = b"\xff" * 6
UNKNOWN = bytes.fromhex("525400000099")
PIECES = 1022
"""... and the one that has the virtio_net_hdr: a chain of as many as there may be."""
FORMATS = [Feature(0), Feature.RING_PACKED]


def frame(dst: bytes, src: bytes, tag: int, length: int = 60) -> bytes:
    return (dst + src + ETHERTYPE_TEST + tag.to_bytes(2, "big")).ljust(length, b"\0")


def offer(guest: SoftwareGuest, chains: list[list[tuple[int, int]]]) -> None:
    """Put chains of (address, length) into a fresh split transmitq."""
    ring = guest.transmitqs[0].raw
    at = 0
    for number, chain in enumerate(chains):
        ring.write_avail(number, at)
        for left, (address, length) in zip(range(len(chain))[::-1], chain, strict=True):
            flags = DESC_F_NEXT if left else 0
            ring.write_desc(at, RawDesc(address, length, flags, at + 1))
            at += 1
    ring.avail_idx = len(chains)


def put(guest: SoftwareGuest, data: bytes) -> int:
    """Its address."""
    address = guest.memory.allocate(len(data))
    guest.memory.write(address, data)
    return address


@pytest.mark.parametrize("ring", FORMATS, ids=["split", "packed"])
def test_a_frame_stands_on_a_list_more_than_once(ring: Feature) -> None:
    """A full list is delivered and begun anew; those of the ports beside it are what they were."""
    with stepping() as rig:
        ports = [rig.guest(n, ring, queue_size=256) for n in range(1, 4)]
        (worker,) = rig.engine.workers
        data = frame(BROADCAST, UNKNOWN, 1)
        named = [port.id for _, port in ports]
        assert send(worker, data, named * (2 * BURST + 1)) == 3 * (2 * BURST + 1)
        for guest, port in ports:
            assert guest.poll_frames(1000) == [data] * (2 * BURST + 1)
            assert rig.engine.stats(port)["egress_frames"] == 2 * BURST + 1


@contextmanager
def tap_end() -> Iterator[tuple[int, socket.socket]]:
    """What a port takes for a TAP, and where its frames come out; a header before each."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        yield ours.fileno(), theirs


def test_a_list_of_a_tap_begins_anew() -> None:
    with stepping() as rig, tap_end() as (ours, theirs):
        tap = rig.engine.add_port("tap", ours)
        rig.settle()
        (worker,) = rig.engine.workers
        data = frame(BROADCAST, UNKNOWN, 1)
        assert send(worker, data, [tap.id] * (BURST + 1)) == BURST + 1
        assert [theirs.recv(2000)[HEADER_LEN:] for _ in range(BURST + 1)] == [data] * (BURST + 1)
        rig.engine.remove_port(tap)
        rig.settle()


def flooding_sender(rig: Rig, features: int = Feature(0)) -> SoftwareGuest:
    """A guest with storm control, into whose receive buffers another port delivers: before all
    ports that come later."""
    sender, own = rig.guest(1, features)
    own.set_storm((1000, 1000, 1000))
    (place,) = (ring for ring in own.rings.values() if not ring.is_transmitq)
    place.unpublish()
    regions, fds = sender.memory.table()
    rig.start(sender, sender.receiveqs[0], Memory(regions, fds), rig.engine.add_port("other"), 0)
    rig.settle()
    return sender


def send_rewritten(
    rig: Rig, sender: SoftwareGuest, first: bytes, second: bytes, header: bytes = bytes(HEADER_LEN),
    cuts: Sequence[int] = (),
) -> None:  # fmt: skip
    """Send two frames, the second of which is in the buffer where another port receives the first:
    it is that one by the time that it is copied to later ports."""
    received = sender.receiveqs[0].raw
    # Drivers here post tables of one descriptor.
    target = received.read_desc_at(received.read_desc(received.read_avail(0)).addr).addr
    sender.memory.write(target, header + second)
    borders = [0, *cuts, HEADER_LEN + len(second)]
    pieces = [(target + start, end - start) for start, end in itertools.pairwise(borders)]
    whole = bytes(HEADER_LEN) + first
    offer(sender, [[(put(sender, whole), len(whole))], pieces])
    assert rig.turn() == 2
    # It was rewritten before it was copied, or this shows nothing.
    assert sender.memory.read(target + HEADER_LEN, len(first)) == first


@pytest.mark.parametrize("cuts", [[], [3], [HEADER_LEN], [HEADER_LEN, 15, 18, 30]], ids=str)
def test_who_may_flood_is_decided_on_what_is_flooded(cuts: list[int]) -> None:
    """A frame that becomes another one between decision and copy leaves with the addresses that the
    decision was about: else what is counted as unknown would be a broadcast."""
    with stepping() as rig:
        sender = flooding_sender(rig)
        receiver, _ = rig.guest(3, Feature(0))
        first, second = frame(BROADCAST, sender.mac, 1), frame(UNKNOWN, sender.mac, 2)
        send_rewritten(rig, sender, first, second, cuts=cuts)
        assert receiver.poll_frames(10) == [first, second[:12] + first[12:]]


RECEIVERS: dict[str, dict[str, Any]] = {
    "plain": {"indirect": False},
    "indirect": {},
    "pieces": {"indirect": False, "rx_cuts": (0, 5, 16)},
    "merged": {"indirect": False, "rx_buf_len": 40},
    "packed": {"indirect": False, "features": Feature.RING_PACKED},
}


@pytest.mark.parametrize("kind", RECEIVERS)
def test_addresses_of_the_decision_get_into_any_buffers(kind: str) -> None:
    with stepping() as rig:
        sender = flooding_sender(rig)
        receiver, _ = rig.guest(3, **{"features": Feature(0), **RECEIVERS[kind]})
        first, second = frame(BROADCAST, sender.mac, 1, 100), frame(UNKNOWN, sender.mac, 2, 100)
        send_rewritten(rig, sender, first, second)
        assert receiver.poll_frames(10) == [first, second[:12] + first[12:]]


def test_addresses_of_the_decision_get_to_a_tap() -> None:
    with stepping() as rig, tap_end() as (ours, theirs):
        sender = flooding_sender(rig)
        tap = rig.engine.add_port("tap", ours)
        rig.settle()
        first, second = frame(BROADCAST, sender.mac, 1), frame(UNKNOWN, sender.mac, 2)
        send_rewritten(rig, sender, first, second)
        assert [theirs.recv(2000)[HEADER_LEN:] for _ in range(2)] == [
            first,
            second[:12] + first[12:],
        ]
        rig.engine.remove_port(tap)
        rig.settle()


@pytest.mark.parametrize("size", [0, 100], ids=["checksum", "segments"])
def test_addresses_of_the_decision_are_those_of_what_is_finished(size: int) -> None:
    """Who takes no offloads gets the checksum filled in, and segments."""
    with stepping() as rig:
        sender = flooding_sender(rig, ALL)
        receiver, _ = rig.guest(3, Feature(0))
        asked, made = (
            Packet(bytes(range(n, n + 250)), dst=dst, src=sender.mac)
            for n, dst in ((0, UNKNOWN), (5, BROADCAST))
        )
        header = asked.header(size).pack()
        send_rewritten(rig, sender, made.partial(), asked.partial(), header)
        begun, *finished = receiver.poll_frames(10)
        assert begun == made.partial()
        assert [len(data) - made.headers_len for data in finished] == (
            [100, 100, 50] if size else [250]
        )
        assert {data[:12] for data in finished} == {UNKNOWN + sender.mac}
        assert b"".join(data[made.headers_len :] for data in finished) == made.payload
        if not size:
            assert finished == [replace(made, dst=UNKNOWN).whole()]


def test_a_burst_of_floods_is_one_batch_of_its_receiver() -> None:
    """There is room for as many as a burst may have, with addresses of ours."""
    with stepping() as rig:
        sender, own = rig.guest(1, Feature(0))
        own.set_storm((1000, 1000, 1000))
        receiver, port = rig.guest(2, Feature(0))
        sent = [frame(BROADCAST, sender.mac, tag) for tag in range(BURST)]
        sender.send(sent)
        assert rig.turn() == BURST
        assert receiver.poll_frames(100) == sent
        assert rig.engine.stats(port)["calls"] == 1


@pytest.mark.parametrize("limited", [False, True])
def test_frames_in_as_many_pieces_as_there_may_be(limited: bool) -> None:
    """They are the sender's doing: no receiver sits out turns for them.

    With storm control they are more than there is room for with addresses of ours: what stands on
    lists leaves first, and all is in order. A TAP takes one piece less than such a frame has then.
    """
    header = VnetHeader(flags=NEEDS_CSUM, csum_start=14, csum_offset=2).pack()
    with stepping() as rig, tap_end() as (ours, theirs):
        sender, own = rig.guest(1, queue_size=8192, max_frame_len=4096)
        if limited:
            own.set_storm((1000, 1000, 1000))
        tap = rig.engine.add_port("tap", ours)
        tap.offloads = offloads.CSUM
        receiver, _ = rig.guest(2, max_frame_len=4096)
        short = frame(BROADCAST, sender.mac, 0)
        sent = [short, *(frame(BROADCAST, sender.mac, tag, 2 * PIECES + 14) for tag in range(1, 5))]
        chains = [[(put(sender, header + short), HEADER_LEN + len(short))]]
        for data in sent[1:]:
            address = put(sender, header + data)
            chain = [(address, HEADER_LEN + 14)]
            chain += [(address + HEADER_LEN + 14 + 2 * k, 2) for k in range(PIECES)]
            chains.append(chain)
        offer(sender, chains)
        while rig.turn():
            pass
        assert receiver.poll_frames(10) == sent
        assert [theirs.recv(5000) for _ in sent] == [header + data for data in sent]
        assert rig.engine.stats(tap)["egress_frames"] == len(sent)
        rig.engine.remove_port(tap)
        rig.settle()
