from collections.abc import Iterable
from typing import Final, NamedTuple

from vswitch.lab.guest.driver import ReceiveQueue, TransmitQueue
from vswitch.lab.guest.queues import GuestQueue

SEQUENCE_LEN: Final[int]

class FlowResult(NamedTuple):
    seconds: float
    sent: int
    received: int
    received_in_time: int
    received_bytes: int
    lost: int
    misordered: int
    corrupt: int
    written_off: int
    tx_kicks: int
    rx_kicks: int
    @property
    def frames_per_s(self) -> float: ...

class Flow:
    tx: TransmitQueue | None
    rx: ReceiveQueue | None
    frames: list[bytes]
    def __init__(
        self,
        tx: GuestQueue[TransmitQueue] | None,
        rx: GuestQueue[ReceiveQueue] | None,
        frames: list[bytes],
        *,
        window: int = 0,
        verify: bool = False,
        write_off_s: float = 0.1,
        rewrite: bool = False,
        header: bytes = b"",
    ) -> None: ...

class Load:
    def __init__(self, flows: Iterable[Flow]) -> None: ...
    def stop(self) -> None: ...
    def run(
        self,
        seconds: float,
        *,
        frames: int = 0,
        settle_s: float = 0.0,
        quiet_s: float = 0.01,
    ) -> list[FlowResult]: ...
