from typing import Final

from vswitch.lab.load.load import Flow

MAX_FRAMES: Final[int]

def latencies(flow: Flow, seconds: float, *, gap_s: float = 0.0, limit: int = ...) -> list[int]: ...
