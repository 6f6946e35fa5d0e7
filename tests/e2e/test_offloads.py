"""TCP between guests whose offloads differ, and between a guest and a network namespace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.testbed import NETWORK, Kind, Testbed, pings_until_answered, protocol_counters
from tests.e2e.transfer import Transfer, make_data
from vswitch.lab.qemu.guest import Guest

LEN = 5_000_000
FULL_FRAME_LEN = 1518  # with a VLAN tag
"""Longer ones are segments that were left to somebody else, if only two at a time: TCP makes them
no longer than what the network carries in a millisecond."""

_NOT_RECEIVING = "guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off"
_NOT_SENDING = "csum=off,host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off"

KINDS = {
    "all": Kind(),
    "none": Kind(port_options=("--offloads", "off")),
    "csum": Kind(port_options=("--offloads", "csum")),
    "tso4": Kind(port_options=("--offloads", "csum,tso4")),
    "tso6": Kind(port_options=("--offloads", "csum,tso6")),
    "sends": Kind({"device_options": _NOT_RECEIVING}),
    "receives": Kind({"device_options": _NOT_SENDING}),
    "big-buffers": Kind({"mrg_rxbuf": False}),
    "packed": Kind({"packed": True}),
    "legacy": Kind({"modern": False}),
}


def negotiated(testbed: Testbed, guest: Guest, prefix: str) -> set[str]:
    """A guest's offloads that begin with HOST_ (or are CSUM), or with GUEST_."""
    known = {"CSUM", "TSO4", "TSO6"}
    names = testbed.show(guest.name)["feature_names"]
    without = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return known & (without | ({"CSUM"} & set(names) if prefix == "HOST_" else set()))


class Lengths:
    """How long the frames of a port's two directions are from now on."""

    def __init__(self, testbed: Testbed, port: str) -> None:
        self._testbed, self._port = testbed, port
        self._before = self._stats()

    def _stats(self) -> dict[str, int]:
        (stats,) = self._testbed.ctl("stats", self._port)
        return stats  # type: ignore[no-any-return]

    def mean(self, direction: str) -> float:
        """Bytes of a frame into the switch (`ingress`) or out of it (`egress`), the mean."""
        now = self._stats()
        frames, length = (
            now[key] - self._before[key] for key in (f"{direction}_frames", f"{direction}_bytes")
        )
        return length / frames


def wrong_checksums(guest: Guest) -> int:
    """Segments and datagrams that a guest has thrown away for their checksums."""
    return sum(counters.get("InCsumErrors", 0) for counters in protocol_counters(guest).values())


def more_addresses(guest: Guest) -> tuple[str, str]:
    """Give a guest an IPv6 address, and an IPv4 address behind a VLAN tag."""
    number = guest.ip.rpartition(".")[2]
    guest.check(
        "echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad\n"
        f"ip address add fd77::{number}/64 dev eth0\n"
        "ip link add link eth0 name tagged type vlan id 77\n"
        f"ip address add 10.78.0.{number}/24 dev tagged\n"
        "ip link set tagged up\n"
    )
    return f"fd77::{number}", f"10.78.0.{number}"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("all", "none"),
        pytest.param("tso4", "tso6", marks=pytest.mark.slow),
        ("sends", "receives"),
        pytest.param("all", "csum", marks=pytest.mark.slow),
        pytest.param("csum", "none", marks=pytest.mark.slow),
        pytest.param("big-buffers", "csum", marks=pytest.mark.slow),
        pytest.param("packed", "none", marks=pytest.mark.slow),
        pytest.param("packed", "big-buffers", marks=pytest.mark.slow),
        pytest.param("legacy", "tso4", marks=pytest.mark.slow),
        pytest.param("legacy", "packed", marks=pytest.mark.slow),
        pytest.param("receives", "none", marks=pytest.mark.slow),
        pytest.param("sends", "all", marks=pytest.mark.slow),
    ],
)
def test_offloads_that_differ(testbed: Testbed, one: str, other: str) -> None:
    with testbed.kinds(vm2=KINDS[one], vm3=KINDS[other]) as guests:
        addresses = {guest.name: more_addresses(guest) for guest in guests}
        for sender, receiver in (guests, reversed(guests)):
            sent = negotiated(testbed, sender, "HOST_")
            received = negotiated(testbed, receiver, "GUEST_")
            made = make_data(sender, LEN)
            ipv6, tagged = addresses[receiver.name]
            for address, tso in ((receiver.ip, "TSO4"), (ipv6, "TSO6"), (tagged, "TSO4")):
                into, out = Lengths(testbed, sender.name), Lengths(testbed, receiver.name)
                Transfer(sender, receiver, LEN, address=address, made=made).finish()
                assert (into.mean("ingress") > FULL_FRAME_LEN) == (tso in sent)
                assert (out.mean("egress") > FULL_FRAME_LEN) == (tso in sent & received)
        for guest in guests:
            assert wrong_checksums(guest) == 0
            assert not testbed.ctl("stats", guest.name)[0]["drops"].keys() & BAD_OFFLOADS


