"""TAP uplinks with and without offloads: real TCP and UDP between two namespaces, and guests."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from tests.conformance.test_switch_offloads import ALL, KINDS, expected, guest
from tests.support.ippackets import UDP, VLAN, Packet
from tests.support.namespaces import Namespace
from tests.support.running import Wire, teach
from vswitch.host.tap import open_tap
from vswitch.lab.guest import VnetHeader, vnet
from vswitch.lab.guest.packets import parse_mac
from vswitch.ports import offloads

pytestmark = pytest.mark.root("makes network namespaces")

SOL_PACKET, PACKET_VNET_HDR, ETH_P_ALL = 263, 15, 3
SOL_UDP, UDP_SEGMENT = 17, 103
TIMEOUT_S = 30.0
TRANSFER_LEN = 32 << 20
ROUNDS, SEGMENTS = 20, 21
"""Datagrams of 20,250 bytes, and how many of 1,000 at most each is sent as."""
MTU = 65521
"""The most a TAP has; frames that are not to be segmented are long here."""
MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")

Host = tuple[Namespace, str]
AddHost = Callable[..., Host]


@pytest.fixture
def add_host(wire: Wire) -> Iterator[AddHost]:
    """Adds a host: a namespace of its own, whose only interface is an uplink of the switch."""
    numbers = itertools.count()
    with ExitStack() as stack:

        def add(setting: bool | list[str], mtu: int | None = None) -> Host:
            n = next(numbers)
            namespace = stack.enter_context(Namespace())
            name = f"vswt{n}"
            wire.client.add_uplink(name, offloads=setting, mtu=mtu)
            stack.callback(wire.client.del_uplink, name)
            wire_up(namespace, name, n)
            return namespace, name

        yield add


def wire_up(namespace: Namespace, name: str, n: int) -> None:

    subprocess.run(["ip", "link", "set", name, "netns", str(namespace.pid)], check=True)
    namespace.ip("link", "set", name, "address", MACS[n], "up")
    namespace.ip("address", "add", f"10.77.0.{n + 1}/24", "dev", name)
    namespace.ip("address", "add", f"fd77::{n + 1}/64", "dev", name, "nodad")


def address(host: Host, version: int) -> str:
    n = int(host[1].removeprefix("vswt"))
    return f"10.77.0.{n + 1}" if version == 4 else f"fd77::{n + 1}"


def family(version: int) -> socket.AddressFamily:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def transfer(source: Host, sink: Host, version: int) -> None:
    """TCP from one host to the other, hashed at both ends."""
    where = address(sink, version)

    def listening() -> socket.socket:
        return socket.create_server((where, 0), family=family(version))

    with sink[0].inside(listening) as server:
        server.settimeout(TIMEOUT_S)
        port = server.getsockname()[1]
        seen = hashlib.sha256()
        count = 0

        def take() -> None:
            nonlocal count
            peer, _ = server.accept()
            peer.settimeout(TIMEOUT_S)
            with peer:
                while data := peer.recv(1 << 18):
                    seen.update(data)
                    count += len(data)

        taker = threading.Thread(target=take)
        taker.start()
        sent = hashlib.sha256()
        block = bytes(range(253)) * 1009
        with source[0].inside(lambda: socket.create_connection((where, port), TIMEOUT_S)) as sock:
            left = TRANSFER_LEN
            while left > 0:
                sock.sendall(block)
                sent.update(block)
                left -= len(block)
        taker.join()
        assert seen.digest() == sent.digest()
        assert count >= TRANSFER_LEN


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (True, True), (True, False), (False, True), (False, False), (["csum"], True),
        (True, ["csum"]), (True, ["csum", "tso4"]),
    ],
)  # fmt: skip
def test_tcp(
    wire: Wire, add_host: AddHost, version: int, first: bool | list[str], second: bool | list[str]
) -> None:
    one, two = add_host(first), add_host(second)
    for source, sink, setting in ((one, two, first), (two, one, second)):
        before = wire.stats(source[1])
        transfer(source, sink, version)
        after = wire.stats(source[1])
        mean = (after["ingress_bytes"] - before["ingress_bytes"]) / (
            after["ingress_frames"] - before["ingress_frames"]
        )
        if setting is True or (isinstance(setting, list) and f"tso{version}" in setting):
            assert mean > 1600, "no segmentation was left to the switch"
        else:
            assert mean <= 1514
    for name in (one[1], two[1]):
        # An interface is down while it moves to its namespace.
        assert wire.drops(name).keys() <= {"no-destination", "tap-busy", "tap-down"}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("setting", [True, False])
@pytest.mark.parametrize("other", [True, False])
def test_udp_in_segments(
    wire: Wire, add_host: AddHost, version: int, setting: bool, other: bool
) -> None:
    one, two = add_host(setting), add_host(other)

    def receiver() -> socket.socket:
        sock = socket.socket(family(version), socket.SOCK_DGRAM)
        sock.bind((address(two, version), 0))
        return sock

    with (
        two[0].inside(receiver) as sink,
        one[0].inside(lambda: socket.socket(family(version), socket.SOCK_DGRAM)) as source,
    ):
        source.setsockopt(SOL_UDP, UDP_SEGMENT, 1000)
        where = (address(two, version), sink.getsockname()[1])
        resolve(source, sink, where)
        before = wire.stats(one[1])["ingress_frames"]
        for number in range(ROUNDS):
            data = bytes([number, *range(249)]) * 81
            source.sendto(data, where)
            got = [sink.recv(65535) for _ in range(SEGMENTS)]
            assert [len(part) for part in got] == [1000] * 20 + [250]
            assert b"".join(got) == data
        seen = wire.stats(one[1])["ingress_frames"] - before
        # Each in one frame, and some of the neighbour discovery that goes on, or each in 21.
        assert (seen < ROUNDS * SEGMENTS) is setting


def resolve(source: socket.socket, sink: socket.socket, where: tuple[str, int]) -> None:
    """Send again and again until something arrives: before the neighbour is known, some is lost.

    Then the last of them, which is told from the others.
    """
    word = b"resolve"
    sink.settimeout(0.5)
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        with contextlib.suppress(OSError):  # nobody said where it is
            source.sendto(word, where)
        with contextlib.suppress(TimeoutError):
            assert sink.recv(100) == word
            break
        assert time.monotonic() < deadline, f"{where} cannot be reached"
    sink.settimeout(TIMEOUT_S)
    source.sendto(b"last", where)
    while sink.recv(100) != b"last":
        pass


def packet_socket(host: Host, *, headers: bool) -> socket.socket:
    def make() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        if headers:
            sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sock.bind((host[1], ETH_P_ALL))
        sock.settimeout(TIMEOUT_S)
        return sock

    return host[0].inside(make)


def next_from(sock: socket.socket, source: bytes) -> bytes:
    while True:
        data = sock.recv(1 << 17)
        if data[6:12] == source:
            return data


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "vlan" not in kind])
@pytest.mark.parametrize("setting", [True, False, ["csum"]])
def test_from_a_guest_to_the_kernel(
    wire: Wire, add_host: AddHost, kind: str, setting: bool | list[str]
) -> None:
    """Whole where the kernel takes it, otherwise finished.

    No VLANs: packet sockets take their tags out.
    """
    sent, header, _ = KINDS[kind]
    host = add_host(setting, mtu=MTU)
    a = guest(wire, "a", 1)
    sent = replace(sent, dst=parse_mac(MACS[0]))
    with packet_socket(host, headers=False) as sock:
        for _ in range(3):
            a.send([sent.partial()], header=header.pack())
            raw = setting is True or (setting == ["csum"] and not header.gso_type)
            want = [sent.partial()] if raw else expected(sent, header)
            got = [next_from(sock, sent.src) for _ in want]
            if raw or setting is False or header.gso_type == vnet.GSO_UDP:
                assert got == want
            else:
                # With its checksum left to the kernel.
                at = sent.l4 + sent.csum_offset
                assert [f[:at] + f[at + 2 :] for f in got] == [f[:at] + f[at + 2 :] for f in want]
    a.drain()
    assert wire.drops(host[1]).keys() <= {"no-destination"}
    assert wire.stats(host[1])["egress_frames"] == 3 * len(want)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ufo"])
@pytest.mark.parametrize("bits", [ALL, 0], ids=["guest with offloads", "guest without"])
def test_from_the_kernel_to_a_guest(wire: Wire, add_host: AddHost, kind: str, bits: int) -> None:
    """What the kernel leaves undone is the guest's to do, or is done for it.

    Not UFO: no kernel that is in use leaves a datagram to be cut into fragments.
    """
    sent, header, _ = KINDS[kind]
    a, b = guest(wire, "a", 1, bits), guest(wire, "b", 2, bits)
    teach(b, a)
    host = add_host(True, mtu=MTU)
    host_mac = parse_mac(MACS[0])
    sent = replace(sent, dst=b.mac, src=host_mac)
    with packet_socket(host, headers=True) as sock:
        sock.send(header.pack(10) + sent.partial())
        want = [sent.partial()] if bits else expected(sent, header)
        got: list[tuple[VnetHeader, bytes]] = []
        while len(got) < len(want):
            ((hdr, frame),) = b.recv_with_headers(1)
            if frame[6:12] == host_mac and frame[:6] == b.mac:
                got.append((hdr, frame))
        assert [frame for _, frame in got] == want
        for hdr, _ in got:
            if bits:
                assert (hdr.flags, hdr.gso_type, hdr.gso_size) == (
                    header.flags, header.gso_type, header.gso_size,
                )  # fmt: skip
                assert (hdr.csum_start, hdr.csum_offset) == (header.csum_start, header.csum_offset)
            else:
                assert hdr[:6] == VnetHeader()[:6]
    assert wire.drops("b") == {}
    assert wire.drops(host[1]).keys() <= {"no-destination"}


def test_the_kernels_word_for_a_checksum(wire: Wire, add_host: AddHost) -> None:
    """DATA_VALID reaches a guest that negotiated GUEST_CSUM, and no other."""
    a, b = guest(wire, "a", 1), guest(wire, "b", 2, 0)
    teach(a, b)
    namespace, name = add_host(True)
    # Behind the uplink is a bridge. The kernel makes fragments for the TAP of what comes over it,
    # and has then filled in the checksum itself.
    namespace.ip("link", "add", "br0", "up", "type", "bridge")
    namespace.ip("link", "set", name, "master", "br0")
    sent = Packet(
        bytes(2000), proto=UDP, dst=b"\xff" * 6, src=parse_mac(MACS[1]), dont_fragment=False
    )
    header = sent.header(1480, gso_type=vnet.GSO_UDP)
    everything = offloads.mask(True)
    with namespace.inside(lambda: open_tap("behind", bridge="br0", offloads=everything)) as behind:
        os.write(behind.fd, header.pack() + sent.partial())
        for receiver, flags in ((a, vnet.DATA_VALID), (b, 0)):
            got: list[bytes] = []
            while len(got) < 2:
                ((hdr, frame),) = receiver.recv_with_headers(1)
                if frame[6:12] == sent.src and frame[12:14] == b"\x08\0":
                    assert hdr == VnetHeader(flags, num_buffers=1)
                    got.append(frame)
            assert got == expected(sent, header)


def test_dhcp_replies_of_both_sides_are_finished(wire: Wire, add_host: AddHost) -> None:
    """A server on the host or in a guest leaves the checksum to others, who do not do it."""
    a, b = guest(wire, "a", 1), guest(wire, "b", 2)
    teach(a, b)
    host = add_host(True)
    reply = Packet(bytes(300), proto=UDP, ports=(67, 68), dst=b"\xff" * 6, src=parse_mac(MACS[0]))
    with (
        packet_socket(host, headers=True) as server,
        packet_socket(host, headers=False) as client,
    ):
        server.send(reply.header().pack(10) + reply.partial())
        for receiver in (a, b):
            while True:
                ((hdr, frame),) = receiver.recv_with_headers(1)
                if frame[6:12] == reply.src and frame[12:14] == b"\x08\0":
                    break
            assert (hdr, frame) == (VnetHeader(num_buffers=1), reply.whole())
        reply = replace(reply, src=a.mac)
        a.send([reply.partial()], header=reply.header().pack())
        assert next_from(client, a.mac) == reply.whole()


@pytest.mark.parametrize("outer", [b"\x88\xa8", b"\x81\x00"])
@pytest.mark.parametrize("size", [0, 1460])
def test_two_tags_both_ways(wire: Wire, add_host: AddHost, outer: bytes, size: int) -> None:
    """1500 bytes behind two tags between a guest and another TAP, over the kernel's bridge.

    So Linux takes such a frame at an MTU of 1500, and so does the uplink, with segments as without.
    """
    tags = outer + b"\0\x14" + VLAN
    a = guest(wire, "a", 1)
    namespace, name = add_host(True)
    namespace.ip("link", "add", "br0", "up", "type", "bridge")
    namespace.ip("link", "set", name, "master", "br0")
    everything = offloads.mask(True)
    payload = bytes(4 * size or 1460)
    out = Packet(payload, dst=parse_mac(MACS[1]), src=a.mac, tags=tags)
    back = replace(out, dst=a.mac, src=parse_mac(MACS[1]))
    with namespace.inside(lambda: open_tap("behind", bridge="br0", offloads=everything)) as behind:
        for _ in range(3):
            header = out.header(size) if size else VnetHeader()
            sent = out.partial() if size else out.whole()
            a.send([sent], header=header.pack())
            got = b""
            while got[18:24] != out.src:
                assert select.select([behind.fd], [], [], TIMEOUT_S)[0], "nothing came"
                got = os.read(behind.fd, 1 << 17)
            assert got[12:] == sent
            sent = back.partial() if size else back.whole()
            os.write(behind.fd, header.pack() + sent)
            while True:
                ((hdr, got),) = a.recv_with_headers(1, timeout=TIMEOUT_S)
                if got[6:12] == back.src:
                    break
            assert got == sent
            assert (hdr.gso_type, hdr.gso_size) == (header.gso_type, header.gso_size)
    a.drain()
    assert wire.drops(name).keys() <= {"no-destination"}
    assert wire.drops("a") == {}
