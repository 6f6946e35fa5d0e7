"""struct virtio_net_hdr as a value (VIRTIO 1.2, section 5.1.6)."""

from __future__ import annotations

import struct
from typing import NamedTuple, Self

NEEDS_CSUM = 1
DATA_VALID = 2
RSC_INFO = 4

GSO_NONE = 0
GSO_TCPV4 = 1
GSO_UDP = 3
GSO_TCPV6 = 4
GSO_UDP_L4 = 5
GSO_ECN = 0x80

_FORMAT = struct.Struct("<BBHHHH")


class VnetHeader(NamedTuple):
    """What a frame leaves to its receiver; lengths and offsets in bytes, from the frame's start.

    `csum_offset` counts from `csum_start`. `num_buffers` is there in headers of 12 bytes only.
    """

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self, length: int = 12) -> bytes:
        """As bytes, 10 or 12 of them."""
        return (_FORMAT.pack(*self[:6]) + self.num_buffers.to_bytes(2, "little"))[:length]

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls._make([*_FORMAT.unpack_from(data), int.from_bytes(data[10:12], "little")])
