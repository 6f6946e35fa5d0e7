"""A guest moves to a QEMU on another switch. Both switches have an uplink in the same bridge."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.e2e.testbed import NETWORK, Testbed, pings_until_answered, wait_until
from tests.e2e.transfer import Transfer
from vswitch import ethertypes
from vswitch.lab.qemu.guest import Guest
from vswitch.lab.qemu.image import GuestImage

NEIGHBOUR = f"{NETWORK}.200"
INTERVAL_S = 0.02
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


@pytest.fixture(scope="module")
def other_switch(
    tmp_path_factory: pytest.TempPathFactory, guest_image: GuestImage
) -> Iterator[Testbed]:
    other = Testbed(tmp_path_factory.mktemp("other"), guest_image)
    other.switch.start()
    try:
        yield other
    finally:
        other.close()


@pytest.fixture
def uplinks(
    testbed: Testbed, other_switch: Testbed, bridged_namespace: str
) -> Iterator[tuple[str, str]]:
    """An uplink of each switch in one bridge, behind which is a network namespace, NEIGHBOUR."""
    names = f"{bridged_namespace}t", f"{bridged_namespace}u"
    for switch, name in zip((testbed, other_switch), names, strict=True):
        switch.ctl("uplink", "add", name, "--bridge", f"{bridged_namespace}br")
    try:
        yield names
    finally:
        other_switch.ctl("uplink", "del", names[1])


@contextmanager
def both_ends(
    testbed: Testbed, other_switch: Testbed, options: str
) -> Iterator[tuple[Guest, Guest]]:
    """vm2 on the first switch, and a QEMU on the other that waits for it."""
    with (
        testbed.in_place_of("vm2", device_options=options) as source,
        other_switch.in_place_of("vm2", device_options=options, incoming=True) as target,
    ):
        for switch, guest in ((testbed, source), (other_switch, target)):
            switch.ctl("add-port", "vm2", switch.socket("vm2"))
            guest.start()
        source.wait_up()
        testbed.wait_state("vm2", "ready")
        other_switch.wait_state("vm2", "connected")
        pings_until_answered(source, NEIGHBOUR)
        yield source, target


WATCH = """
import socket, sys
source = bytes.fromhex(sys.argv[1].replace(":", ""))
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
raw.bind(("eth0", 3))
print("watching", flush=True)
while True:
    frame = raw.recv(65535)
    if frame[6:12] == source:
        request = frame[12:14] == b"\\x08\\0" and frame[23] == 1 and frame[34] == 8
        number = int.from_bytes(frame[40:42]) if request else -1
        print(int.from_bytes(frame[12:14]), number, flush=True)
