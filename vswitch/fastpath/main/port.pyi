from collections.abc import Sequence
from typing import Final

from vswitch.fastpath.main.journal import Journal
from vswitch.fastpath.main.ring import Ring

MAX_VRINGS: Final[int]

class Port:
    max_len: int
    link_down: bool
    offloads: int
    mac_limit_told: bool
    def set_storm(self, rates: Sequence[int | None], burst: int | None = None) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def rings(self) -> dict[int, Ring]: ...
    @property
    def removed(self) -> bool: ...
    @property
    def id(self) -> int: ...
    @property
    def journal(self) -> Journal: ...
    def use_journal(self, journal: Journal) -> None: ...
    @property
    def is_tap(self) -> bool: ...
