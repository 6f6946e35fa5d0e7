from typing import Final

MAX_WAKEUPS: Final[int]

def wakeups(cpu: int, seconds: float, *, gap_s: float = 0.0, limit: int = ...) -> list[int]: ...
def copies(
    cpu: int,
    seconds: float,
    length: int,
    *,
    slots: int,
    piece_len: int,
    pieces: int,
    window: int,
    warm_up_s: float = 0.0,
) -> float: ...