"""


class Watch:
    """Notes what comes from a MAC address to the neighbour, in a file."""

    def __init__(self, namespace: str, mac: str, notes: Path) -> None:
        self._notes = notes
        with notes.open("w") as file:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, sys.executable, "-c", WATCH, mac], stdout=file
            )
        wait_until("somebody watches", lambda: notes.read_text().startswith("watching\n"))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()

    def _seen(self) -> list[tuple[int, int]]:
        whole = self._notes.read_text().rpartition("\n")[0]
        return [(int(a), int(b)) for a, b in (line.split() for line in whole.splitlines()[1:])]

    def ethertypes(self) -> set[int]:
        return {ethertype for ethertype, _ in self._seen()}

    def requests(self) -> list[int]:
        """Sequence numbers of the echo requests, as they came."""
        return [number for _, number in self._seen() if number >= 0]

    def latest(self, guest: Guest) -> int:
        """The number of a request that is no earlier than any sent before now.

        What `guest` asks the neighbour is answered after all of these, and noted after them.
        """

        def answers() -> int:
            return self._seen().count((ethertypes.IPV4, -1))

        before = answers()
        assert guest.ping(NEIGHBOUR)
        wait_until("all until now is noted", lambda: answers() > before)
        return self.requests()[-1]


def test_it_moves_while_it_sends_and_receives(
    testbed: Testbed,
    other_switch: Testbed,
    bridged_namespace: str,
    uplinks: tuple[str, str],
    tmp_path: Path,
) -> None:
    """All that it sends arrives, once. Of the answers some may reach where it was."""
    [vm1] = testbed.require("vm1")
    with both_ends(testbed, other_switch, "") as (source, target), ExitStack() as watching:
        mac = source.settings.mac
        boot = source.check(BOOT_ID)
        watch = watching.enter_context(Watch(f"{bridged_namespace}ns", mac, tmp_path / "notes"))
        source.check(
            f"ping -i {INTERVAL_S} {NEIGHBOUR} >/tmp/ping.log 2>&1 & echo $! >/tmp/ping.pid"
        )
        transfer = Transfer(vm1, source, 20_000_000, until_told=True)
        assert testbed.fdb()[mac] == "vm2"
        transfer.moves_on()
        wait_until("it pings", lambda: len(watch.requests()) > 50)
        source.migrate_to(target, tmp_path / "migration.sock")
        transfer.goes_on_in(target)
        other_switch.wait_state("vm2", "ready")
        wait_until("its new switch knows it", lambda: other_switch.fdb().get(mac) == "vm2")
        wait_until("its old one does", lambda: testbed.fdb().get(mac) == uplinks[0])
        target.check(
            "until=$(($(grep -c ' seq=' /tmp/ping.log) + 50))\n"
            "while [ $(grep -c ' seq=' /tmp/ping.log) -lt $until ]; do usleep 20000; done"
        )
        transfer.finish(100)
        said = target.check(
            "kill -INT $(cat /tmp/ping.pid)\n"
            "until grep -q loss /tmp/ping.log; do usleep 10000; done; cat /tmp/ping.log"
        )
        assert target.check(BOOT_ID) == boot
        found = re.search(r"(\d+) packets transmitted", said)
        assert found is not None
        sent = int(found[1])
        # Another one, a 0, comes after all of them.
        assert target.ping(NEIGHBOUR)
        wait_until("the last has come", lambda: watch.requests()[1:].count(0))
        assert watch.requests() == [*range(sent), 0]
        answered = [int(number) for number in re.findall(r" seq=(\d+) ", said)]
        # The last ones may have been on their way when it ended.
        missing = sorted(set(range(answered[-1])) - set(answered))
        if missing:
            assert missing == list(range(missing[0], missing[-1] + 1))


@pytest.mark.parametrize("how", ["rarp", pytest.param("announce", marks=pytest.mark.slow)])
def test_neighbours_learn_from_the_announcement(
    testbed: Testbed,
    other_switch: Testbed,
    bridged_namespace: str,
    uplinks: tuple[str, str],
    tmp_path: Path,
    how: str,
) -> None:
    """A guest that sends nothing. The switch says RARP if its driver cannot announce itself."""
    [vm1] = testbed.require("vm1")
    options = "guest_announce=off" if how == "rarp" else ""
    with both_ends(testbed, other_switch, options) as (source, target):
        mac = source.settings.mac
        assert vm1.ping(source.ip)
        source.check("echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6")
        with Watch(f"{bridged_namespace}ns", mac, tmp_path / "notes") as watch:
            source.migrate_to(target, tmp_path / "migration.sock")
            wait_until("its new switch knows it", lambda: other_switch.fdb().get(mac) == "vm2")
            wait_until("its old one does", lambda: testbed.fdb().get(mac) == uplinks[0])
            wait_until("the neighbour hears it", watch.ethertypes)
            assert watch.ethertypes() == {ethertypes.RARP if how == "rarp" else ethertypes.ARP}
        assert vm1.ping(target.ip, count=3)
        assert target.ping(NEIGHBOUR, count=3)


class PingsFromOutside:
    """Echo requests from the neighbour, fifty a second."""

    def __init__(self, namespace: str, address: str, log: Path) -> None:
        self._log = log
        words = ["ip", "netns", "exec", namespace, "busybox", "ping", "-i", f"{INTERVAL_S}"]
        with log.open("w") as file:
            self._process = subprocess.Popen([*words, address], stdout=file)

    def __enter__(self) -> PingsFromOutside:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()

    def answered(self) -> list[int]:
        """Numbers of the requests that were, in the order of the answers."""
        whole = self._log.read_text().rpartition("\n")[0]
        return [int(number) for number in re.findall(r" seq=(\d+) ", whole)]

    def wait_answered_beyond(self, number: int) -> None:
        wait_until(
            "requests from outside are answered",
            lambda: sum(one > number for one in self.answered()) >= 20,
        )


@pytest.mark.slow
def test_a_neighbour_loses_one_piece(
    testbed: Testbed,
    other_switch: Testbed,
    bridged_namespace: str,
    uplinks: tuple[str, str],
    tmp_path: Path,
) -> None:
    """All that it sends before or after nobody runs the guest is answered.

    It runs again where its port is ready there, and the others know it is there by then.
    """
    namespace = f"{bridged_namespace}ns"
    inside = ["ip", "netns", "exec", namespace, "cat", "/sys/class/net/eth0/address"]
    mac = subprocess.run(inside, capture_output=True, text=True, check=True).stdout.strip()
    guest_mac = testbed.settings("vm2").mac
    # The driver cannot announce itself: only the switch ever says RARP.
    with (
        both_ends(testbed, other_switch, "guest_announce=off") as (source, target),
        Watch(namespace, guest_mac, tmp_path / "guest") as guest,
        Watch(namespace, mac, tmp_path / "neighbour") as watch,
        PingsFromOutside(namespace, source.ip, tmp_path / "pings") as pings,
    ):
        pings.wait_answered_beyond(0)
        source.migrate_to(target, tmp_path / "migration.sock")
        other_switch.wait_state("vm2", "ready")
        wait_until("the neighbour hears it", lambda: ethertypes.RARP in guest.ethertypes())
        wait_until("its old switch does", lambda: testbed.fdb().get(guest_mac) == uplinks[0])
        after = watch.latest(target)
        pings.wait_answered_beyond(after)
        answered = pings.answered()
    assert len(set(answered)) == len(answered)
    lost = sorted(set(range(answered[-1])) - set(answered))
    print(f"{len(lost)} of {answered[-1]} were lost")
    if lost:
        assert lost == list(range(lost[0], lost[-1] + 1))
        assert lost[-1] <= after
