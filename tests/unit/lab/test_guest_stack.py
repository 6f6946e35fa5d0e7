"""The software guest's network stack, frames in and frames out."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address

import pytest

from vswitch import ethertypes
from vswitch.lab.guest import packets
from vswitch.lab.guest.packets import format_mac, parse_mac
from vswitch.lab.guest.stack import NetStack

A, B = parse_mac("52:54:00:00:00:01"), parse_mac("52:54:00:00:00:02")


def test_macs() -> None:
    assert format_mac(A) == "52:54:00:00:00:01"
    for bad in ("", "52:54:00:00:00", "52:54:00:00:00:0g", "525400000001", "1:2:3:4:5:678"):
        with pytest.raises(ValueError, match=r"MAC|invalid"):
            parse_mac(bad)


@pytest.mark.parametrize(("own", "other"), [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")])
def test_resolve_and_ping(own: str, other: str) -> None:
    a, b = NetStack(A, own), NetStack(B, other)
    target = ip_address(other)
    taken, replies = b.handle(a.resolve_request(target))
    assert taken
    assert len(replies) == 1
    assert a.handle(replies[0]) == (True, [])
    assert a.neighbours[target] == B
    taken, replies = b.handle(a.echo_request(target, 7, 1, b"data"))
    assert taken
    assert len(replies) == 1
    assert a.handle(replies[0]) == (True, [])
    assert a.echo_replies == {(target, 7, 1, b"data")}


def test_link_local_address_is_always_there() -> None:
    a, b = NetStack(A), NetStack(B)
    target = ip_address("fe80::5054:ff:fe00:2")
    assert b.addresses == [target]
    _, replies = b.handle(a.resolve_request(target))
    assert a.handle(replies[0]) == (True, [])
    with pytest.raises(ValueError, match="no IPv4 address"):
        a.resolve_request(IPv4Address("10.0.0.2"))


def test_what_is_not_for_the_stack() -> None:
    a, b = NetStack(A, "10.0.0.1"), NetStack(B, "10.0.0.2")
    b.neighbours[ip_address("10.0.0.1")] = A
    request = b.echo_request(ip_address("10.0.0.1"), 1, 1, b"x" * 20)
    assert a.handle(request)[0]
    damaged = bytearray(request)
    damaged[50] ^= 1  # data: the ICMP checksum no longer fits
    for frame in (
        b"",
        request[:13],
        request[:30],
        request[:-30],
        bytes(damaged),
        b"\x02" + request[1:],  # another station's address
        packets.arp(packets.ARP_REQUEST, B, IPv4Address("10.0.0.2"), bytes(6), IPv4Address(9)),
        packets.ethernet(A, B, ethertypes.EXPERIMENT, b"other"),
    ):
        assert a.handle(frame) == (False, [])


def test_checksum() -> None:
    # The example of RFC 1071 section 3.
    assert packets.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2
    assert packets.checksum(b"\xff") == 0x00FF
