"""Which worker polls which transmitq: by measured load, unless somebody pinned it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from vswitch.api import QueueInfo
from vswitch.errors import NotFoundError
from vswitch.fastpath.main.engine import Engine
from vswitch.fastpath.main.port import Port
from vswitch.fastpath.main.ring import Ring

RATE_SMOOTHING = 0.5
"""Weight of the last second in a ring's rate."""
WORTH_MOVING = 0.1
"""A new placement must relieve the busiest worker by this part of its load."""


@dataclass(slots=True)
class _Seen:
    """A ring's chains when they were counted last, and how many a second there were."""

    ring: Ring
    frames: int
    at: float
    rate: float = 0.0


class Placement:
    """Keeps account of rings' load and decides; `Switch` does the moving."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: dict[int, dict[int, _Seen]] = {}
        """By port and ring."""
        self._pins: dict[str, int] = {}
        """Ports by name, and the worker that is to poll all of their transmitqs."""

    def check_worker(self, number: int | None) -> None:
        """Raise NotFoundError for a worker that is not there; None is any."""
        workers = len(self._engine.workers)
        if number is not None and not 0 <= number < workers:
            raise NotFoundError(
                f"there is no worker {number}",
                hint=f"there are {workers}, counted from 0 (workers in [switch])",
            )

    def pin(self, port: str, worker: int | None) -> None:
        """Have one worker poll all transmitqs of a port from the next `plan` on, or any (None)."""
        if worker is None:
            self._pins.pop(port, None)
        else:
            self._pins[port] = worker

    def count(self, port: Port) -> None:
        """Once a second: bring the rates of a port's rings up to date."""
        now = time.monotonic()
        before = self._seen.get(port.id, {})
        seen = {}
        for ring in _transmitqs(port):
            frames = ring.frames
            last = before.get(ring.index)
            if last is None or last.ring is not ring or frames < last.frames:
                last = _Seen(ring, frames, now)
            else:
                rate = (frames - last.frames) / max(now - last.at, 1e-3)
                last.rate += RATE_SMOOTHING * (rate - last.rate)
                last.frames, last.at = frames, now
            seen[ring.index] = last
        self._seen[port.id] = seen

    def forget(self, port: Port) -> None:
        """A port is gone."""
        self._seen.pop(port.id, None)
        self._pins.pop(port.name, None)

    def choose(self, ring: Ring) -> int:
        """The worker for a ring that starts: pinned, or with the least to do."""
        if ring.port.name in self._pins:
            return self._pins[ring.port.name]
        loads = [(0.0, 0)] * len(self._engine.workers)
        for _, other in self._transmitqs():
            if other.worker >= 0 and other is not ring:
                rate, count = loads[other.worker]
                loads[other.worker] = (rate + self._rate(other), count + 1)
        return loads.index(min(loads))

    def plan(self) -> list[tuple[Ring, int]]:
        """Rings that should move, and to which worker: what is pinned, then the load.

        Rings are dealt out, busiest first, to the worker with the least. If that does not relieve
        the busiest worker noticeably only pins are obeyed, for moving disturbs a ring for a moment.
        """
        rings = [ring for _, ring in self._transmitqs() if ring.worker >= 0]
        pinned = [
            (ring, self._pins[ring.port.name]) for ring in rings if ring.port.name in self._pins
        ]
        loads = [0.0] * len(self._engine.workers)
        for ring, worker in pinned:
            loads[worker] += self._rate(ring)
        kept = list(loads)
        free = [ring for ring in rings if ring.port.name not in self._pins]
        for ring in free:
            kept[ring.worker] += self._rate(ring)
        dealt = []
        for ring in sorted(free, key=self._rate, reverse=True):
            # Among equals it stays where it is.
            worker = min(range(len(loads)), key=lambda w: (loads[w], w != ring.worker))
            loads[worker] += self._rate(ring)
            dealt.append((ring, worker))
        if max(loads) > (1 - WORTH_MOVING) * max(kept):
            dealt = []
        return [(ring, worker) for ring, worker in pinned + dealt if ring.worker != worker]

    def queues(self, port: Port) -> list[tuple[int, QueueInfo]]:
        """The transmitqs of a port that are polled, each with its worker."""
        return [
            (
                ring.worker,
                QueueInfo(
                    port=port.name,
                    index=ring.index,
                    frames=ring.frames,
                    frames_per_s=round(self._rate(ring)),
                    pinned=port.name in self._pins,
                ),
            )
            for ring in _transmitqs(port)
            if ring.worker >= 0
        ]

    def _transmitqs(self) -> list[tuple[Port, Ring]]:
        return [(port, ring) for port in self._engine.ports.values() for ring in _transmitqs(port)]

    def _rate(self, ring: Ring) -> float:
        seen = self._seen.get(ring.port.id, {}).get(ring.index)
        return seen.rate if seen is not None and seen.ring is ring else 0.0


def _transmitqs(port: Port) -> list[Ring]:
    return [ring for ring in port.rings.values() if ring.started and ring.is_transmitq]
