"""EtherTypes (IEEE Std 802) that are spoken of here, by name."""

from __future__ import annotations

IPV4 = 0x0800
ARP = 0x0806
RARP = 0x8035
VLAN = 0x8100
IPV6 = 0x86DD
QINQ = 0x88A8
EXPERIMENT = 0x88B5
"""The first of two for local experiments: nobody but us knows what to do with it."""


def wire(ethertype: int) -> bytes:
    """Its two bytes in a frame."""
    return ethertype.to_bytes(2, "big")
