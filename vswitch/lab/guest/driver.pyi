import builtins
from typing import Final

from vswitch.lab.guest.mapping import Mapping

MAX_PIECES: Final[int]

class VirtQueue:
    mapping: Mapping
    name: str
    header_len: int
    frames: int
    bytes: int
    kicks: int
    slots: int
    def __init__(
        self,
        mapping: Mapping,
        name: str,
        size: int,
        desc_gpa: int,
        avail_gpa: int,
        used_gpa: int,
        slots: list[list[tuple[int, int]]],
        tables: list[int],
        *,
        header_len: int,
        event_idx: bool,
        packed: bool = False,
        in_order: bool = False,
        first_idx: int = 0,
    ) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def avail_idx(self) -> int: ...
    @property
    def used_idx(self) -> int: ...
    @property
    def packed(self) -> bool: ...
    @property
    def skipped(self) -> int: ...
    @property
    def used_position(self) -> int: ...
    @property
    def avail_position(self) -> int: ...
    @property
    def outstanding(self) -> int: ...
    @property
    def free_slot_count(self) -> int: ...
    def take_kick(self) -> bool: ...
    def more_used(self) -> bool: ...
    def calls_on(self) -> bool: ...
    def calls_off(self) -> None: ...

class TransmitQueue(VirtQueue):
    def send(
        self,
        frames: list[builtins.bytes],
        first: int = 0,
        header: builtins.bytes | None = None,
    ) -> int: ...
    def reap(self) -> int: ...

class ReceiveQueue(VirtQueue):
    mergeable: bool
    guard_len: int
    strict: bool
    def __init__(
        self,
        mapping: Mapping,
        name: str,
        size: int,
        desc_gpa: int,
        avail_gpa: int,
        used_gpa: int,
        slots: list[list[tuple[int, int]]],
        tables: list[int],
        *,
        header_len: int,
        event_idx: bool,
        packed: bool = False,
        in_order: bool = False,
        first_idx: int = 0,
        mergeable: bool,
        guard_len: int = 0,
    ) -> None: ...
    def post(self, most: int = -1) -> int: ...
    def recv(self, most: int) -> list[builtins.bytes]: ...
    def recv_with_headers(self, most: int) -> list[tuple[builtins.bytes, builtins.bytes]]: ...
