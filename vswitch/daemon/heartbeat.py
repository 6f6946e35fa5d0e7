"""A look, again and again, at whether the whole switch lives; the watchdog hears of it only then.

A beat comes from the event loop, so a loop that is blocked is silent. A worker that has not
finished a turn of its loop since the last beat, and does not sleep, silences it as well: a switch
that answers questions and forwards nothing is to be started anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from vswitch.daemon.supervisor import Supervisor

_log = logging.getLogger(__name__)

INTERVAL_S = 2.0
"""Between two beats where no watchdog sets the pace."""


class Heartbeat:
    """Beats from its beginning to `stop`.

    `stuck` has the workers that have made no progress since it was called last, `summary` is a line
    for people, `also` is done at every beat.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        stuck: Callable[[], list[int]],
        summary: Callable[[], str],
        also: Callable[[], None],
    ) -> None:
        self._supervisor = supervisor
        self._stuck = stuck
        self._summary = summary
        self._also = also
        self._told = summary()
        self._were_stuck: list[int] = []
        # Three beats a period: one may be late, and it takes two to see that nothing moves.
        period = supervisor.watchdog_s
        self._interval_s = INTERVAL_S if period is None else period / 3
        self._loop = asyncio.get_running_loop()
        supervisor.ready(self._told)
        self._beat()

    def stop(self) -> None:
        """No more beats; the end has begun."""
        self._timer.cancel()
        self._supervisor.stopping()

    def _beat(self) -> None:
        self._timer = self._loop.call_later(self._interval_s, self._beat)
        self._also()
        stuck = self._stuck()
        if stuck:
            summary = f"worker {', '.join(map(str, stuck))} makes no progress"
        else:
            self._supervisor.alive()
            summary = self._summary() if self._supervisor.listens else self._told
        if stuck != self._were_stuck:
            if stuck:
                _log.error("%s for %g s", summary, self._interval_s)
            else:
                _log.error("all workers make progress again")
            self._were_stuck = stuck
        if summary != self._told:
            self._supervisor.status(summary)
            self._told = summary
