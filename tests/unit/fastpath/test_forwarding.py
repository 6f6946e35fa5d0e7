"""What becomes of frames, turn by turn: addresses learned, queues chosen, buffers filled."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.frames import BROADCAST, frame, frames, mac
from tests.support.ippackets import TCP, UDP, Packet
from tests.support.notes import Notes
from tests.support.rig import ALL, Rig, stepping
from vswitch.fastpath.main.fdb import key_mac, mac_key
from vswitch.fastpath.main.mapping import DirtyLog
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.guest.packets import parse_mac
from vswitch.lab.guest.raw import DESC_LEN
from vswitch.vhost_user.protocol import Feature

A, B = mac(1), mac(2)
PAGE_LEN = 4096
FORMATS = {"split": Feature(0), "packed": Feature.RING_PACKED}


def cross(rig: Rig, sender: SoftwareGuest, sent: list[bytes]) -> None:
    assert sender.transmitqs[0].ring.send(sent, 0, None) == len(sent)
    assert rig.turn() == len(sent)
    sender.transmitqs[0].ring.reap()


def teach(rig: Rig, guest: SoftwareGuest, *others: SoftwareGuest) -> None:
    cross(rig, guest, [frame(BROADCAST, guest.mac.hex(":"))])
    for other in others:
        other.poll_frames(1)


# Addresses


@pytest.mark.parametrize("ethertype", [0x8100, 0x88A8])
def test_priority_and_drop_eligible_are_no_part_of_a_vlan(ethertype: int) -> None:
    """IEEE 802.1Q, 9.6: three bits of priority, one of drop eligible, twelve of VLAN."""
    with stepping() as rig:
        (a, _), (b, port), (c, _) = (rig.guest(n) for n in (1, 2, 3))
        for number, bits in enumerate((0x0000, 0x1000, 0x2000, 0xE000, 0xF000)):
            tag = ethertype.to_bytes(2, "big") + (bits | 0xABC).to_bytes(2, "big")
            untagged = frame(A, B, tag=number)
            cross(rig, b, [untagged[:12] + tag + untagged[12:]])
            a.poll_frames(1)
            c.poll_frames(1)
            assert [key_mac(key) for key, *_ in rig.engine.fdb.entries()] == [(B, 0xABC)]
            untagged = frame(B, A, tag=number)
            sent = untagged[:12] + tag + untagged[12:]
            cross(rig, a, [sent])
            assert b.poll_frames(2) == [sent]
            assert c.poll_frames(2) == []
            rig.engine.fdb.delete(mac_key(A, 0xABC))
        assert rig.engine.fdb.find(mac_key(B, 0xABC)) == (port.id, False)


@pytest.mark.parametrize("to_itself", [False, True])
def test_who_goes_on_talking_does_not_age(to_itself: bool) -> None:
    """Each second once, also when nobody else of that port has said anything."""
    with stepping() as rig:
        (a, _), (b, _) = rig.guest(1), rig.guest(2)
        cross(rig, a, [frame(B, A)])
        for second in range(1, 5):
            rig.engine.fdb.tick += 1
            assert [age for *_, age in rig.engine.fdb.entries()] == [1]
            cross(rig, a, [frame(A if to_itself else B, A, tag=second)])
            assert [age for *_, age in rig.engine.fdb.entries()] == [0]
            assert rig.engine.fdb.age(2) == []
        rig.engine.fdb.tick += 2
        assert [key_mac(key) for key, _ in rig.engine.fdb.age(2)] == [(A, 0)]
        b.poll_frames(64)


# Queues


@contextmanager
def spreading(pairs: int) -> Iterator[tuple[Rig, SoftwareGuest, SoftwareGuest]]:
    """A sender, and a receiver with several receiveqs."""
    with stepping() as rig:
        (a, _), (b, _) = rig.guest(1, max_frame_len=1518), rig.guest(2, queues=pairs)
        teach(rig, b, a)
        yield rig, a, b


def arrival(rig: Rig, sender: SoftwareGuest, receiver: SoftwareGuest, sent: bytes) -> int:
    """The receiveq that a frame comes out of."""
    cross(rig, sender, [sent])
    got = [queue.ring.recv(2) for queue in receiver.receiveqs]
    assert sorted(got, key=len) == [[]] * (len(got) - 1) + [[sent]]
    for queue in receiver.receiveqs:
        queue.ring.post()
    return got.index([sent])


def fragment(packet: bytes, start: int, end: int, more: bool) -> bytes:
    """An IPv4 packet's payload from `start` to `end`, with the IP header before it."""
    place = (0x2000 if more else 0) | start // 8
    head = packet[:16] + (20 + end - start).to_bytes(2, "big") + packet[18:20]
    return head + place.to_bytes(2, "big") + packet[22:34] + packet[34 + start : 34 + end]


