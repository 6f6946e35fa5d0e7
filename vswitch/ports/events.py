"""What happens to ports: what workers say of them, and what subscribers hear."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import cast

from vswitch.api import Event, EventName
from vswitch.dataplane.events import WorkerEvent
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.fdb import key_mac
from vswitch.ports import limits
from vswitch.ports.table import PortTable

log = logging.getLogger("vswitch.switch")

Subscriber = Callable[[Event], None]


class Events:
    """Passes on what workers say to whom it concerns: the port, and those who subscribed."""

    def __init__(self, engine: Engine, ports: PortTable) -> None:
        self._engine = engine
        self._ports = ports
        self._subscribers: list[Subscriber] = []

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Have `callback` called with every event; returns what ends that."""
        self._subscribers.append(callback)
        self._engine.report_macs = True

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._subscribers.remove(callback)
            self._engine.report_macs = bool(self._subscribers)

        return unsubscribe

    def emit(self, port: str, event: EventName, reason: str | None = None) -> None:
        if not self._subscribers:
            return
        record = Event(event=event, time=time.time(), port=port)
        if reason is not None:
            record["reason"] = reason
        self.send(record)

    def send(self, record: Event) -> None:
        for subscriber in list(self._subscribers):
            subscriber(record)

    def hear(self, event: WorkerEvent) -> None:
        """What a worker says. What is about addresses is common to all kinds of ports."""
        port = self._ports.by_id(event.port)
        if port is None:
            return
        if event.kind == "mac-limit":
            _, most = limits.macs(port.settings, port.fast)
            reason = f"{most} MAC addresses were learned, the most it may have (max_macs)"
            log.warning("port %s: %s; further ones are not", port.name, reason)
            self.emit(port.name, "mac-limit", reason)
        elif event.kind in ("mac-learned", "mac-moved"):
            self._address(cast(EventName, event.kind), port.name, event.key, event.value)
        else:
            port.hear(event.kind, event.value)

    def aged(self, key: int, number: int) -> None:
        """An address was forgotten that was the port's with this number."""
        port = self._ports.by_id(number)
        if port is not None:
            self._address("mac-aged", port.name, key)

    def _address(self, event: EventName, port: str, key: int, previous: int = -1) -> None:
        if not self._subscribers:
            return
        mac, vlan = key_mac(key)
        record = Event(event=event, time=time.time(), port=port, mac=mac, vlan=vlan)
        old = self._ports.by_id(previous)
        if event == "mac-moved" and old is not None:
            record["previous_port"] = old.name
        self.send(record)
