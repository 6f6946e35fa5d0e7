"""What all tests share: what takes root is skipped for others, and in CI nothing is skipped.

But for what this distribution has no package of: nobody can install that, and pytest's last lines
name it.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.support.distribution import UNAVAILABLE

_ROOT_FIXTURES = {
    "bridged_namespace": "makes network namespaces",
    "tap": "makes TAP interfaces",
    "huge_pages": "sets huge pages aside",
}
"""Fixtures that take root, whoever asks for them, and what for."""

_skipped: list[str] = []


def _takes_root(item: pytest.Item) -> str | None:
    """What a test does that only root may do, None if nothing."""
    if mark := item.get_closest_marker("root"):
        return str(mark.args[0])
    names = getattr(item, "fixturenames", ())
    return next((why for name, why in _ROOT_FIXTURES.items() if name in names), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if why := _takes_root(item):
            item.add_marker(pytest.mark.skip(reason=f"needs root: {why}"))


def pytest_report_collectionfinish(items: list[pytest.Item]) -> list[str]:
    if os.geteuid() == 0:
        return []
    reasons = Counter(why for item in items if (why := _takes_root(item)))
    if not reasons:
        return []
    return [
        f"not root: {reasons.total()} of {len(items)} tests are skipped, which take root for:",
        *(f"  {count:4} {why}" for why, count in reasons.most_common()),
    ]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and UNAVAILABLE not in str(report.longrepr):
        _skipped.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped and os.environ.get("CI") == "true":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped and os.environ.get("CI") == "true":
        terminalreporter.section("skipped in CI, which counts as failed", red=True)
        for name in _skipped:
            terminalreporter.line(name)
