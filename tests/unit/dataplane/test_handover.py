"""What is retired goes when no worker can be using it, and not before."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import cast

from tests.support.rig import running
from vswitch.dataplane.handover import HandOver
from vswitch.fastpath.main.engine import Engine


class Thing:
    """Something that can be looked for."""


def test_it_is_kept_until_the_next_publish_has_been_seen() -> None:
    with running(idle_ns=None) as rig:
        handover = HandOver(rig.engine)
        thing = Thing()
        seen = weakref.ref(thing)
        called: list[str] = []
        handover.retire(thing, None, lambda: called.append("closed"))
        del thing
        # A worker that passes quiescent points before the publish has proven nothing.
        before = rig.engine.workers[0].stats()["loops"]
        while rig.engine.workers[0].stats()["loops"] < before + 10:
            handover.collect()
        assert seen() is not None
        assert called == []
        asyncio.run(handover.settle())
        gc.collect()
        assert seen() is None
        assert called == ["closed"]


def test_it_waits_for_a_publish_of_its_own() -> None:
    with running(idle_ns=None) as rig:
        handover = HandOver(rig.engine)
        called: list[int] = []
        handover.retire(lambda: called.append(1))
        handover.publish()
        handover.retire(lambda: called.append(2))
        asyncio.run(handover.settle())
        assert called == [1, 2]
        handover.retire(lambda: called.append(3))
        rig.engine.collect()
        assert called == [1, 2]


def test_nobody_is_waited_for_and_it_is_called_once() -> None:
    """No worker runs, so that each publish has been seen as soon as it is made."""
    handover = HandOver(Engine())
    called: list[int] = []
    handover.retire(lambda: called.append(1))
    for _ in range(3):
        handover.publish()
    assert called == [1]


def test_who_is_cancelled_has_published() -> None:
    class Busy:
        """An engine whose worker is in the midst of a turn."""

        published = 0

        def publish(self) -> int:
            self.published += 1
            return self.published

        def wait(self, _: int) -> bool:
            return False

    async def run() -> None:
        task = asyncio.create_task(HandOver(cast("Engine", engine)).settle())
        while not engine.published:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    engine = Busy()
    asyncio.run(run())
    assert engine.published == 1
