"""The log on stderr, which no frontend and no client can flood."""

from __future__ import annotations

import logging
import time
from typing import Protocol

BURST_LINES = 1000
"""Lines of one kind that may come at once; further ones are counted."""
LINES_PER_S = 100
"""How fast there is room for more of them."""

_Kind = tuple[str, str, object]


class Sink(Protocol):
    """What lines are written to."""

    def write(self, text: str, /) -> object: ...


class _Allowance:
    """How many more lines of a kind may be written, and how many were not."""

    def __init__(self) -> None:
        self.lines = float(BURST_LINES)
        self.left_out = 0


class CalmHandler(logging.StreamHandler[Sink]):
    """Writes LINES_PER_S lines of one kind, after a burst, and how many it left out.

    Of one kind are lines of the same text about the same port, whatever else they say.
    """

    def __init__(self, stream: Sink) -> None:
        super().__init__(stream)
        self._since = time.monotonic()
        self._kinds: dict[_Kind, _Allowance] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record or count it."""
        self.tell_left_out()
        allowance = self._kinds.setdefault(_kind(record), _Allowance())
        if allowance.lines >= 1:
            allowance.lines -= 1
            super().emit(record)
        else:
            allowance.left_out += 1

    def tell_left_out(self) -> None:
        """Write, once a second, how many lines were left out in it. Call it now and then."""
        now = time.monotonic()
        if now - self._since < 1.0:
            return
        assert self.lock is not None
        with self.lock:
            more, self._since = (now - self._since) * LINES_PER_S, now
            for kind, allowance in list(self._kinds.items()):
                allowance.lines += more
                if allowance.lines >= BURST_LINES:
                    del self._kinds[kind]  # as if it had never come
                if allowance.left_out:
                    self._write_left_out(kind, allowance.left_out)
                    allowance.left_out = 0
        self.flush()

    def _write_left_out(self, kind: _Kind, count: int) -> None:
        name, text, who = kind
        about = text if who is None else text.replace("%s", str(who), 1)
        super().emit(
            logging.makeLogRecord(
                {
                    "name": name,
                    "levelno": logging.WARNING,
                    "levelname": "WARNING",
                    "msg": f"left out {count} more lines like: {about}",
                }
            )
        )


def set_up(level: str, stream: Sink) -> CalmHandler:
    """Have everything of vswitch logged to `stream` from `level` on; returns the handler."""
    handler = CalmHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logger = logging.getLogger("vswitch")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())
    return handler


def _kind(record: logging.LogRecord) -> _Kind:
    about_a_port = str(record.msg).startswith("port %s") and isinstance(record.args, tuple)
    who = record.args[0] if about_a_port and record.args else None  # type: ignore[index]
    return record.name, str(record.msg), who
