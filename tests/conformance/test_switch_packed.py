"""What only packed rings can get wrong."""

from __future__ import annotations

import select
from typing import Any

import pytest

from tests.support.frames import frames, mac
from tests.support.running import DEADLINE_S, Wire, teach
from vswitch.lab.guest import DEFAULT_FEATURES
from vswitch.lab.load.load import Flow, Load
from vswitch.vhost_user.protocol import Feature

A, B = mac(1), mac(2)
PACKED = DEFAULT_FEATURES | Feature.RING_PACKED


@pytest.mark.parametrize(("length", "buffers"), [(9018, 71), (65553, 513)])
def test_a_frames_buffers_appear_together(wire: Wire, length: int, buffers: int) -> None:
    """A driver that finds the first of them takes the others without waiting."""
    options: dict[str, Any] = {
        "features": PACKED, "required_features": PACKED, "queue_size": 1500,
        "max_frame_len": length, "rx_buf_len": 128, "polling": True,
    }  # fmt: skip
    a = wire.guest("a", 1, **options | {"rx_queue_size": 16, "queue_size": 64})
    b = wire.guest("b", 2, **options | {"queue_size": 16, "rx_queue_size": 1500})
    teach(a, b)
    flow = Flow(a.transmitqs[0], b.receiveqs[0], frames(B, A, [60, length]), window=4, verify=True,
                write_off_s=60.0)  # fmt: skip
    before = b.receiveqs[0].ring.used_idx
    (result,) = Load([flow]).run(60.0, frames=2000, settle_s=60.0, quiet_s=30.0)
    assert (result.received, result.lost, result.misordered, result.corrupt) == (2000, 0, 0, 0)
    assert (b.receiveqs[0].ring.used_idx - before) % 65536 == 1000 * (buffers + 1) % 65536


def test_a_call_after_a_long_spell_of_polling(wire: Wire) -> None:
    """The event is compared with what was used last, not with what was signalled rounds ago."""
    options: dict[str, Any] = {"features": PACKED, "required_features": PACKED}
    a, b = wire.guest("a", 1, **options), wire.guest("b", 2, **options)
    teach(a, b)
    queue = b.receiveqs[0]
    called = select.poll()
    called.register(queue.call_fd, select.POLLIN)

    def send_and_be_called(count: int) -> None:
        queue.take_calls()
        assert not queue.ring.calls_on()
        sent = frames(B, A, [60] * count)
        a.send(sent)
        assert called.poll(1000 * DEADLINE_S), "no notification"
        queue.ring.calls_off()
        assert b.recv(count) == sent

    send_and_be_called(1)
    b.polling = True
    for count in (50, 50, 50, 50, 51):
        sent = frames(B, A, [60] * count)
        a.send(sent)
        assert b.recv(count) == sent
    # Five entries short of where the notification was, one round later.
    send_and_be_called(11)
