"""Queues on workers: pinned, rebalanced by load, and moved under traffic without losing a frame."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tests.support.frames import BROADCAST, frame, mac
from tests.support.running import DEADLINE_S, Wire, all_came, loading, teach, used_on
from vswitch.lab.load.load import Flow, Load

MOVES = 100


def workers_of(wire: Wire) -> dict[tuple[str, int], int]:
    return {
        (queue["port"], queue["index"]): worker["id"]
        for worker in wire.client.workers()
        for queue in worker["queues"]
    }


@pytest.fixture
def wire(start: Callable[..., Wire]) -> Wire:
    return start(workers=2)


def test_queues_are_spread_as_they_come(wire: Wire) -> None:
    for number, name in enumerate("abcd"):
        wire.guest(name, number + 1)
    assert sorted(workers_of(wire).values()) == [0, 0, 1, 1]


def test_pins_hold_across_reconnects(wire: Wire) -> None:
    a = wire.guest("a", 1)
    wire.guest("b", 2)
    client = wire.client
    for worker in (1, 0):
        client.worker_pin("a", worker)
        assert workers_of(wire)["a", 1] == worker
        a.disconnect()
        a.reconnect()
        assert workers_of(wire)["a", 1] == worker
        assert all(
            queue["pinned"] == (queue["port"] == "a")
            for each in client.workers()
            for queue in each["queues"]
        )
    assert client.worker_pin("a", 0) == 0, "it is there already"
    client.worker_pin("a", None)
    assert not any(queue["pinned"] for each in client.workers() for queue in each["queues"])


def test_moving_under_load_loses_and_reorders_nothing(wire: Wire) -> None:
    a, b = wire.guest("a", 1), wire.guest("b", 2)
    teach(a, b)
    sent = frame(mac(2), mac(1), 200)
    flow = Flow(
        a.transmitqs[0], b.receiveqs[0], [sent], window=128, verify=True, write_off_s=DEADLINE_S
    )
    moves = 0
    with loading(Load([flow])) as results:
        for number in range(MOVES):
            used_on(b.receiveqs, 100)
            moves += wire.client.worker_pin("a", 1 - number % 2)
        used_on(b.receiveqs, 100)
    assert moves >= MOVES - 1, "it may have been there at first"
    all_came(results, [b])


def test_rebalancing_by_load(wire: Wire) -> None:
    """Two busy queues that were put on one worker end on two."""
    guests = [wire.guest(name, number + 1) for number, name in enumerate("abcd")]
    client = wire.client
    for number, guest in enumerate(guests):
        guest.send([frame(BROADCAST, mac(number + 1))])
    for name, worker in (("a", 0), ("b", 0), ("c", 1), ("d", 1)):
        client.worker_pin(name, worker)
    for name in "abcd":
        client.worker_pin(name, None)
    stop = threading.Event()

    def chat(one: int, other: int) -> None:
        while not stop.is_set():
            guests[one].send([frame(mac(other + 1), mac(one + 1))] * 8)
            guests[other].poll_frames(64)

    # a and b talk to c and d, who only listen.
    talkers = [threading.Thread(target=chat, args=pair) for pair in ((0, 2), (1, 3))]
    for talker in talkers:
        talker.start()
    try:
        deadline = time.monotonic() + DEADLINE_S
        while workers_of(wire)["a", 1] == workers_of(wire)["b", 1]:
            assert time.monotonic() < deadline, client.workers()
            client.worker_rebalance()
            time.sleep(0.05)  # between two looks, which need some load to compare
    finally:
        stop.set()
        for talker in talkers:
            talker.join()


def test_a_port_whose_link_is_down_is_as_one_of_a_bridge(wire: Wire) -> None:
    """What its guest sends is dropped; its addresses are nobody's: the others get their frames."""
    a, b, c = (wire.guest(name, number + 1) for number, name in enumerate("abc"))
    client = wire.client
    teach(a, b, c)
    events = client.events("port-link", timeout=DEADLINE_S)
    assert client.set_link("a", False)["link"] == "down"
    assert client.set_link("a", False)["link"] == "down"
    assert {port["name"]: port["link"] for port in client.ports()} == {
        "a": "down", "b": "up", "c": "up"
    }  # fmt: skip
    assert {entry["port"] for entry in client.fdb()} == {"b", "c"}
    a.send([frame(mac(2), mac(1))] * 3)
    a.drain()
    b.send([frame(mac(1), mac(2))])
    b.drain()
    wire.wait_until(lambda: wire.drops("a").get("link-down") == 3, "three drops")
    # What was for it is unknown now, and flooded to the others.
    assert len(c.recv(1)) == 1
    assert a.poll_frames(8) == []
    a.disconnect()
    a.reconnect()
    a.send([frame(mac(2), mac(1))])
    a.drain()
    wire.wait_until(lambda: wire.drops("a").get("link-down") == 4, "a fourth drop")
    assert {entry["port"] for entry in client.fdb()} == {"b", "c"}, "nothing is learned from it"
    # A static address stays its own, and what is for that goes to nobody.
    client.fdb_add("52:54:00:00:00:01", "a")
    before = wire.drops("b")
    b.send([frame(mac(1), mac(2))] * 5)
    b.drain()
    wire.wait_until(lambda: wire.drops("b").get("egress-down") == 5, "five drops")
    assert {**wire.drops("b"), "egress-down": 0} == {**before, "egress-down": 0}
    assert c.poll_frames(8) == []
    assert client.set_link("a", True)["link"] == "up"
    a.send([frame(mac(2), mac(1))])
    assert len(b.recv(1)) == 1
    b.send([frame(mac(1), mac(2))])
    assert len(a.recv(1)) == 1
    told = [next(events) for _ in range(2)]
    assert [(event["port"], event["link"]) for event in told] == [("a", "down"), ("a", "up")]
