"""Fixtures of the end-to-end tests, and the logs of a test that failed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from testbed import NETWORK, Testbed

from vswitch.lab import host, process
from vswitch.lab.image import ensure_image


@pytest.fixture(scope="session")
def running_testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """The testbed, kept over all tests: booting takes longer than most of them."""
    testbed = Testbed(tmp_path_factory.mktemp("e2e"), ensure_image())
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


_TESTBED = pytest.StashKey[Testbed]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
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
