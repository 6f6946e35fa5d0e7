"""Who takes turns in a case: a switch with its generator, or a ceiling without any switch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from benchmarks.ceilings import Ceiling
from benchmarks.generators import Generator
from benchmarks.samples import Case, Reading
from benchmarks.switches import Switch


class Contestant(Protocol):
    """Uses no CPU outside of `running`."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def pids(self) -> set[int]:
        """The processes whose threads do the work; they should not have to wait for a CPU."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """For the length of a sample."""
        ...

    def prepare(self, case: Case) -> None:
        """Once before the first sample of a case, running."""
        ...

    def arrange(self, case: Case) -> None:
        """Before each sample, running; what it takes is no part of the sample."""
        ...

    def measure(self, case: Case, seconds: float) -> Reading: ...


class Pair:
    """A switch and the generator that is connected to it; both paused between samples."""

    def __init__(self, switch: Switch, generator: Generator) -> None:
        self.switch = switch
        self.generator = generator
        self.name = switch.name
        self.title = switch.title

    @property
    def pids(self) -> set[int]:
        return {self.switch.pid, self.generator.pid}

    @property
    def counted(self) -> bool:
        """Whether the switch has a process of its own, with nobody else's work in it."""
        return self.switch.pid != os.getpid()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.switch.resume()
        self.generator.resume()
        try:
            yield
        finally:
            self.generator.pause()
            self.switch.pause()

    def prepare(self, case: Case) -> None:
        self.switch.prepare(case)

    def arrange(self, case: Case) -> None:
        self.generator.arrange(case)

    def measure(self, case: Case, seconds: float) -> Reading:
        return self.generator.measure(case, seconds)


class Bound:
    """A ceiling of the machine, measured in turn with the switches."""

    def __init__(self, ceiling: Ceiling, cpu: int) -> None:
        """`cpu` is the switch's; its helper runs there."""
        self.ceiling = ceiling
        self.cpu = cpu
        self.name = ceiling.name
        self.title = ceiling.title
        self.pids = {os.getpid()}

    def running(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def prepare(self, case: Case) -> None:
        pass

    def arrange(self, case: Case) -> None:
        pass

    def measure(self, _case: Case, seconds: float) -> Reading:
        return self.ceiling.run(self.cpu, seconds)
