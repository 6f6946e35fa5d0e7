"""Ethernet, ARP, ICMP and the little of ICMPv6 that a guest needs to be pinged, as bytes."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

from vswitch import ethertypes

ETH_HEADER_LEN = 14
MIN_FRAME_LEN = 60
"""Shortest Ethernet frame without its frame check sequence, in bytes."""
BROADCAST = b"\xff" * 6

ARP_REQUEST = 1
ARP_REPLY = 2
PROTO_ICMP = 1
PROTO_ICMPV6 = 58
ICMP_ECHO_REPLY = 0
ICMP_ECHO_REQUEST = 8
ICMPV6_ECHO_REQUEST = 128
ICMPV6_ECHO_REPLY = 129
ICMPV6_NEIGHBOUR_SOLICITATION = 135
ICMPV6_NEIGHBOUR_ADVERTISEMENT = 136

_ARP = struct.Struct("!HHBBH6s4s6s4s")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_ECHO = struct.Struct("!BBHHH")
ECHO_HEADER_LEN = _ECHO.size


def parse_mac(text: str) -> bytes:
    """Six bytes from "52:54:00:12:34:56". ValueError for anything else."""
    parts = text.split(":")
    if len(parts) != 6 or not all(len(part) in (1, 2) for part in parts):
        raise ValueError(f"{text!r} is no MAC address like 52:54:00:12:34:56")
    return bytes(int(part, 16) for part in parts)


def format_mac(mac: bytes) -> str:
    return ":".join(f"{byte:02x}" for byte in mac)


def link_local(mac: bytes) -> IPv6Address:
    """The link-local address that stateless configuration gives an interface (RFC 4291)."""
    interface = bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    return IPv6Address(b"\xfe\x80" + bytes(6) + interface)


def solicited_node(address: IPv6Address) -> tuple[bytes, IPv6Address]:
    """Multicast MAC and IPv6 address on which the owner of `address` hears solicitations."""
    tail = address.packed[-3:]
    group = IPv6Address(b"\xff\x02" + bytes(9) + b"\x01\xff" + tail)
    return b"\x33\x33\xff" + tail, group


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of `data`."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ethernet(dst: bytes, src: bytes, ethertype: int, payload: bytes) -> bytes:
    """A frame, padded to the least length."""
    frame = dst + src + struct.pack("!H", ethertype) + payload
    return frame.ljust(MIN_FRAME_LEN, b"\0")


def arp(
    operation: int,
    sender_mac: bytes,
    sender: IPv4Address,
    target_mac: bytes,
    target: IPv4Address,
) -> bytes:
    """A whole ARP frame; a request goes to broadcast, a reply to its target."""
    body = _ARP.pack(
        1, ethertypes.IPV4, 6, 4, operation, sender_mac, sender.packed, target_mac, target.packed
    )
    dst = BROADCAST if operation == ARP_REQUEST else target_mac
    return ethernet(dst, sender_mac, ethertypes.ARP, body)


def parse_arp(payload: bytes) -> tuple[int, bytes, IPv4Address, IPv4Address] | None:
    """Operation, sender's MAC, sender and target of an ARP payload; None for anything else."""
    if len(payload) < _ARP.size:
        return None
    hw, proto, hw_len, proto_len, operation, mac, sender, _, target = _ARP.unpack_from(payload)
    if (hw, proto, hw_len, proto_len) != (1, ethertypes.IPV4, 6, 4):
        return None
    return operation, mac, IPv4Address(sender), IPv4Address(target)


def ipv4(src: IPv4Address, dst: IPv4Address, proto: int, payload: bytes) -> bytes:
    """An IPv4 packet without options, time to live 64, "do not fragment" set."""
    length = _IPV4.size + len(payload)
    head = _IPV4.pack(0x45, 0, length, 0, 0x4000, 64, proto, 0, src.packed, dst.packed)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def parse_ipv4(packet: bytes) -> tuple[IPv4Address, IPv4Address, int, bytes] | None:
    """Source, destination, protocol and payload; None for a fragment or a malformed packet."""
    if len(packet) < _IPV4.size:
        return None
    version, _, length, _, fragment, _, proto, _, src, dst = _IPV4.unpack_from(packet)
    head_len = (version & 15) * 4
    if version >> 4 != 4 or head_len < _IPV4.size or fragment & 0x3FFF:
        return None
    if not head_len <= length <= len(packet) or checksum(packet[:head_len]):
        return None
    return IPv4Address(src), IPv4Address(dst), proto, packet[head_len:length]


def ipv6(src: IPv6Address, dst: IPv6Address, proto: int, payload: bytes) -> bytes:
    """An IPv6 packet with hop limit 255, which neighbour discovery demands."""
    return _IPV6.pack(6 << 28, len(payload), proto, 255, src.packed, dst.packed) + payload


def parse_ipv6(packet: bytes) -> tuple[IPv6Address, IPv6Address, int, bytes] | None:
    """Source, destination, next header and payload; None if malformed."""
    if len(packet) < _IPV6.size:
        return None
    version, length, proto, _, src, dst = _IPV6.unpack_from(packet)
    if version >> 28 != 6 or _IPV6.size + length > len(packet):
        return None
    payload = packet[_IPV6.size : _IPV6.size + length]
    return IPv6Address(src), IPv6Address(dst), proto, payload


def icmp_echo(kind: int, ident: int, seq: int, data: bytes) -> bytes:
    """An ICMP echo request or reply."""
    body = _ECHO.pack(kind, 0, 0, ident, seq) + data
    return body[:2] + struct.pack("!H", checksum(body)) + body[4:]


def parse_echo(body: bytes) -> tuple[int, int, int, bytes]:
    """Kind, identifier, sequence number and data of an echo message of at least 8 bytes."""
    kind, _, _, ident, seq = _ECHO.unpack_from(body)
    return kind, ident, seq, body[_ECHO.size :]


def icmpv6(src: IPv6Address, dst: IPv6Address, body: bytes) -> bytes:
    """An IPv6 packet around an ICMPv6 message whose checksum field is still zero."""
    full = body[:2] + struct.pack("!H", icmpv6_checksum(src, dst, body)) + body[4:]
    return ipv6(src, dst, PROTO_ICMPV6, full)


def icmpv6_checksum(src: IPv6Address, dst: IPv6Address, body: bytes) -> int:
    """Checksum with the pseudo header; zero over a message that carries the right one."""
    pseudo = src.packed + dst.packed + struct.pack("!II", len(body), PROTO_ICMPV6)
    return checksum(pseudo + body)


def neighbour_solicitation(mac: bytes, src: IPv6Address, target: IPv6Address) -> bytes:
    """A whole frame that asks for the MAC address of `target`."""
    group_mac, group = solicited_node(target)
    body = struct.pack("!BBHI", ICMPV6_NEIGHBOUR_SOLICITATION, 0, 0, 0)
    body += target.packed + b"\x01\x01" + mac
    return ethernet(group_mac, mac, ethertypes.IPV6, icmpv6(src, group, body))


def neighbour_advertisement(
    mac: bytes, own: IPv6Address, dst_mac: bytes, dst: IPv6Address
) -> bytes:
    """A whole frame that answers a solicitation: solicited, overriding."""
    body = struct.pack("!BBHI", ICMPV6_NEIGHBOUR_ADVERTISEMENT, 0, 0, 0x6000_0000)
    body += own.packed + b"\x02\x01" + mac
    return ethernet(dst_mac, mac, ethertypes.IPV6, icmpv6(own, dst, body))
