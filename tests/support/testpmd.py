"""Runs DPDK's testpmd, the independent implementation of either side of vhost-user."""

from __future__ import annotations

import os
from collections.abc import Sequence

from benchmarks import testpmd


class Testpmd(testpmd.Testpmd):
    """One without hugepages, on whatever cores this process may use.

    Its forwarding loop polls, so keep it for no longer than needed.
    """

    def __init__(
        self,
        vdevs: Sequence[str],
        options: Sequence[str],
        *,
        eal: Sequence[str] = (),
        memory_mib: int = 256,
    ) -> None:
        cpus = os.sched_getaffinity(0)
        super().__init__(cpus, vdevs, options, memory_mib=memory_mib, eal=("--no-huge", *eal))