BAD_OFFLOADS = {"offload-unnegotiated", "bad-csum", "bad-gso"}


# Not rx: Linux cannot change it without CTRL_GUEST_OFFLOADS. "sends" is a guest without it.
SWITCHED_OFF = ["", "tx", "sg", "tso", "gso", "gro", "tso gso", "tx sg tso gso gro"]


@pytest.mark.parametrize(("one_off", "other_off"), [("tso gso", "gro"), ("tx", "")])
def test_offloads_are_switched_in_the_guest(testbed: Testbed, one_off: str, other_off: str) -> None:
    transfers_with(testbed, one_off, other_off, LEN)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", range(len(SWITCHED_OFF) - 1))
def test_every_combination_that_differs(testbed: Testbed, first: int) -> None:
    """Each with each of the others, a gigabyte in all."""
    for other_off in SWITCHED_OFF[first + 1 :]:
        transfers_with(testbed, SWITCHED_OFF[first], other_off, 18_000_000)


def transfers_with(testbed: Testbed, one_off: str, other_off: str, size: int) -> None:
    """TCP both ways between guests that go without offloads, by their names in `ethtool -K`."""
    vm1, vm2 = testbed.require("vm1", "vm2")
    with switched_off(vm1, one_off.split()), switched_off(vm2, other_off.split()):
        for sender, receiver in ((vm1, vm2), (vm2, vm1)):
            Transfer(sender, receiver, size).finish()
    for guest in (vm1, vm2):
        assert wrong_checksums(guest) == 0


@contextmanager
def switched_off(guest: Guest, names: list[str]) -> Iterator[None]:
    """Have a guest go without offloads for the block."""
    before = guest.check("ethtool -k eth0")
    if names:
        guest.check("ethtool -K eth0 " + " ".join(f"{name} off" for name in names))
        assert guest.check("ethtool -k eth0") != before
    try:
        yield
    finally:
        if names:
            guest.check("ethtool -K eth0 tx on sg on tso on gso on gro on")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("one", "other"), [("all", "none"), ("none", "all"), ("packed", "all"), ("all", "packed")]
)
def test_a_gigabyte(testbed: Testbed, one: str, other: str) -> None:
    with testbed.kinds(vm2=KINDS[one], vm3=KINDS[other]) as (vm2, vm3):
        Transfer(vm2, vm3, 1_000_000_000).finish(700)


PEER = """
import hashlib, socket, sys
address, what, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
server = socket.create_server((address, 0))
server.settimeout(60)
print(server.getsockname()[1], flush=True)
connection, _ = server.accept()
connection.settimeout(60)
content = hashlib.md5()
if what == "send":
    sent = 0
    while sent < size:
        block = sent.to_bytes(8, "little") * 125_000
        content.update(block)
        connection.sendall(block)
        sent += len(block)
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)
else:
    while block := connection.recv(1 << 20):
        content.update(block)
print(content.hexdigest())
"""


