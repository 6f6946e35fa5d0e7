"""IP packets to be finished by somebody else: as a driver hands them over, and whole."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from vswitch.lab.guest import vnet
from vswitch.lab.guest.vnet import VnetHeader

DST, SRC = bytes.fromhex("525400000002"), bytes.fromhex("525400000001")
VLAN = b"\x81\x00\x00\x0a"
QINQ = b"\x88\xa8\x00\x14" + VLAN

FIN, SYN, PSH, ACK, ECE, CWR = 0x01, 0x02, 0x08, 0x10, 0x40, 0x80
TCP, UDP = 6, 17


def fold(data: bytes) -> int:
    """The ones' complement sum of 16-bit words, big-endian."""
    if len(data) & 1:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum(data: bytes) -> int:
    return 0xFFFF - fold(data)


@dataclass(frozen=True)
class Packet:
    """A TCP or UDP packet. `extensions` are (type, bytes) of IPv6 extension headers."""

    payload: bytes
    proto: int = TCP
    version: int = 4
    tags: bytes = b""
    options: bytes = b""
    extensions: tuple[tuple[int, bytes], ...] = ()
    tcp_options: bytes = b""
    flags: int = ACK
    seq: int = 0x12345678
    ip_id: int = 0x4321
    tos: int = 0
    dont_fragment: bool = True
    dst: bytes = DST
    src: bytes = SRC
    ports: tuple[int, int] = field(default=(1234, 80))

    @property
    def l3(self) -> int:
        return 14 + len(self.tags)

    @property
    def l4(self) -> int:
        if self.version == 4:
            return self.l3 + 20 + len(self.options)
        return self.l3 + 40 + sum(len(body) for _, body in self.extensions)

    @property
    def headers_len(self) -> int:
        return self.l4 + (20 + len(self.tcp_options) if self.proto == TCP else 8)

    @property
    def csum_offset(self) -> int:
        return 16 if self.proto == TCP else 6

    def _transport(self) -> bytes:
        if self.proto == UDP:
            return struct.pack(">4H", *self.ports, 8 + len(self.payload), 0)
        words = 5 + len(self.tcp_options) // 4
        return (
            struct.pack(
                ">2H2I2B3H", *self.ports, self.seq, 0x9ABCDEF0, words << 4, self.flags, 512, 0, 0
            )
            + self.tcp_options
        )

    def _network(self, length: int) -> tuple[bytes, bytes]:
        """The IP header, and the pseudo-header for `length` bytes behind it."""
        if self.version == 4:
            addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
            words = 5 + len(self.options) // 4
            head = struct.pack(
                ">2B3H2BH", 0x40 | words, self.tos, 4 * words + length, self.ip_id,
                0x4000 if self.dont_fragment else 0, 64, self.proto, 0,
            ) + addresses + self.options  # fmt: skip
            head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
            return head, addresses + struct.pack(">2H", self.proto, length & 0xFFFF)
        addresses = bytes.fromhex("fd" + "00" * 14 + "01" + "fd" + "00" * 14 + "02")
        kinds = [*(kind for kind, _ in self.extensions), self.proto]
        chain = b"".join(
            bytes([following, len(body) // 8 - 1]) + body[2:]
            for (_, body), following in zip(self.extensions, kinds[1:], strict=True)
        )
        head = struct.pack(">I H2B", 0x60000000 | self.tos << 20, len(chain) + length, kinds[0], 64)
        return head + addresses + chain, addresses + struct.pack(">2I", length, self.proto)

    def partial(self) -> bytes:
        """The frame with the sum of the pseudo-header where the checksum belongs."""
        transport = self._transport()
        network, pseudo = self._network(len(transport) + len(self.payload))
        at = self.csum_offset
        transport = transport[:at] + fold(pseudo).to_bytes(2, "big") + transport[at + 2 :]
        ethertype = b"\x08\x00" if self.version == 4 else b"\x86\xdd"
        return self.dst + self.src + self.tags + ethertype + network + transport + self.payload

    def whole(self) -> bytes:
        """The frame with its checksum."""
        frame = self.partial()
        at = self.l4 + self.csum_offset
        value = checksum(frame[self.l4 :]) or 0xFFFF
        return frame[:at] + value.to_bytes(2, "big") + frame[at + 2 :]

    @property
    def gso_type(self) -> int:
        if self.proto == UDP:
            return vnet.GSO_UDP_L4
        return vnet.GSO_TCPV4 if self.version == 4 else vnet.GSO_TCPV6

    def header(self, size: int = 0, **other: int) -> VnetHeader:
        """What a driver says of it; `size` is the payload of a segment, 0 for no segmentation."""
        values = {"flags": vnet.NEEDS_CSUM, "csum_start": self.l4, "csum_offset": self.csum_offset}
        if size:
            values |= {
                "gso_type": self.gso_type, "gso_size": size, "hdr_len": self.headers_len
            }  # fmt: skip
        return VnetHeader(**(values | other))
