"""The log on stderr, which no frontend and no client can flood."""

from __future__ import annotations

import logging
import time
from typing import TextIO

LINES_MAX = 100
"""Lines of one kind a second; further ones are counted."""

_Kind = tuple[str, str, object]


class CalmHandler(logging.StreamHandler[TextIO]):
    """Writes at most LINES_MAX lines of one kind a second, and how many it left out.

    Of one kind are lines of the same text about the same port, whatever else they say.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._since = time.monotonic()
        self._counts: dict[_Kind, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record or count it."""
        self.tell_left_out()
        kind = _kind(record)
        count = self._counts.get(kind, 0) + 1
        self._counts[kind] = count
        if count <= LINES_MAX:
            super().emit(record)

    def tell_left_out(self) -> None:
        """When a second is over, write how many lines were left out in it. Call it now and then."""
        if time.monotonic() - self._since < 1.0:
            return
        assert self.lock is not None
        with self.lock:
            self._since = time.monotonic()
            counts, self._counts = self._counts, {}
            for (name, text, who), count in counts.items():
                if count > LINES_MAX:
                    about = text.replace("%s", str(who), 1) if who is not None else text
                    super().emit(
                        logging.makeLogRecord(
                            {
                                "name": name,
                                "levelno": logging.WARNING,
                                "levelname": "WARNING",
                                "msg": f"left out {count - LINES_MAX} more lines like: {about}",
                            }
                        )
                    )


def set_up(level: str, stream: TextIO) -> CalmHandler:
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
