"""A look at each port, once a second."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from vswitch.dataplane.placement import Placement
from vswitch.ports import limits
from vswitch.ports.table import PortTable

_PORTS_A_TURN = 16


def look(ports: PortTable, placement: Placement) -> Iterator[None]:
    """What nobody tells of ports, and what came through their rings; others' turn at each yield."""
    there = iter(ports)
    while some := list(islice(there, _PORTS_A_TURN)):
        for port in some:
            if ports.by_id(port.fast.id) is not port:
                continue  # removed meanwhile
            placement.count(port.fast)
            port.check()
            learned, most = limits.macs(port.settings, port.fast)
            if 2 * learned < most:
                port.fast.mac_limit_told = False  # to be told again, should it come to that again
        yield
