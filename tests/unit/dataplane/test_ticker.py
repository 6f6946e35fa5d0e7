"""What is done once a second is done in parts, and never twice at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest

from vswitch.dataplane import ticker
from vswitch.dataplane.ticker import Ticker


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticker, "PERIOD_S", 0.001)


def test_a_round_that_goes_on_is_not_begun_anew() -> None:
    """Others are, meanwhile; it takes a turn of the loop a part."""
    done: list[str] = []

    async def run() -> None:
        enough = asyncio.Event()

        def at_once() -> None:
            done.append("at once")
            if done.count("at once") >= 3:
                enough.set()

        def long() -> Iterator[None]:
            done.append("begun")
            while not enough.is_set():
                yield
            done.append("ended")
            again.set()

        again = asyncio.Event()
        rounds = Ticker(at_once, long)
        rounds.start()
        assert done == ["at once", "begun"]
        await again.wait()
        rounds.stop()

    asyncio.run(run())
    assert done == ["at once", "begun", "at once", "at once", "ended"]


def test_nothing_is_begun_or_goes_on_after_the_end() -> None:
    async def run() -> None:
        parts = 0

        def endless() -> Iterator[None]:
            nonlocal parts
            while True:
                parts += 1
                yield

        rounds = Ticker(endless)
        rounds.start()
        while parts < 3:
            await asyncio.sleep(0)
        rounds.stop()
        for _ in range(10):
            await asyncio.sleep(0)
        assert parts == 3

    asyncio.run(run())


def test_one_that_fails_is_begun_anew(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        begun = 0
        again = asyncio.Event()

        def failing() -> Iterator[None]:
            nonlocal begun
            begun += 1
            if begun == 3:
                again.set()
            yield
            raise ValueError("of a round")

        rounds = Ticker(failing)
        rounds.start()
        await again.wait()
        rounds.stop()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert "of a round" in caplog.text
