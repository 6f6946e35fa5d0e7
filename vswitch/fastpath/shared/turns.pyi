import asyncio
from typing import Self, TypedDict, type_check_only

@type_check_only
class Longest(TypedDict):
    longest_ns: int
    run_delay_ns: int | None
    own_ns: int

@type_check_only
class Turns(TypedDict):
    last_10_s: Longest
    last_minute: Longest
    since_start: Longest

def cycles() -> tuple[int, int]: ...
def open_schedstat() -> int: ...

class Record:
    def note(self, turn_ns: int, now_ns: int) -> None: ...
    def info(self, now_ns: int) -> Turns: ...

class LoopTurns:
    def __new__(cls, loop: asyncio.AbstractEventLoop) -> Self: ...
    def close(self) -> None: ...
    def info(self) -> Turns | None: ...