@contextmanager
def peer(namespace: str, what: str, size: int = 0) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A process in a network namespace that takes one connection; the port it listens at."""
    words = ["ip", "netns", "exec", namespace, sys.executable, "-c", PEER]
    with subprocess.Popen(
        [*words, f"{NETWORK}.200", what, str(size)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline()), process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("guest_kind", "uplink_options", "size"),
    [
        ("all", (), 50_000_000),
        ("none", ("--offloads", "off"), 20_000_000),
        pytest.param("all", ("--offloads", "off"), 100_000_000, marks=pytest.mark.slow),
        pytest.param("none", (), 100_000_000, marks=pytest.mark.slow),
        pytest.param("packed", (), 100_000_000, marks=pytest.mark.slow),
        pytest.param("all", (), 1_000_000_000, marks=pytest.mark.slow),
        pytest.param("none", ("--offloads", "off"), 1_000_000_000, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(900)
def test_guest_and_network_namespace(
    testbed: Testbed,
    bridged_namespace: str,
    guest_kind: str,
    uplink_options: tuple[str, ...],
    size: int,
) -> None:
    uplink = f"{bridged_namespace}t"
    with testbed.kinds(vm3=KINDS[guest_kind]) as (vm3,):
        testbed.ctl("uplink", "add", uplink, "--bridge", f"{bridged_namespace}br", *uplink_options)
        pings_until_answered(vm3, f"{NETWORK}.200")
        sent = make_data(vm3, size)
        port = Lengths(testbed, "vm3")
        with peer(f"{bridged_namespace}ns", "receive") as (number, process):
            vm3.check(f"nc {NETWORK}.200 {number} -e /tmp/data", size / 1e6 + 30)
            assert process.communicate(timeout=60)[0].split() == sent.split()[:1]
        assert (port.mean("ingress") > FULL_FRAME_LEN) == (guest_kind != "none")
        tap, port = Lengths(testbed, uplink), Lengths(testbed, "vm3")
        with peer(f"{bridged_namespace}ns", "send", size) as (number, process):
            vm3.check("echo 'md5sum >/tmp/sum' >/tmp/receive; chmod +x /tmp/receive")
            vm3.check(f"nc {NETWORK}.200 {number} -e /tmp/receive", size / 1e6 + 30)
            received = vm3.check("cat /tmp/sum").split()[0]
            assert process.communicate(timeout=60)[0].split() == [received]
        assert (tap.mean("ingress") > FULL_FRAME_LEN) == (not uplink_options)
        on = guest_kind != "none" and not uplink_options
        assert (port.mean("egress") > FULL_FRAME_LEN) == on
        assert wrong_checksums(vm3) == 0


CTRL_GUEST_OFFLOADS = 2


def test_offloads_that_a_guest_changes_and_nobody_tells(testbed: Testbed) -> None:
    """QEMU lets it although the switch does not offer it, unless it is told not to."""
    told_not_to = Kind({"device_options": "ctrl_guest_offloads=off"})
    [vm1] = testbed.require("vm1")
    with testbed.kinds(vm2=Kind(), vm3=told_not_to) as guests:
        for guest, may in zip(guests, (True, False), strict=True):
            bits = guest.check("cat /sys/class/net/eth0/device/features")
            assert bits[CTRL_GUEST_OFFLOADS] == "01"[may]
            assert "CTRL_GUEST_OFFLOADS" not in testbed.show(guest.name)["feature_names"]
            done = guest.run("ethtool -K eth0 rx-gro-hw off")
            assert (done.exit_code == 0) == may, done.output
            # What Linux itself does with long frames that it no longer expects is to take them.
            Transfer(vm1, guest, 5_000_000).finish()
