"""What a port knows of Ethernet: how long frames are, and the one that it makes itself."""

from __future__ import annotations

from vswitch import ethertypes

ETH_OVERHEAD = 14 + 4
"""Bytes of a frame beyond its MTU: Ethernet header and one VLAN tag."""

BROADCAST = b"\xff" * 6


def rarp_frame(mac: bytes) -> bytes:
    """The broadcast a host sends on behalf of a guest that moved (RFC 903), 60 bytes."""
    body = b"\x00\x01\x08\x00\x06\x04\x00\x03" + mac + b"\0" * 4 + mac + b"\0" * 4
    return (BROADCAST + mac + ethertypes.wire(ethertypes.RARP) + body).ljust(60, b"\0")
