from vswitch.lab.guest.driver import ReceiveQueue, TransmitQueue
from vswitch.lab.guest.queues import GuestQueue

class NullBackend:
    forwarded: int
    def __init__(
        self,
        tx: GuestQueue[TransmitQueue],
        rx: GuestQueue[ReceiveQueue],
        frame_len: int,
        *,
        burst: int = ...,
        patience: int = 0,
    ) -> None: ...
    def stop(self) -> None: ...
    def run(self) -> None: ...
