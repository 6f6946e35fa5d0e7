"""Memory that goes: a large one is taken apart by a thread, while the event loop serves others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

AT_ONCE_LEN = 32 << 20
"""Bytes that are unmapped at once, which takes 3 ms at most; more would hold up the event loop for
100 ms a GiB of which pages were used."""


class Part(Protocol):
    """A mapping: `fastpath.mapping.SharedFile`."""

    @property
    def length(self) -> int: ...

    def forget_pages(self) -> None: ...


async def forget_pages(parts: Iterable[Part]) -> None:
    """Return when what these mappings still need is quick.

    They are kept until then, whoever is cancelled, and given up on the event loop's thread.
    """
    kept = list(parts)
    if sum(part.length for part in kept) <= AT_ONCE_LEN:
        return
    done = asyncio.get_running_loop().run_in_executor(None, _forget, kept)
    done.add_done_callback(lambda _: kept.clear())
    await asyncio.shield(done)


def _forget(parts: list[Part]) -> None:
    for part in parts:
        part.forget_pages()
