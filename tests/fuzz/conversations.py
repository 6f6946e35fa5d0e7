"""What a frontend says to a vhost-user backend, made by chance: the truth, and lies.

A message is [request, flags, payload in hex digits, kinds of descriptors, length to claim or None].
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from tests.fuzz.descriptors import FDS, MEMORY_LEN
from vswitch.fastpath.main.journal import SLOT_LEN
from vswitch.fastpath.main.port import MAX_VRINGS
from vswitch.vhost_user.net import PROTOCOL_FEATURES
from vswitch.vhost_user.protocol import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    REQUESTS,
    VERSION,
    VRING_NOFD,
    Feature,
    Inflight,
    IotlbEntry,
    IotlbType,
    LogArea,
    MemRegion,
    ProtocolFeature,
    Request,
    VringAddr,
    VringState,
    encode_inflight,
    encode_iotlb,
    encode_log,
    encode_mem_region,
    encode_mem_table,
    encode_u64,
    encode_vring_addr,
    encode_vring_state,
)

UVA = 0x7F00_0000_0000
JOURNAL_LEN = MAX_VRINGS * SLOT_LEN
QUEUES = 2
Message = list[Any]


class Conversation:
    """What an honest frontend says, from its first message to its last; `messages` has all of it.

    In the order of the methods. What it negotiates decides what else it says.
    """

    def __init__(self, rng: Random) -> None:
        self.messages: list[Message] = []
        self._rng = rng
        self._features = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES | Feature.MRG_RXBUF
        for one in (
            Feature.RING_PACKED, Feature.RING_EVENT_IDX, Feature.RING_INDIRECT_DESC, Feature.CSUM,
            Feature.HOST_TSO4, Feature.GUEST_CSUM, Feature.MQ, Feature.LOG_ALL,
        ):  # fmt: skip
            if rng.random() < 0.3:
                self._features |= one
        self._protocol = ProtocolFeature(0)
        for protocol_feature in PROTOCOL_FEATURES:
            if rng.random() < 0.8:
                self._protocol |= protocol_feature
        self._iommu = rng.random() < 0.35
        if self._iommu:
            self._features |= Feature.ACCESS_PLATFORM
            self._protocol |= ProtocolFeature.BACKEND_REQ
        if not {ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK} <= set(self._protocol):
            self._protocol &= ~ProtocolFeature.INBAND_NOTIFICATIONS
        self._ack = FLAG_NEED_REPLY if rng.random() < 0.3 else 0
        self._postcopy = False
        self._regions: list[MemRegion] = []

    def _say(self, request: Request, payload: bytes = b"", *fds: str) -> None:
        needs = REQUESTS[request].needs
        if needs is not None and needs not in self._protocol and self._rng.random() < 0.97:
            return
        self.messages.append([int(request), VERSION | self._ack, payload.hex(), list(fds), None])

    def _one_of(self, *choices: Callable[[], None]) -> None:
        self._rng.choice(choices)()

    def negotiate(self) -> None:
        self._say(Request.GET_FEATURES)
        self._say(Request.GET_PROTOCOL_FEATURES)
        self._say(Request.SET_PROTOCOL_FEATURES, encode_u64(self._protocol))
        self._say(Request.GET_QUEUE_NUM)
        self._say(Request.SET_OWNER)
        self._say(Request.SET_FEATURES, encode_u64(self._features))

    def say_more(self) -> None:
        """Some of what may come at any time, or nothing."""
        inflight = partial(Inflight, mmap_offset=0, num_queues=2, queue_size=16)
        extras: list[Callable[[], None]] = [
            lambda: self._say(Request.NET_SET_MTU, encode_u64(1500)),
            lambda: self._say(Request.GET_MAX_MEM_SLOTS),
            lambda: self._say(Request.SET_BACKEND_REQ_FD, b"", "socket"),
            lambda: self._say(Request.GET_INFLIGHT_FD, encode_inflight(inflight(0))),
            lambda: self._say(
                Request.SET_INFLIGHT_FD, encode_inflight(inflight(JOURNAL_LEN)), "journal"
            ),
            lambda: self._say(Request.SET_LOG_BASE, encode_log(LogArea(4096, 0)), "memory"),
            lambda: self._say(Request.SET_LOG_FD, b"", "event"),
            lambda: self._say(Request.SET_STATUS, encode_u64(7)),
            lambda: self._say(Request.GET_STATUS),
            lambda: self._say(Request.SEND_RARP, encode_u64(0x112233445566)),
        ]
        for extra in self._rng.sample(extras, self._rng.randrange(4)):
            extra()

    def give_memory(self) -> None:
        """All of it, in postcopy migration or not, and behind an IOMMU some translations of it."""
        rng = self._rng
        self._postcopy = ProtocolFeature.PAGEFAULT in self._protocol and rng.random() < 0.2
        if self._postcopy:
            self._say(Request.POSTCOPY_ADVISE)
            self._say(Request.POSTCOPY_LISTEN)
        self._regions = [
            MemRegion(i << 32, MEMORY_LEN >> (i and 1), UVA + (i << 32), 0)
            for i in range(rng.choice([1, 1, 2, 4]))
        ]
        self._one_of(self._set_table, self._add_one_by_one)
        if self._postcopy and rng.random() < 0.9:
            # The frontend knows all addresses.
            self.messages.append([self.messages[-1][0], VERSION, encode_u64(0).hex(), [], None])
        if self._iommu:
            if rng.random() < 0.9:
                kind = rng.choice(["channel"] * 8 + ["socket"])
                self._say(Request.SET_BACKEND_REQ_FD, b"", kind)
            self._map_some()

    def _set_table(self) -> None:
        table = encode_mem_table(self._regions)
        self._say(Request.SET_MEM_TABLE, table, *["memory"] * len(self._regions))

    def _add_one_by_one(self) -> None:
        for region in self._regions:
            self._say(Request.ADD_MEM_REG, encode_mem_region(region), "memory")

    def _map_some(self) -> None:
        rng = self._rng
        for region in rng.sample(self._regions, rng.randrange(len(self._regions) + 1)):
            # I/O virtual addresses are those of the frontend, which is what rings are given below.
            at = rng.choice([0, 0, 0, 0x1000, 0x2000, 0x4000])
            size = rng.choice([region.size - at, region.size - at, 0x1000, 0x4000])
            access = rng.choice([3, 3, 3, 1, 2, 0])
            entry = IotlbEntry(region.uva + at, size, region.uva + at, access, IotlbType.UPDATE)
            for i in range(rng.choice([1, 1, 1, 20])):
                more = entry._replace(iova=entry.iova + (i << 36))
                self._say(Request.IOTLB_MSG, encode_iotlb(more))

    def _unmap_some(self) -> None:
        uva = self._rng.choice(self._regions).uva
        iova, size = self._rng.choice([(uva, 0x1000), (uva + 0x2000, 0x3000), (0, 0)])
        entry = IotlbEntry(iova, size, 0, 0, IotlbType.INVALIDATE)
        self._say(Request.IOTLB_MSG, encode_iotlb(entry))

    def start_rings(self) -> None:
        rng = self._rng
        for vring in range(rng.choice([2, 2, 2 * QUEUES])):
            base = UVA + 0x4000 * vring
            size = rng.choice([16, 64, 256])
            self._say(Request.SET_VRING_NUM, encode_vring_state(VringState(vring, size)))
            self._say(Request.SET_VRING_BASE, encode_vring_state(VringState(vring, 0)))
            where = VringAddr(vring, 0, base, base + 0x2000, base + 0x3000, 0)
            self._say(Request.SET_VRING_ADDR, encode_vring_addr(where))
            self._say(Request.SET_VRING_CALL, encode_u64(vring), "event")
            self._one_of(
                partial(self._say, Request.SET_VRING_KICK, encode_u64(vring), "event"),
                partial(self._say, Request.SET_VRING_KICK, encode_u64(vring | VRING_NOFD)),
            )
            self._say(Request.SET_VRING_ERR, encode_u64(vring), "event")
            self._say(Request.SET_VRING_ENABLE, encode_vring_state(VringState(vring, 1)))
        for _ in range(rng.choice([1, 2, 4]) if self._iommu else 0):
            self._one_of(self._map_some, self._map_some, self._unmap_some)

    def end(self) -> None:
        """Some of what a frontend does that goes, or whose migration is over."""
        if self._rng.random() < 0.3:
            self._say(Request.REM_MEM_REG, encode_mem_region(self._regions[-1]))
        for vring in range(2):
            if self._rng.random() < 0.5:
                self._say(Request.GET_VRING_BASE, encode_vring_state(VringState(vring, 0)))
        if self._postcopy and self._rng.random() < 0.7:
            self._say(Request.POSTCOPY_END)


def usual(rng: Random) -> list[Message]:
    """What an honest frontend says, from its first message to its last."""
    said = Conversation(rng)
    said.negotiate()
    said.say_more()
    said.give_memory()
    said.start_rings()
    said.say_more()
    said.end()
    return said.messages


NUMBERS = [0, 1, 2, 3, 255, 256, 257, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 1 << 31, (1 << 32) - 1]
WIDE = [1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1, UVA, MEMORY_LEN]


def lie(rng: Random, said: list[Message]) -> None:
    """Change one thing about a conversation."""
    at = rng.randrange(len(said))
    message = said[at]
    what = rng.randrange(10)
    payload = bytearray.fromhex(message[2])
    if what < 4 and len(payload) >= 4:
        width = rng.choice([4, 8]) if len(payload) >= 8 else 4
        where = rng.randrange(0, len(payload) - width + 1, 4)
        (old,) = struct.unpack_from("<I" if width == 4 else "<Q", payload, where)
        new = rng.choice([*NUMBERS, *(WIDE if width == 8 else []), old + 1, old - 1, old ^ 1])
        struct.pack_into("<I" if width == 4 else "<Q", payload, where, new & ((1 << 8 * width) - 1))
        message[2] = payload.hex()
    elif what == 4:
        kinds = message[3]
        how = rng.randrange(3)
        if how == 0 and kinds:
            kinds[rng.randrange(len(kinds))] = rng.choice(list(FDS))
        elif how == 1 and kinds:
            kinds.pop()
        else:
            kinds += [rng.choice(list(FDS)) for _ in range(rng.choice([1, 1, 2, 8, 9]))]
    elif what == 5:
        message[2] = (payload + bytes(8) if rng.random() < 0.5 else payload[:-1]).hex()
    elif what == 6:
        message[4] = rng.choice([*NUMBERS, len(payload) + 1])
    elif what == 7:
        flags = [0, 1, 2, 3, VERSION | FLAG_REPLY, VERSION | FLAG_NEED_REPLY, 0xFFFFFFFF]
        message[1] = rng.choice(flags)
    elif what == 8:
        message[0] = rng.choice([*(int(r) for r in REQUESTS), 0, 44, 255, (1 << 32) - 1])
    else:
        how = rng.randrange(4)
        if how == 0 and len(said) > 1:
            said.pop(at)
        elif how == 1:
            said.insert(rng.randrange(len(said) + 1), [*message[:3], list(message[3]), message[4]])
        elif how == 2:
            other = rng.randrange(len(said))
            said[at], said[other] = said[other], said[at]
        else:
            del said[at:]
            said.append(message)
