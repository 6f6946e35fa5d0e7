"""Frames of a switch that was killed: what the next one makes of them, and of notes that are stale.

A kill is made by hand: what the worker stored last in its turn is taken back, which leaves the
memory of a worker that died before those stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.frames import frames, mac
from tests.support.notes import Notes
from tests.support.rig import ALL, Rig, stepping
from vswitch.fastpath.main.port import Port
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.guest.raw import DESC_LEN
from vswitch.vhost_user.protocol import Feature

SENDER, RECEIVER = 1, 2
TRANSMITQ = 1
BURST = 64
SIZE = 128
FORMATS = {"split": Feature(0), "packed": Feature.RING_PACKED}


def some(count: int, tag: int = 0) -> list[bytes]:
    return frames(mac(RECEIVER), mac(SENDER), [60] * count, tag)


class Lives:
    """Two guests and one switch after the other; the sender's rings are known again by notes."""

    def __init__(self, stack: ExitStack, format: str) -> None:
        self._stack = stack
        self.notes = stack.enter_context(Notes())
        self.rig = stack.enter_context(stepping())
        self.features = ALL | FORMATS[format]
        self.sender, self.port = self.guest(SENDER, self.features, notes=self.notes)
        self.receiver, _ = self.guest(RECEIVER)

    def guest(
        self, n: int, features: int = ALL, notes: Notes | None = None
    ) -> tuple[SoftwareGuest, Port]:
        return self.rig.guest(n, features, notes=notes, queue_size=SIZE, max_frame_len=1518)

    def next(self) -> Rig:
        """Another switch, which knows what is in memory and in the notes."""
        self.rig = self._stack.enter_context(stepping())
        self.port = self.rig.plug(self.sender, SENDER, self.notes)
        self.rig.plug(self.receiver, RECEIVER)
        return self.rig

    def reboot(self) -> None:
        """The sender's rings begin anew in the same places."""
        for queue in self.sender.queues():
            layout = queue.layout
            self.sender.memory.write(layout.desc_gpa, bytes(DESC_LEN * layout.size))
            self.sender.memory.write(layout.avail_gpa, bytes(6 + 2 * layout.size))
            self.sender.memory.write(layout.used_gpa, bytes(6 + 8 * layout.size))
        self.sender.build_offline(self.sender.features)

    def offer(self, sent: list[bytes]) -> None:
        assert self.sender.transmitqs[0].ring.send(sent, 0, None) == len(sent)

    def turn(self, sent: list[bytes]) -> None:
        """The frames cross, and are given back."""
        self.offer(sent)
        assert self.rig.turn() == len(sent)
        self.check_arrived(sent)

    def turn_and_be_killed(self, sent: list[bytes]) -> None:
        """The frames cross, and the worker dies before it gives back any."""
        layout = self.sender.transmitqs[0].layout
        place, length = layout.used_gpa, 6 + 8 * layout.size
        if self.sender.transmitqs[0].ring.packed:
            place, length = layout.desc_gpa, DESC_LEN * layout.size
        self.offer(sent)
        before = self.sender.memory.read(place, length)
        assert self.rig.turn() == len(sent)
        self.sender.memory.write(place, before)
        assert self.sender.transmitqs[0].ring.reap() == 0

    def check_arrived(self, sent: list[bytes]) -> None:
        """These and no others; and the sender has all of its buffers."""
        assert self.receiver.poll_frames(2 * SIZE) == sent
        ring = self.sender.transmitqs[0].ring
        ring.reap()
        assert ring.outstanding == 0


@pytest.fixture(params=FORMATS)
def lives(request: pytest.FixtureRequest) -> Iterator[Lives]:
    with ExitStack() as stack:
        yield Lives(stack, request.param)


split_only = pytest.mark.parametrize("lives", ["split"], indirect=True)


def test_no_frame_is_delivered_twice(lives: Lives) -> None:
    """What was delivered before the kill is given back unsent, what was not taken yet is sent."""
    for round in range(12):
        taken, later = some(5 + 3 * round, 1000 * round), some(round, 1000 * round + 500)
        lives.turn_and_be_killed(taken)
        lives.offer(later)
        assert lives.next().turn() == len(later)
        lives.check_arrived(taken + later)


def test_killed_again_before_its_first_turn(lives: Lives) -> None:
    taken, later = some(9), some(4, 100)
    lives.turn_and_be_killed(taken)
    lives.next()
    lives.offer(later)
    assert lives.next().turn() == len(later)
    lives.check_arrived(taken + later)


@split_only
@pytest.mark.parametrize(
    ("bursts", "offered"),
    [([5, 5], 20), ([5, 5], 5), ([5], 2), ([BURST], BURST - 1)],
    ids=["used before", "used before, as many", "more than there is", "one less than there were"],
)
def test_a_fresh_ring_is_not_taken_for_the_old_one(
    lives: Lives, bursts: list[int], offered: int
) -> None:
    """The guest reboots while there is no switch, and has frames there when there is one."""
    for tag, count in enumerate(bursts):
        lives.turn(some(count, 100 * tag))
    lives.reboot()
    sent = some(offered, 1000)
    lives.offer(sent)
    assert lives.next().turn() == len(sent)
    lives.check_arrived(sent)


@split_only
def test_notes_of_a_ring_that_was_stopped_say_nothing_of_the_next(lives: Lives) -> None:
    """As many frames as crossed at first are there when a later switch is killed before a turn."""
    lives.turn(some(5))
    for ring in lives.port.rings.values():
        ring.forget_journal()
    lives.reboot()
    lives.next()
    sent = some(5, 1000)
    lives.offer(sent)
    assert lives.next().turn() == len(sent)
    lives.check_arrived(sent)


@split_only
def test_notes_of_more_than_a_burst_are_not_believed(lives: Lives) -> None:
    """A frontend may keep them, and write to them."""
    lives.turn(some(3))
    sent = some(BURST + 10, 100)
    lives.offer(sent)
    lives.notes.note_taken(TRANSMITQ, 3 + BURST + 1, 3)
    rig = lives.next()
    assert rig.turn() == BURST
    assert rig.turn() == 10
    lives.check_arrived(sent)


@split_only
def test_a_ring_that_holds_too_much_is_at_fault_whatever_was_noted(lives: Lives) -> None:
    """Not two frames later, when the rest would fit."""
    lives.turn_and_be_killed(some(3))
    raw = lives.sender.transmitqs[0].raw
    raw.avail_idx = SIZE + 2
    assert lives.next().turn() == 0
    fault = lives.port.rings[TRANSMITQ].fault
    assert fault is not None
    assert fault[0] == "avail-index"
    assert raw.used_idx == 0
