"""The log: what is said often is written a thousand times, then counted."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from vswitch.daemon import log


@pytest.fixture
def logged() -> Iterator[tuple[log.CalmHandler, io.StringIO]]:
    logger = logging.getLogger("vswitch")
    before = logger.handlers[:], logger.propagate, logger.level
    stream = io.StringIO()
    yield log.set_up("info", stream), stream
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


def test_a_flood_about_one_port(
    logged: tuple[log.CalmHandler, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, stream = logged
    now = time.monotonic() + 10
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: now))
    handler.tell_left_out()
    about = logging.getLogger("vswitch.port")
    for pid in range(5000):
        about.info("port %s: frontend connected (pid %s)", "loud", pid)
        if pid % 1000 == 0:
            about.info("port %s: frontend connected (pid %s)", "quiet", pid)
            about.error("port %s: fault: %s", "loud", "a ring")
    now += 0.9
    handler.tell_left_out()
    lines = stream.getvalue().splitlines()
    assert sum("loud: frontend" in line for line in lines) == log.BURST_LINES
    assert sum("quiet" in line for line in lines) == sum("fault" in line for line in lines) == 5
    assert len(lines) == log.BURST_LINES + 10
    now += 0.2
    handler.tell_left_out()
    left_out = stream.getvalue().splitlines()[len(lines) :]
    assert len(left_out) == 1
    assert left_out[0].endswith(
        "WARNING left out 4000 more lines like: port loud: frontend connected (pid %s)"
    )
    # There is room for another hundred a second, up to the whole burst.
    for seconds, room in ((0, 110), (1, 100), (60, log.BURST_LINES)):
        now += seconds
        before = stream.getvalue().count("more of it")
        for _ in range(2000):
            about.info("port %s: frontend connected (pid %s)", "loud", "more of it")
        assert abs(stream.getvalue().count("more of it") - before - room) <= 1


def test_texts_without_arguments_and_with_a_percent_sign(
    logged: tuple[log.CalmHandler, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, stream = logged
    now = time.monotonic() + 10
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: now))
    handler.tell_left_out()
    for _ in range(log.BURST_LINES + 50):
        logging.getLogger("vswitch.x").warning("100% full")
    now += 1.0
    handler.tell_left_out()
    assert stream.getvalue().endswith("left out 50 more lines like: 100% full\n")
