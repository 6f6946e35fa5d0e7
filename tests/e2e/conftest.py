"""Fixtures of the end-to-end tests, and the logs of a test that failed."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.e2e.testbed import NETWORK, Testbed
from vswitch.lab.errors import LabError
from vswitch.lab.qemu import host, process
from vswitch.lab.qemu.distribution import DEBIAN_13
from vswitch.lab.qemu.image import GuestImage, ensure_image


@pytest.fixture(
    scope="session", params=["system", pytest.param("debian13", marks=pytest.mark.slow)]
)
def guest_image(request: pytest.FixtureRequest) -> GuestImage:
    """QEMU and the guests' kernel: the system's, and with `make test-all` those of Debian 13."""
    if request.param == "system":
        return ensure_image()
    try:
        return ensure_image(distribution=DEBIAN_13)
    except LabError as error:
        reason = f"QEMU and kernel of Debian 13 cannot be had: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def running_testbed(
    tmp_path_factory: pytest.TempPathFactory, guest_image: GuestImage
) -> Iterator[Testbed]:
    """The testbed, kept over all tests: booting takes longer than most of them."""
    testbed = Testbed(tmp_path_factory.mktemp("e2e"), guest_image)
    try:
        yield testbed
    finally:
        testbed.close()


@pytest.fixture
def testbed(running_testbed: Testbed, request: pytest.FixtureRequest) -> Testbed:
    request.node.stash[_TESTBED] = running_testbed
    return running_testbed


@pytest.fixture
def bridged_namespace(testbed: Testbed) -> Iterator[str]:
    """TAG of a bridge TAGbr and a network namespace TAGns behind it, at .200 of the lab's network.

    An uplink TAGt is for the test to add; it is gone afterwards.
    """
    if not testbed.switch.running:
        testbed.switch.start()
    tag = f"e{os.getpid()}"
    bridge, veth, namespace, uplink = f"{tag}br", f"{tag}v", f"{tag}ns", f"{tag}t"
    host.ip("netns", "add", namespace)
    try:
        host.ip("link", "add", bridge, "type", "bridge")
        host.ip("link", "add", veth, "type", "veth", "peer", "eth0", "netns", namespace)
        host.ip("link", "set", veth, "master", bridge, "up")
        host.ip("link", "set", bridge, "up")
        host.ip("-n", namespace, "address", "add", f"{NETWORK}.200/24", "dev", "eth0")
        host.ip("-n", namespace, "link", "set", "eth0", "up")
        yield tag
    finally:
        if uplink in {port["name"] for port in testbed.ctl("list-ports")}:
            testbed.ctl("uplink", "del", uplink)
        # The kernel would remove the veth with the namespace, but later: it goes first.
        for interface in (veth, bridge):
            if interface in {name for _, name in socket.if_nameindex()}:
                host.ip("link", "del", interface)
        host.ip("netns", "del", namespace)


GUEST_PAGES = 80  # of 2 MiB, what a guest of 160 MiB takes
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Free pages of 2 MiB for two guests."""
    count = _POOL / "nr_hugepages"
    before, free = int(count.read_text()), int((_POOL / "free_hugepages").read_text())
    wanted = before + max(0, 2 * GUEST_PAGES - free)
    try:
        count.write_text(f"{wanted}")
        assert int(count.read_text()) >= wanted, "the kernel found too few huge pages"
        yield
    finally:
        count.write_text(f"{before}")


@pytest.fixture
def hugetlbfs(tmp_path: Path, huge_pages: None) -> Iterator[Path]:
    """A hugetlbfs of our own."""
    mount = tmp_path / "huge"
    mount.mkdir()
    subprocess.run(
        ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", mount], check=True, timeout=10
    )
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True, timeout=10)


_TESTBED = pytest.StashKey[Testbed]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    testbed = item.stash.get(_TESTBED, None)
    if report.failed and testbed is not None:
        report.sections.append(("the switch's log", process.tail(testbed.log, 60)))
        for guest in testbed.guests.values():
            report.sections.append((f"guest {guest.name}", guest.logs()))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start guests of their own run first, while the testbed's are not there yet."""
    items.sort(key=lambda item: "testbed" in getattr(item, "fixturenames", ()))
