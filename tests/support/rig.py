"""An engine in this process with software guests on it, and no sockets between them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.support.notes import Notes
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.mapping import DirtyLog, Memory
from vswitch.fastpath.main.port import Port
from vswitch.fastpath.main.ring import Ring
from vswitch.lab.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.lab.guest.net_driver import AnyQueue
from vswitch.lab.guest.options import by_subject
from vswitch.ports import offloads
from vswitch.vhost_user.protocol import Feature

ALL = offloads.offered(True)
"""Every offload, both ways."""


class Rig:
    """Ports of one engine; what it does not know is flooded.

    Its worker runs, or takes its turns when it is told to: `turn`.
    """

    def __init__(self, stack: ExitStack, *, runs: bool = True, **engine: Any) -> None:
        self.engine = Engine(**engine)
        self._stack = stack
        self._keep: list[object] = []
        worker = self.engine.workers[0]
        self.turn = worker.turn
        if not runs:
            return
        thread = threading.Thread(target=worker.run)
        thread.start()
        stack.callback(thread.join)
        stack.callback(worker.stop)

    def guest(
        self,
        n: int,
        features: int = ALL,
        *,
        notes: Notes | None = None,
        log: DirtyLog | None = None,
        **options: Any,
    ) -> tuple[SoftwareGuest, Port]:
        """A guest with these features besides those of every guest; the rest is as for `plug`."""
        options = {"max_frame_len": 65553, "queue_size": 64, **options}
        mac = f"52:54:00:00:00:{n:02x}"
        guest = self._stack.enter_context(SoftwareGuest(mac, **by_subject(**options)))
        guest.build_offline(DEFAULT_FEATURES | features)
        return guest, self.plug(guest, n, notes, log)

    def plug(
        self,
        guest: SoftwareGuest,
        n: int,
        notes: Notes | None = None,
        log: DirtyLog | None = None,
    ) -> Port:
        """A port with the rings of a guest as they are.

        They are known again by their `notes`, and what is written into the guest is marked in
        `log`.
        """
        port = self.engine.add_port(f"vm{n}")
        if notes is not None:
            port.use_journal(notes.journal)
        regions, fds = guest.memory.table()
        memory = Memory(regions, fds)
        for queue in guest.queues():
            self.start(guest, queue, memory, port, queue.index, 0 if notes is None else n, log)
        self.settle()
        return port

    def start(
        self,
        guest: SoftwareGuest,
        queue: AnyQueue,
        memory: Memory,
        port: Port,
        index: int,
        identity: int = 0,
        log: DirtyLog | None = None,
    ) -> Ring:
        """Run a guest's queue as the ring `index` of a port, which `settle` shows to the worker."""
        ring = Ring(port, index)
        ring.enabled = True
        ring.set_call(queue.call_fd)
        addr = guest.vring_addr(queue)
        if log is not None:
            ring.set_dirty_log(log, queue.layout.used_gpa)
        ring.start(
            memory,
            queue.layout.size,
            addr.desc_uva,
            addr.used_uva,
            addr.avail_uva,
            hdr_len=queue.ring.header_len,
            event_idx=True,
            indirect=True,
            mergeable=Feature.MRG_RXBUF in guest.features,
            base=0x8000 if queue.ring.packed else 0,
            poll_only=False,
            packed=queue.ring.packed,
            offloads=(offloads.asked_for if ring.is_transmitq else offloads.taken)(guest.features),
            identity=identity,
        )
        self.engine.attach(ring, queue.kick_fd)
        self._keep += [memory, ring]
        return ring

    def settle(self) -> None:
        ticket = self.engine.publish()
        assert self.engine.wait(ticket, 60_000_000_000)

    def drops(self, port: Port) -> dict[str, int]:
        drops: dict[str, int] = self.engine.stats(port)["drops"]
        return drops


@contextmanager
def running(**engine: Any) -> Iterator[Rig]:
    """One whose worker runs; options of the Engine."""
    with ExitStack() as stack:
        yield Rig(stack, **engine)


@contextmanager
def stepping() -> Iterator[Rig]:
    """One whose worker does nothing but by `turn`."""
    with ExitStack() as stack:
        yield Rig(stack, runs=False)
