from typing import Final

DROP_REASONS: Final[tuple[tuple[str, str], ...]]
RING_FAULTS: Final[tuple[tuple[str, str], ...]]
STORM_KINDS: Final[tuple[str, ...]]
EVENT_NAMES: Final[tuple[str, ...]]
BOUNDS: Final[dict[str, int]]

def rows(count: int, *table: tuple[object, ...]) -> tuple[object, ...]: ...
