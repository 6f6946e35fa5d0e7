"""What the other guest of the fairness benchmark does, in good order or not."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.guests import ethernet
from benchmarks.interfaces import interface_up
from vswitch.control.client import Client
from vswitch.lab.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.lab.guest.memory import PAGE_LEN
from vswitch.lab.guest.packets import BROADCAST, checksum, parse_mac
from vswitch.lab.guest.vnet import GSO_TCPV4, NEEDS_CSUM, VnetHeader
from vswitch.vhost_user.protocol import Feature

PORTS = 16
BYSTANDER, PEER, OTHER, OTHERS_PEER = range(4)
"""Positions among the guests; those after them only receive."""
OTHER_LEN = 64
REFERENCE = "good order"
_LONG_LEN = 1514
_WHOLE_LEN = 65549
_MADE_UP = 60_000
_HOST_MAC = "52:54:00:00:00:99"
_ETH_P_ALL = 3
_EVERY = 0.0005
"""Seconds between two of what a guest asks of the switch again and again."""

Meanwhile = Callable[[Client, list[SoftwareGuest]], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the other guest does: the frames it sends and how."""

    name: str
    frames: Callable[[list[SoftwareGuest]], list[bytes]] = lambda _: []
    receives: bool = True
    """Its peer posts receive buffers."""
    meanwhile: Meanwhile = lambda *_: contextlib.nullcontext()
    """What else it, or its peer, does as long as it sends."""
    slice_s: float = 0.0
    """Seconds after which those are emptied who only receive, by a generator that does nothing else
    then; 0: all along."""
    header: bytes = b""
    """The virtio_net_hdr of its frames."""
    guest: dict[str, Any] = field(default_factory=dict)
    peer: dict[str, Any] = field(default_factory=dict)
    crowd: dict[str, Any] = field(default_factory=dict)
    """How it, its peer, and all but the bystander's peer differ, as options of SoftwareGuest."""


def _to_peer(guests: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(guests[OTHERS_PEER].mac, guests[OTHER].mac, OTHER_LEN)]


def _broadcast(guests: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(BROADCAST, guests[OTHER].mac, OTHER_LEN)]


def _made_up(guests: list[SoftwareGuest]) -> list[bytes]:
    return [
        ethernet(guests[OTHERS_PEER].mac, bytes((2, 0)) + n.to_bytes(4, "big"), OTHER_LEN)
        for n in range(_MADE_UP)
    ]


def _long(guests: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(guests[OTHERS_PEER].mac, guests[OTHER].mac, _LONG_LEN)]


def _long_broadcast(guests: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(BROADCAST, guests[OTHER].mac, _WHOLE_LEN)]


def _whole(guests: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(guests[OTHERS_PEER].mac, guests[OTHER].mac, _WHOLE_LEN)]


def _segmented(guests: list[SoftwareGuest]) -> list[bytes]:
    """TCP over IPv4, as much of it as a frame holds."""
    length = _WHOLE_LEN - 14
    ip = struct.pack(">BBHHHBBH", 0x45, 0, length, 0, 0x4000, 64, 6, 0) + bytes(8)
    ip = ip[:10] + checksum(ip).to_bytes(2, "big") + ip[12:]
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 0, 0, 0x50, 0x10, 512, 0, 0)
    start = guests[OTHERS_PEER].mac + guests[OTHER].mac + b"\x08\x00" + ip + tcp
    return [start.ljust(_WHOLE_LEN, b"\0")]


def _segments_of(size: int) -> bytes:
    return VnetHeader(NEEDS_CSUM, GSO_TCPV4, 54, size, 34, 16).pack()


def _to_host(_: list[SoftwareGuest]) -> list[bytes]:
    return [ethernet(parse_mac(_HOST_MAC), bytes((2, 0, 0, 0, 0, 1)), OTHER_LEN)]


def _again_and_again(act: Callable[[], None]) -> AbstractContextManager[None]:
    """Have a thread do something as often as that says nothing of how fast Python is."""

    @contextlib.contextmanager
    def acting() -> Iterator[None]:
        over = threading.Event()

        def run() -> None:
            while not over.wait(_EVERY):
                act()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    return acting()


def _notified(_: Client, guests: list[SoftwareGuest]) -> AbstractContextManager[None]:
    """Its peer asks for notifications again and again, and takes none."""
    queue = guests[OTHERS_PEER].receiveqs[0]

    def ask() -> None:
        queue.raw.avail_flags = 0

    return _again_and_again(ask)


