"""The TAP uplink: guests reach this host, and a network namespace behind a Linux bridge."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator

import pytest

from tests.e2e.testbed import (
    HOST_IP,
    NETWORK,
    PATIENCE_S,
    Testbed,
    pinging,
    pings_until_answered,
    wait_until,
)
from tests.e2e.transfer import make_data, receive, received_sum
from vswitch.lab.qemu import host
from vswitch.lab.qemu.guest import Guest

TRANSFER_LEN = 10_000_000


@pytest.fixture
def tap(testbed: Testbed) -> Iterator[str]:
    """An uplink whose interface carries an address of this host."""
    guests = testbed.require("vm1", "vm2")
    name = f"e2e{os.getpid()}"
    testbed.ctl("uplink", "add", name)
    try:
        host.ip("address", "add", f"{HOST_IP}/24", "dev", name)
        for guest in guests:
            # The last uplink had the same IP address and another MAC address.
            guest.check("ip neigh flush dev eth0")
        yield name
    finally:
        testbed.ctl("uplink", "del", name)


def test_guests_and_host_reach_each_other(testbed: Testbed, tap: str) -> None:
    for guest in testbed.require("vm1", "vm2"):
        assert guest.ping(HOST_IP, count=3)
        assert host.ping_ms(guest.ip) is not None
    assert testbed.show(tap)["state"] == "up"
    (stats,) = testbed.ctl("stats", tap)
    assert stats["ingress_frames"] >= 6
    assert stats["egress_frames"] >= 6


def test_uplink_that_is_deleted_takes_its_interface_along(testbed: Testbed, tap: str) -> None:
    testbed.ctl("uplink", "del", tap)
    assert tap not in {name for _, name in socket.if_nameindex()}
    assert tap not in {port["name"] for port in testbed.ctl("list-ports")}
    testbed.ctl("uplink", "add", tap)


def test_tcp_from_host_to_guest(testbed: Testbed, tap: str) -> None:
    (vm1,) = testbed.require("vm1")
    data = os.urandom(TRANSFER_LEN)
    receive(vm1, 5001)
    with socket.create_connection((vm1.ip, 5001), timeout=PATIENCE_S) as connection:
        connection.sendall(data)
    assert received_sum(vm1, 5001).split()[0] == hashlib.md5(data).hexdigest()


def test_tcp_from_guest_to_host(testbed: Testbed, tap: str) -> None:
    (vm1,) = testbed.require("vm1")
    sent = make_data(vm1, TRANSFER_LEN)
    received = hashlib.md5()
    with socket.create_server((HOST_IP, 0)) as server:
        server.settimeout(PATIENCE_S)
        port = server.getsockname()[1]
        vm1.check(f"nc {HOST_IP} {port} -e /tmp/data >/dev/null 2>&1 &")
        connection, _ = server.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            while chunk := connection.recv(1 << 16):
                received.update(chunk)
    assert received.hexdigest() == sent.split()[0]


def test_uplink_goes_down_and_up(testbed: Testbed, tap: str) -> None:
    vm1, vm2 = testbed.require("vm1", "vm2")
    assert vm1.ping(HOST_IP)
    with pinging(vm1, vm2):
        host.ip("link", "set", tap, "down")
        testbed.wait_state(tap, "down")
        assert not vm1.ping(HOST_IP, timeout_s=1)
        host.ip("link", "set", tap, "up")
        testbed.wait_state(tap, "up")
        pings_until_answered(vm2, HOST_IP)
    assert vm1.ping(HOST_IP, count=3)


def test_network_namespace_behind_a_bridge(testbed: Testbed, bridged_namespace: str) -> None:
    bridge, namespace, uplink = (f"{bridged_namespace}{suffix}" for suffix in ("br", "ns", "t"))
    testbed.ctl("uplink", "add", uplink, "--bridge", bridge)
    guests: list[Guest] = testbed.require("vm1", "vm2")
    pings_until_answered(guests[0], f"{NETWORK}.200")  # the bridge's ports may still be learning
    for guest in guests:
        assert guest.ping(f"{NETWORK}.200", count=3)
        host.ip("netns", "exec", namespace, "busybox", "ping", "-q", "-c", "2", "-W", "3", guest.ip)
    mac = host.ip("-n", namespace, "-brief", "link", "show", "eth0").split()[2]
    wait_until("the namespace's address is learned", lambda: testbed.fdb().get(mac) == uplink)
    assert uplink in host.ip("-brief", "link", "show", "master", bridge)
