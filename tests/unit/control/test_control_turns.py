"""What control clients cost the event loop: long answers in pages, a step of each kind a turn."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import uvloop

from tests.support.controlled import Controlled
from tests.unit.control.test_control_server import Raw
from vswitch import Client
from vswitch.api import PAGE_MAX
from vswitch.control import protocol
from vswitch.control import server as server_module
from vswitch.control import subscriptions as subscriptions_module
from vswitch.control.access import Access
from vswitch.control.subscriptions import (
    EVENTS_A_TURN,
    EVENTS_QUEUED_MAX,
    EventQueue,
    Subscriptions,
)
from vswitch.control.turns import Queue, Turn, Turns

N_PORTS = 23
LISTS = ["ports", "stats", "fdb", "workers"]


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


class LoopTurns:
    """Counts the turns of the running loop."""

    def __init__(self) -> None:
        self.n = 0
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._count)

    def _count(self) -> None:
        self.n += 1
        self._loop.call_soon(self._count)


def test_a_turn_of_the_loop_has_one_step_of_each_queue() -> None:
    """However many clients there are; and it goes round among them."""

    async def main() -> None:
        turns, loop_turns = Turns(), LoopTurns()
        had: list[tuple[int, Queue, int]] = []

        async def client(queue: Queue, number: int) -> None:
            turn = Turn(turns, queue)
            for _ in range(5):
                async with turn:
                    had.append((loop_turns.n, queue, number))
                    await turn.again()
                    had.append((loop_turns.n, queue, number))

        await asyncio.gather(*(client(queue, n) for queue in Queue for n in range(20)))
        assert len(had) == 3 * 20 * 10
        assert max(Counter(each[:2] for each in had).values()) == 1
        assert turns.steps == dict.fromkeys(Queue, 200)
        for queue in Queue:
            order = [number for _, of_queue, number in had if of_queue is queue]
            assert order == list(range(20)) * 10

    run(main())


def test_who_may_only_look_has_a_share_and_who_may_change_does_not_wait_for_it() -> None:
    async def main() -> None:
        turns = Turns()
        turns.account(Queue.LOOKING, 3600.0)
        looker = asyncio.ensure_future(turns.wait(Queue.LOOKING))
        newcomer = asyncio.ensure_future(turns.wait(Queue.DOOR))
        for _ in range(100):
            await turns.wait(Queue.CHANGING)
        assert not looker.done()
        assert not newcomer.done()
        # What was used up comes back with time.
        turns._credit_s += 3600.0
        await turns.wait(Queue.CHANGING)
        await looker
        await newcomer

    run(main())


def test_who_goes_away_while_waiting_is_passed_over() -> None:
    async def main() -> None:
        turns = Turns()
        waiting = [asyncio.ensure_future(turns.wait(Queue.LOOKING)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
        await waiting[2]

    run(main())


@pytest.fixture
def many(tmp_path: Path) -> Iterator[Controlled]:
    """Many ports, addresses and queues, of which a page takes four."""
    running = Controlled(tmp_path / "control.sock")
    try:
        with Client(running.path) as client:
            for n in range(N_PORTS):
                client.add_port(f"vm{n}", tmp_path / f"vm{n}")
                client.fdb_add(f"52:54:00:00:00:{n:02x}", f"vm{n}")
            client.add_uplink("tap7")
        running.switch.queues = [
            {"port": f"vm{n}", "index": 1, "frames": n, "frames_per_s": 0, "pinned": False}
            for n in range(N_PORTS)
        ]
        running.switch.page_max = 4
        yield running
    finally:
        running.close()


def pages(raw: Raw, method: str, limit: int = PAGE_MAX) -> list[dict[str, Any]]:
    found = []
    after = 0
    while after is not None:
        page = raw.call(method, {"after": after, "limit": limit})
        found.append(page)
        after = page["next"]
    return found


@pytest.mark.parametrize("method", [*LISTS, "settings"])
def test_a_client_that_knows_no_pages_gets_all_of_it(many: Controlled, method: str) -> None:
    raw = Raw(many.path)
    whole = raw.call(method)
    some = pages(raw, method)
    assert len(some) > 5
    if method == "settings":
        assert set(whole) == {"switch", "networks", "ports", "uplinks", "links"}
        for kind, number in (("ports", N_PORTS), ("uplinks", 1)):
            assert whole[kind] == [each for page in some for each in page[kind]]
            assert len(whole[kind]) == number
        assert all(page["switch"] == whole["switch"] for page in some)
    elif method == "workers":
        assert len(whole) == 1
        assert whole[0]["queues"] == many.switch.queues
        assert [q for page in some for q in page["items"][0]["queues"]] == many.switch.queues
        assert whole[0] | {"queues": 0} == some[0]["items"][0] | {"queues": 0}
    else:
        assert whole == [each for page in some for each in page["items"]]
        assert len(whole) == N_PORTS + (method != "fdb")
    with Client(many.path) as client:
        assert getattr(client, method)() == whole
    raw.socket.close()


@pytest.mark.parametrize("method", [*LISTS, "settings"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("access", [Access.ALL, Access.READ])
def test_a_page_is_a_turn_of_the_loop(
    many: Controlled, monkeypatch: pytest.MonkeyPatch, method: str, paged: bool, access: Access
) -> None:
    """Also for a client that asks for everything at once, and for several of them together."""
    monkeypatch.setattr(server_module, "access_of", lambda *_: access)
    loop_turns = many.do(LoopTurns)
    seen: list[int] = []
    give = many.switch._page

    def page(*arguments: Any) -> Any:
        seen.append(loop_turns.n)
        return give(*arguments)

    many.do(setattr, many.switch, "_page", page)
    clients = [Raw(many.path) for _ in range(4)]
    for client in clients:
        if paged:
            client.send(*([0, 1, method, [{"after": 4 * n, "limit": PAGE_MAX}]] for n in range(5)))
        else:
            client.send([0, 1, method, []])
    for client in clients:
        for _ in range(5 if paged else 1):
            assert client.receive()[2] is None
        client.socket.close()
    assert len(seen) >= 20
    assert len(set(seen)) == len(seen)


def test_an_old_clients_answer_and_its_events_do_not_mix(many: Controlled) -> None:
    raw = Raw(many.path)
    raw.call("subscribe")
    give = many.switch._page

    def page(*arguments: Any) -> Any:
        many.switch.emit("port-ready", "vm1")
        return give(*arguments)

    many.do(setattr, many.switch, "_page", page)
    raw.send([0, 5, "ports", []])
    got = [raw.receive() for _ in range(7)]
    assert Counter(each[0] for each in got) == {1: 1, 2: 6}
    [answer] = [each for each in got if each[0] == 1]
    assert len(answer[3]) == N_PORTS + 1
    raw.socket.close()


def test_wrong_pages(many: Controlled) -> None:
    raw = Raw(many.path)
    for params, text in (
        ({"after": 4}, "`after` goes with `limit`"),
        ({"limit": 0}, "limit: must be at least 1"),
        ({"limit": PAGE_MAX + 1}, f"limit: must be at most {PAGE_MAX}"),
        ({"limit": 1, "after": -1}, "after: must be at least 0"),
        ({"limit": 1, "after": 1 << 60}, "after: "),
    ):
        for method in [*LISTS, "settings"]:
            raw.send([0, 1, method, [params]])
            error = raw.receive()[2]
            assert error["code"] == "invalid-params"
            assert text in error["message"]
    for method in LISTS[:3]:
        assert raw.call(method, {"limit": 1, "after": 1 << 40}) == {"items": [], "next": None}
    raw.socket.close()


def test_greeting_costs_the_same_however_many_ports_there_are(
    many: Controlled, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = many.do(lambda: many.switch.pages)

    def refuse(_: object) -> object:
        raise AssertionError("all settings for a greeting")

    with monkeypatch.context() as patch:
        patch.setattr(type(many.switch), "settings", property(refuse))
        raw = Raw(many.path)
        assert raw.call("hello")["name"] == "lab"
        assert raw.call("version")["name"] == "lab"
    raw.socket.close()
    assert many.do(lambda: many.switch.pages) == before


def test_many_wrong_parameters_are_not_all_told(controlled: Controlled) -> None:
    raw = Raw(controlled.path)
    raw.send([0, 1, "ports", [{f"{n}" + "k" * 90: n for n in range(200)}]])
    lines = raw.receive()[2]["message"].splitlines()
    assert len(lines) == 17
    assert lines[-1] == "ports: and 184 more"
    raw.send([0, 1, "subscribe", [{"events": ["x"] * 200}]])
    lines = raw.receive()[2]["message"].splitlines()
    assert len(lines) == 17
    assert lines[-1] == "subscribe: and 184 more"
    raw.socket.close()


def test_connections_come_in_one_a_turn(controlled: Controlled) -> None:
    clients = [Raw(controlled.path) for _ in range(30)]
    assert all(client.call("ping") == "pong" for client in clients)
    assert controlled.do(lambda: controlled.server._turns.steps[Queue.DOOR]) == 30
    for client in clients:
        client.socket.close()


def test_events_are_packed_once_and_sent_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[object] = []
    pack = protocol.pack_notification

    def count(method: str, params: Any) -> bytes:
        packed.append(params)
        return pack(method, params)

    class Source:
        """As much of a switch as has events."""

        def subscribe(self, callback: Any) -> Any:
            self.send = callback
            return lambda: setattr(self, "send", None)

    async def main() -> None:
        monkeypatch.setattr(subscriptions_module, "pack_notification", count)
        source = Source()
        subscriptions = Subscriptions(source)  # type: ignore[arg-type]
        lost: list[int] = []
        queues = [EventQueue(lambda n=n: lost.append(n)) for n in range(10)]  # type: ignore[misc]
        for queue in queues:
            subscriptions.add(queue)
        queues[0].names = frozenset({"port-ready"})
        for n in range(EVENTS_QUEUED_MAX + 5):
            source.send({"event": "mac-learned", "time": 1.0, "port": "vm1", "vlan": n})
        assert len(packed) == EVENTS_QUEUED_MAX + 5
        assert sorted(lost) == list(range(1, 10))
        for queue in queues[1:]:
            await queue.filled()
            unpacker = msgpack.Unpacker()
            sizes = []
            while some := queue.take():
                unpacker.feed(some)
                sizes.append(len(list(unpacker)))
            assert sizes == [EVENTS_A_TURN] * (EVENTS_QUEUED_MAX // EVENTS_A_TURN - 1) + [
                EVENTS_A_TURN + 1  # how many were lost
            ]
        for queue in queues:
            subscriptions.remove(queue)
        assert source.send is None

    run(main())
