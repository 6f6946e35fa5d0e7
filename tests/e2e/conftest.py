"""Fixtures of the end-to-end tests, and the logs of a test that failed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from testbed import Testbed

from vswitch.lab import process
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