@pytest.mark.parametrize("proto", [TCP, UDP])
def test_fragments_of_a_packet_go_to_one_queue(proto: int) -> None:
    """Only the first has the ports, so they count for none."""
    with spreading(4) as (rig, a, b):
        for port in range(1000, 1032):
            whole = Packet(
                bytes(range(200)), proto, ports=(port, 53), dont_fragment=False,
                dst=parse_mac(B), src=parse_mac(A),
            ).whole()  # fmt: skip
            pieces = [
                fragment(whole, 0, 64, True),
                fragment(whole, 64, 128, True),
                fragment(whole, 128, len(whole) - 34, False),
            ]
            assert len({arrival(rig, a, b, piece) for piece in pieces}) == 1, port


@pytest.mark.parametrize("dont_fragment", [False, True])
@pytest.mark.parametrize("proto", [TCP, UDP])
def test_flows_of_two_addresses_go_to_all_queues(proto: int, dont_fragment: bool) -> None:
    """What is whole is spread by its ports, also if it says that it must not be fragmented."""
    with spreading(4) as (rig, a, b):
        queues = {
            arrival(
                rig, a, b,
                Packet(
                    b"", proto, ports=(port, 53), dont_fragment=dont_fragment,
                    dst=parse_mac(B), src=parse_mac(A),
                ).whole(),
            )
            for port in range(1000, 1064)
        }  # fmt: skip
        assert queues == {0, 1, 2, 3}


# Buffers


def test_the_driver_sees_all_buffers_of_a_frame_at_once() -> None:
    """A turn that uses more of a packed ring than is written in one go, seen in its middle."""
    chains, buf_len, count = 17, 256, 64
    with Notes() as notes, stepping() as rig:
        sender, _ = rig.guest(1, max_frame_len=chains * buf_len)
        receiver, _ = rig.guest(
            2, ALL | Feature.RING_PACKED, notes=notes, rx_buf_len=buf_len, rx_queue_size=2048
        )
        teach(rig, receiver, sender)
        queue = receiver.receiveqs[0]
        place, length = queue.layout.desc_gpa, DESC_LEN * queue.layout.size
        receiver.auto_post = False
        before = receiver.memory.read(place, length)
        sent = frames(B, A, [chains * buf_len - 12] * count)
        cross(rig, sender, sent)
        first, second = notes.batches(queue.index)
        assert first.chains + second.chains == chains * count
        assert first.chains % chains == 0
        # The memory of a moment ago, when the second batch was not there yet.
        after = receiver.memory.read(place, length)
        at = DESC_LEN * second.position
        receiver.memory.write(place + at, before[at:])
        whole = first.chains // chains
        assert receiver.poll_frames(count) == sent[:whole]
        receiver.memory.write(place + at, after[at:])
        assert receiver.poll_frames(count) == sent[whole:]


@pytest.mark.parametrize("format", FORMATS)
def test_every_page_that_a_long_frame_is_written_to_is_marked(format: str) -> None:
    """It lies in one plain buffer. Only what has changed is marked, and the ring."""
    size = 4096
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, size)
        with mmap.mmap(fd, size) as bits, stepping() as rig:
            log = DirtyLog(fd, size, 0)
            sender, _ = rig.guest(1, max_frame_len=9014)
            receiver, _ = rig.guest(
                2, ALL | FORMATS[format], log=log, rx_buf_len=16384, indirect=False, slot_offset=60
            )
            teach(rig, receiver, sender)

            def pages() -> list[bytes]:
                (region,) = receiver.memory.regions
                data = receiver.memory.read(region.gpa, region.size)
                return [data[at : at + PAGE_LEN] for at in range(0, len(data), PAGE_LEN)]

            before = pages()
            bits[:] = bytes(size)
            sent = frames(B, A, [9014, 60, 9000])
            cross(rig, sender, sent)
            marked = {page for page in range(8 * size) if bits[page >> 3] >> (page & 7) & 1}
            after = pages()
            changed = {page for page, data in enumerate(after) if data != before[page]}
            assert len(changed) >= 2 * 3
            layout = receiver.receiveqs[0].layout
            ring = layout.desc_gpa if receiver.receiveqs[0].ring.packed else layout.used_gpa
            assert changed <= marked <= changed | {ring // PAGE_LEN}
            assert receiver.poll_frames(4) == sent
    finally:
        os.close(fd)
