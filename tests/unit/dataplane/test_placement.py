"""Which worker a ring is given to, by the pins of its port."""

from __future__ import annotations

import pytest

from vswitch.dataplane.placement import Placement
from vswitch.errors import NotFoundError
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.ring import Ring

TRANSMIT = 1


def test_a_pin_goes_with_its_port() -> None:
    """Another port of that name begins where there is the least to do."""
    engine = Engine(workers=2)
    placement = Placement(engine)
    port = engine.add_port("vm")
    ring = Ring(port, TRANSMIT)
    placement.pin("vm", 1)
    assert placement.choose(ring) == 1
    placement.forget(port)
    assert placement.choose(ring) == 0


def test_a_pin_is_taken_off() -> None:
    engine = Engine(workers=2)
    placement = Placement(engine)
    ring = Ring(engine.add_port("vm"), TRANSMIT)
    placement.pin("vm", 1)
    placement.pin("vm", None)
    assert placement.choose(ring) == 0


@pytest.mark.parametrize("number", [-1, 2])
def test_a_worker_that_is_not_there(number: int) -> None:
    placement = Placement(Engine(workers=2))
    for there in (None, 0, 1):
        placement.check_worker(there)
    with pytest.raises(NotFoundError) as caught:
        placement.check_worker(number)
    assert caught.value.message == f"there is no worker {number}"
    assert caught.value.hint == "there are 2, counted from 0 (workers in [switch])"
