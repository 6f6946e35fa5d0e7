"""A short soak of its own seed; `make soak MINUTES=...` is the long one."""

from __future__ import annotations

from random import Random

import pytest

from tests.soak.crasher import unwrap
from tests.soak.soak import soak
from tests.soak.traffic import SoakError, Station, mac_of, make_frame


@pytest.mark.slow
def test_a_short_soak(tmp_path_factory: pytest.TempPathFactory) -> None:
    done = soak(20.0, 1, tmp_path_factory.mktemp("s"), print)
    for what in (
        "ports that came and went", "reboots", "killed guests", "memory tables changed",
        "bursts of noise", "overruns", "frames of killed guests",
    ):  # fmt: skip
        assert done[what] > 0, what
    assert done["killed switches"] + done["stopped switches"] > 1
    assert done["frames checked by those who stayed"] > 10_000
    assert done["frames: no-buffer"]
    assert done["frames: egress"]


# What the stations would notice.


@pytest.fixture
def station() -> Station:
    return Station(1, 1, Random(1))


def test_a_frame_is_taken_once_and_in_order(station: Station) -> None:
    frames = [make_frame(7, 2, 1, n, 100) for n in range(3)]
    station._check(frames[0])
    station._check(frames[2])
    for late in (frames[2], frames[1]):
        with pytest.raises(SoakError, match="after 2"):
            station._check(late)
    station._check(make_frame(8, 2, 1, 0, 100))


@pytest.mark.parametrize("at", [0, 8, 13, 14, 20, 30, 99])
def test_a_changed_byte_is_noticed(station: Station, at: int) -> None:
    frame = bytearray(make_frame(7, 2, 1, 0, 100))
    frame[at] ^= 1
    with pytest.raises(SoakError, match="corrupt"):
        station._check(bytes(frame))


def test_a_frame_for_somebody_else_is_noticed(station: Station) -> None:
    with pytest.raises(SoakError, match="from s2 to s3"):
        station._check(make_frame(7, 2, 3, 0, 100))
    with pytest.raises(SoakError, match="10 bytes"):
        station._check(mac_of(1) + bytes(4))


def test_unwrapping() -> None:
    assert unwrap(5, 3) == 5
    assert unwrap(2, 0x1FFFF) == 0x20002
    assert unwrap(0xFFF0, 0x20001) == 0x1FFF0
