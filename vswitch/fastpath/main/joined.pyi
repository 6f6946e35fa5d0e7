from collections.abc import Sequence
from typing import Final, Self

from vswitch.fastpath.main.mapping import Memory

PIECES_MAX: Final[int]

def why_apart(memory: Memory, pieces: Sequence[tuple[int, int]]) -> str | None: ...
def pieces_in_use() -> int: ...

class Joined:
    @property
    def pieces(self) -> int: ...
    def __new__(cls, memory: Memory, pieces: Sequence[tuple[int, int]]) -> Self: ...
