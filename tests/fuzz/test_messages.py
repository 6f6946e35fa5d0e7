"""Frontends and control clients that lie to a running switch; hypothesis cuts a failure down."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import control, messages
from tests.fuzz.conversations import lie, usual
from tests.fuzz.descriptors import FDS

QUICK = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
RANDOM = st.randoms(use_true_random=False)


@pytest.fixture(scope="module")
def bench() -> Iterator[messages.MessageBench]:
    bench = messages.MessageBench()
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def control_bench() -> Iterator[control.ControlBench]:
    bench = control.ControlBench()
    yield bench
    bench.close()


@QUICK
@given(rng=RANDOM, lies=st.integers(0, 6))
def test_a_frontend_that_lies(bench: messages.MessageBench, rng: Random, lies: int) -> None:
    conversation = usual(rng)
    for _ in range(lies):
        lie(rng, conversation)
    bench.run({"ops": conversation})


@pytest.mark.parametrize("kind", FDS)
def test_a_descriptor_of_another_kind(bench: messages.MessageBench, kind: str) -> None:
    """Every kind, in the place of every descriptor of a conversation, one at a time."""
    conversation = usual(Random(5))
    places = [(i, j) for i, m in enumerate(conversation) for j in range(len(m[3]))]
    assert len(places) > 5
    for i, j in places:
        changed = [[*m[:3], list(m[3]), m[4]] for m in conversation]
        changed[i][3][j] = kind
        bench.run({"ops": changed})


def test_one_message_out_of_order(bench: messages.MessageBench) -> None:
    """Every message of a conversation left out, said twice, and said first."""
    conversation = usual(Random(6))
    for i, message in enumerate(conversation):
        bench.run({"ops": conversation[:i] + conversation[i + 1 :]})
        bench.run({"ops": [*conversation[: i + 1], *conversation[i:]]})
        bench.run({"ops": [message, *conversation]})


@QUICK
@given(seed=st.integers(0, 1 << 32))
def test_a_control_client_that_lies(control_bench: control.ControlBench, seed: int) -> None:
    control_bench.run(control.make(seed))


def test_most_messages_get_far_enough_to_matter(bench: messages.MessageBench) -> None:
    """Conversations without a lie are taken to their end."""
    early = 0
    for seed in range(40):
        bench.reached.clear()
        bench.run({"ops": usual(Random(seed))})
        early += "no error" not in bench.reached
    # Some say one thing that was not negotiated, as the generator has it.
    assert early <= 5
