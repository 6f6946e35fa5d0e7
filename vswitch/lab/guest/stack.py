"""The network stack of the software guest, without I/O: frames in, frames out.

It answers ARP, ICMP echo, neighbour solicitations and ICMPv6 echo for its own addresses, and
remembers neighbours and echo replies for whoever pings.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

from vswitch import ethertypes
from vswitch.lab.guest import packets

Address = IPv4Address | IPv6Address


class NetStack:
    """Addresses of one interface, and what is known of its neighbours.

    `ip` is an IPv4 or IPv6 address or None; the link-local IPv6 address of `mac` (6 bytes) is
    always there as well.
    """

    def __init__(self, mac: bytes, ip: str | None = None) -> None:
        self.mac = mac
        self.addresses: list[Address] = [packets.link_local(mac)]
        if ip is not None:
            self.addresses.insert(0, ip_address(ip))
        self.neighbours: dict[Address, bytes] = {}
        self.echo_replies: set[tuple[Address, int, int, bytes]] = set()
        """(sender, identifier, sequence number, data) of every echo reply heard."""

    def source_for(self, target: Address) -> Address | None:
        """Which of our addresses talks to `target`; None when there is none of its family."""
        for own in self.addresses:
            if own.version == target.version:
                return own
        return None

    def resolve_request(self, target: Address) -> bytes:
        """The frame that asks who has `target`. ValueError without an address of its family."""
        own = self.source_for(target)
        if isinstance(target, IPv4Address) and isinstance(own, IPv4Address):
            return packets.arp(packets.ARP_REQUEST, self.mac, own, bytes(6), target)
        if isinstance(target, IPv6Address) and isinstance(own, IPv6Address):
            return packets.neighbour_solicitation(self.mac, own, target)
        raise ValueError(f"this guest has no IPv{target.version} address to reach {target} from")

    def echo_request(self, target: Address, ident: int, seq: int, data: bytes) -> bytes:
        """The echo request to `target`, whose neighbour entry must be there."""
        own = self.source_for(target)
        mac = self.neighbours[target]
        if isinstance(target, IPv4Address) and isinstance(own, IPv4Address):
            body = packets.icmp_echo(packets.ICMP_ECHO_REQUEST, ident, seq, data)
            packet = packets.ipv4(own, target, packets.PROTO_ICMP, body)
            return packets.ethernet(mac, self.mac, ethertypes.IPV4, packet)
        if isinstance(target, IPv6Address) and isinstance(own, IPv6Address):
            body = packets.icmp_echo(packets.ICMPV6_ECHO_REQUEST, ident, seq, data)
            body = body[:2] + b"\0\0" + body[4:]
            packet = packets.icmpv6(own, target, body)
            return packets.ethernet(mac, self.mac, ethertypes.IPV6, packet)
        raise ValueError(f"this guest has no IPv{target.version} address to reach {target} from")

    def handle(self, frame: bytes) -> tuple[bool, list[bytes]]:
        """Take one received frame. Returns whether it was for the stack, and what to send back."""
        if len(frame) < packets.ETH_HEADER_LEN:
            return False, []
        dst, src = frame[:6], frame[6:12]
        if not dst[0] & 1 and dst != self.mac:
            return False, []
        ethertype = int.from_bytes(frame[12:14], "big")
        payload = frame[packets.ETH_HEADER_LEN :]
        if ethertype == ethertypes.ARP:
            return self._arp(payload)
        if ethertype == ethertypes.IPV4:
            return self._ipv4(src, payload)
        if ethertype == ethertypes.IPV6:
            return self._ipv6(src, payload)
        return False, []

    def _arp(self, payload: bytes) -> tuple[bool, list[bytes]]:
        message = packets.parse_arp(payload)
        if message is None:
            return False, []
        operation, mac, sender, target = message
        if target not in self.addresses:
            return False, []
        self.neighbours[sender] = mac
        if operation != packets.ARP_REQUEST:
            return True, []
        return True, [packets.arp(packets.ARP_REPLY, self.mac, target, mac, sender)]

    def _ipv4(self, src_mac: bytes, payload: bytes) -> tuple[bool, list[bytes]]:
        packet = packets.parse_ipv4(payload)
        if packet is None:
            return False, []
        src, dst, proto, body = packet
        if dst not in self.addresses or proto != packets.PROTO_ICMP:
            return False, []
        if len(body) < packets.ECHO_HEADER_LEN or packets.checksum(body):
            return False, []
        kind, ident, seq, data = packets.parse_echo(body)
        if kind == packets.ICMP_ECHO_REPLY:
            self.echo_replies.add((src, ident, seq, data))
            return True, []
        if kind != packets.ICMP_ECHO_REQUEST:
            return False, []
        reply = packets.ipv4(
            dst,
            src,
            packets.PROTO_ICMP,
            packets.icmp_echo(packets.ICMP_ECHO_REPLY, ident, seq, data),
        )
        return True, [packets.ethernet(src_mac, self.mac, ethertypes.IPV4, reply)]

    def _ipv6(self, src_mac: bytes, payload: bytes) -> tuple[bool, list[bytes]]:
        packet = packets.parse_ipv6(payload)
        if packet is None:
            return False, []
        src, dst, proto, body = packet
        if proto != packets.PROTO_ICMPV6 or len(body) < packets.ECHO_HEADER_LEN:
            return False, []
        if packets.icmpv6_checksum(src, dst, body):
            return False, []
        kind = body[0]
        if kind in (
            packets.ICMPV6_NEIGHBOUR_SOLICITATION,
            packets.ICMPV6_NEIGHBOUR_ADVERTISEMENT,
        ):
            return self._neighbour(kind, src_mac, src, body)
        if dst not in self.addresses:
            return False, []
        _, ident, seq, data = packets.parse_echo(body)
        if kind == packets.ICMPV6_ECHO_REPLY:
            self.echo_replies.add((src, ident, seq, data))
            return True, []
        if kind != packets.ICMPV6_ECHO_REQUEST:
            return False, []
        message = packets.icmp_echo(packets.ICMPV6_ECHO_REPLY, ident, seq, data)
        reply = packets.icmpv6(dst, src, message[:2] + b"\0\0" + message[4:])
        return True, [packets.ethernet(src_mac, self.mac, ethertypes.IPV6, reply)]

    def _neighbour(
        self, kind: int, src_mac: bytes, src: IPv6Address, body: bytes
    ) -> tuple[bool, list[bytes]]:
        if len(body) < 24:
            return False, []
        target = IPv6Address(body[8:24])
        if kind == packets.ICMPV6_NEIGHBOUR_ADVERTISEMENT:
            self.neighbours[target] = src_mac
            return True, []
        if target not in self.addresses:
            return False, []
        # Duplicate address detection asks from the unspecified address; nobody is there to answer.
        if src == IPv6Address(0):
            return True, []
        self.neighbours[src] = src_mac
        return True, [packets.neighbour_advertisement(self.mac, target, src_mac, src)]
