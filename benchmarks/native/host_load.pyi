from vswitch.lab.load.load import Flow

def from_host(
    flow: Flow, fd: int, frame: bytes, seconds: float, window: int
) -> tuple[float, int, int]: ...