def _buffer_pages(guest: SoftwareGuest) -> list[int]:
    """The pages that the switch has asked for and in which none of the guest's rings lie."""
    rings = set()
    for queue in guest.queues():
        layout = queue.layout
        end = layout.used_gpa + 6 + 8 * layout.size
        rings |= set(range(layout.desc_gpa // PAGE_LEN, -(-end // PAGE_LEN)))
    asked = {miss.iova // PAGE_LEN for miss in guest.iommu.misses}
    return [page * PAGE_LEN for page in sorted(asked - rings)]


def _forget(guest: SoftwareGuest, page: int) -> None:
    with guest.iommu.hold():
        guest.iommu.invalidate(page, PAGE_LEN)


def _unanswered(position: int) -> Callable[[Client, list[SoftwareGuest]], Any]:
    """A guest's IOMMU has taken its buffers back and answers nothing."""

    @contextlib.contextmanager
    def meanwhile(_: Client, guests: list[SoftwareGuest]) -> Iterator[None]:
        guest = guests[position]
        with guest.iommu.hold():
            for page in _buffer_pages(guest):
                guest.iommu.invalidate(page, PAGE_LEN)
            yield

    return meanwhile


def _unmapping(_: Client, guests: list[SoftwareGuest]) -> AbstractContextManager[None]:
    """Its peer's IOMMU takes one page of buffers after the other back, and maps it when asked."""
    guest = guests[OTHERS_PEER]
    pages = itertools.cycle(_buffer_pages(guest))

    def unmap() -> None:
        # None: so short is the run that the switch has asked for none yet.
        if (page := next(pages, None)) is not None:
            _forget(guest, page)

    return _again_and_again(unmap)


@contextlib.contextmanager
def unread_tap(client: Client, _: list[SoftwareGuest]) -> Iterator[None]:
    """An uplink whose only reader, a packet socket, reads nothing: its queue is soon full."""
    name = f"vsf{os.getpid()}"
    client.add_uplink(name)
    try:
        interface_up(name)
        client.fdb_add(_HOST_MAC, name)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as packets:
            packets.bind((name, _ETH_P_ALL))
            yield
    finally:
        client.del_uplink(name)


_SLICE = 0.002
_PIECES = tuple(range(1, 60))
_LARGE = {"max_frame_len": 65553, "queue_size": 64}
_TSO = DEFAULT_FEATURES & ~Feature.RING_EVENT_IDX | Feature.CSUM | Feature.HOST_TSO4

BEHAVIOURS = (
    Behaviour("alone"),
    Behaviour(REFERENCE, _to_peer),
    Behaviour("peer posts no buffers", _to_peer, receives=False),
    Behaviour("peer takes no notifications", _to_peer, meanwhile=_notified),
    Behaviour(f"broadcasts to {PORTS - 1} ports", _broadcast),
    Behaviour(
        f"the same, read {1 / _SLICE:.0f} times a second",
        _broadcast,
        slice_s=_SLICE,
        crowd={"rx_queue_size": 2048, "rx_buf_len": 128},
    ),
    Behaviour("cycles through source MACs", _made_up),
    Behaviour("chains of 60 descriptors", _long, guest={"tx_cuts": _PIECES}),
    Behaviour(
        "indirect tables of 60 descriptors",
        _long,
        guest={"tx_cuts": _PIECES, "indirect": True},
    ),
    Behaviour("peer posts buffers in 60 pieces", _long, peer={"rx_cuts": _PIECES}),
    Behaviour(
        "peer posts buffers of 16 bytes", _long, peer={"rx_buf_len": 16, "rx_queue_size": 1024}
    ),
    Behaviour("frames of 64 KiB", _whole, guest=_LARGE, peer={"max_frame_len": 65553}),
    Behaviour(
        "64 KiB into buffers of 128 bytes",
        _whole,
        guest=_LARGE,
        peer={"max_frame_len": 65553, "rx_buf_len": 128, "rx_queue_size": 2048},
    ),
    Behaviour("64 KiB whose peer has no room", _whole, guest=_LARGE, receives=False),
    Behaviour(f"broadcasts of 64 KiB to {PORTS - 1} ports", _long_broadcast, guest=_LARGE),
    Behaviour(
        "segments of 1448 bytes",
        _segmented,
        header=_segments_of(1448),
        guest=_LARGE | {"features": _TSO},
    ),
    Behaviour(
        "segments of 40 bytes",
        _segmented,
        header=_segments_of(40),
        guest=_LARGE | {"features": _TSO},
    ),
    Behaviour(
        "IOMMU answers no miss", _to_peer, meanwhile=_unanswered(OTHER), guest={"iommu": True}
    ),
    Behaviour(
        "peer's IOMMU answers no miss",
        _to_peer,
        meanwhile=_unanswered(OTHERS_PEER),
        peer={"iommu": True},
    ),
    Behaviour("peer's IOMMU unmaps and maps", _to_peer, meanwhile=_unmapping, peer={"iommu": True}),
    Behaviour("sends to a TAP that nobody reads", _to_host, meanwhile=unread_tap),
)
