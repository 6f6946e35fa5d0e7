"""User Mode Linux as a frontend: an implementation of its own, in the kernel's tree.

It notifies by messages, never says GET_VRING_BASE, and passes on whatever is offered.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.testbed import NETWORK, Testbed, wait_until
from tests.e2e.transfer import Transfer
from tests.support.distribution import why_missing
from vswitch.lab.programs import find
from vswitch.lab.qemu.command_line import GuestSettings
from vswitch.lab.qemu.image import GuestImage
from vswitch.lab.qemu.uml import UML, UmlGuest, build_image
from vswitch.lab.requirements import is_ubuntu

pytestmark = pytest.mark.skipif(
    find(UML) is None, reason=why_missing("User Mode Linux", packaged=not is_ubuntu())
)
TRANSFER_LEN = 20_000_000


@pytest.fixture(scope="module")
def uml_image(tmp_path_factory: pytest.TempPathFactory) -> GuestImage:
    return build_image(tmp_path_factory.mktemp("uml"))


@pytest.fixture
def umls(testbed: Testbed, uml_image: GuestImage) -> Iterator[list[UmlGuest]]:
    """Two guests on ports of their own, up and on the wire."""
    if not testbed.switch.running:
        testbed.switch.start()
    guests = []
    for number, name in enumerate(("uml1", "uml2"), 11):
        settings = GuestSettings(
            name=name,
            socket=testbed.socket(name),
            mac=f"52:54:00:77:00:{number:02x}",
            ip=f"{NETWORK}.{number}/24",
            memory_mib=96,
        )
        guests.append(UmlGuest(settings, uml_image, testbed.directory))
    try:
        for guest in guests:
            testbed.ctl("add-port", guest.name, guest.settings.socket, "--frontend", "uml")
            guest.start()
        for guest in guests:
            guest.wait_up()
            guest.check(f"ip link set eth0 address {guest.settings.mac}")
            testbed.wait_state(guest.name, "ready")
        yield guests
    finally:
        for guest in guests:
            guest.stop()
            testbed.ctl("del-port", guest.name)


def test_they_ping_and_move_data(testbed: Testbed, umls: list[UmlGuest]) -> None:
    uml1, uml2 = umls
    (vm1,) = testbed.require("vm1")
    for target in (uml2, vm1):
        assert uml1.ping(target.ip, count=10)
    for sender, receiver in ((uml1, uml2), (uml2, uml1), (uml1, vm1), (vm1, uml1)):
        Transfer(sender, receiver, TRANSFER_LEN).finish()
    shown = testbed.show("uml1")
    assert {"INBAND_NOTIFICATIONS", "BACKEND_REQ"} <= set(shown["protocol_feature_names"])
    assert {"CTRL_VQ", "MQ", "ACCESS_PLATFORM", "RING_PACKED"} <= set(shown["withheld"])
    assert (shown["error"], shown["warning"]) == (None, None)


def test_a_driver_is_reloaded(testbed: Testbed, umls: list[UmlGuest]) -> None:
    """Its frontend disables the rings and says no more; the guest uses their memory otherwise."""
    uml1, uml2 = umls
    start = testbed.log_len()
    for _ in range(3):
        uml1.reload_driver()
        testbed.wait_state("uml1", "ready")
        wait_until("uml1 reaches uml2", lambda: uml1.ping(uml2.ip, count=3, timeout_s=5))
    Transfer(uml1, uml2, TRANSFER_LEN).finish()
    Transfer(uml2, uml1, TRANSFER_LEN).finish()
    logged = testbed.logged_after(start)
    assert "ERROR" not in logged
    assert "WARNING" not in logged
    assert testbed.show("uml1")["connects"] == 1


def test_nothing_of_them_is_left(umls: list[UmlGuest]) -> None:
    """A kernel's process has its users' processes below it, which it only traces."""
    uml1, _ = umls
    uml1.check("sleep 1000 >/dev/null 2>&1 &")

    def left() -> list[str]:
        return [
            path.parent.name
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if f"umid={uml1.umid}".encode() in _read(path)
        ]

    assert len(left()) > 1
    uml1.kill()
    wait_until("all of its processes are gone", lambda: not left())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
