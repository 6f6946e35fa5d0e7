from collections.abc import Iterable

from vswitch.fastpath.main.worker import Worker

def send(worker: Worker, data: bytes, ports: Iterable[int]) -> int: ...
