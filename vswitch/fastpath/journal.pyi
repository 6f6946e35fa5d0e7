from typing import Final

SLOT_LEN: Final[int]

class Journal:
    def __init__(self, size: int, fd: int = -1, offset: int = 0) -> None: ...
    @property
    def size(self) -> int: ...
