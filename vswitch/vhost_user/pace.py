"""Long work in pieces, between which everybody else has a turn of the event loop."""

from __future__ import annotations

import asyncio
import time

PIECE_S = 0.002
"""How long a piece may take; a single step of the work may take it beyond that."""


class Pace:
    """For one piece of work; `step` between its steps, where others may do what they like."""

    def __init__(self) -> None:
        self._until = time.monotonic() + PIECE_S

    async def step(self) -> None:
        if time.monotonic() >= self._until:
            await asyncio.sleep(0)
            self._until = time.monotonic() + PIECE_S
