"""The switches that are measured: vswitch in several dresses, and testpmd's io mode.

Each has two ports and is confined to one CPU with all its threads.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from benchmarks import testpmd
from benchmarks.guests import TSO_FRAME_LEN
from benchmarks.machine import running_on
from benchmarks.samples import Case, Kind, Setup
from benchmarks.testpmd import Testpmd
from vswitch._version import __version__
from vswitch.lab.guest import BufferOptions, SoftwareGuest
from vswitch.lab.qemu.switch_process import SwitchProcess


class Switch(ABC):
    """A switch with `setup.ports` ports. Made and started once, resumed for each sample.

    `kinds` and `max_frame_len` say what it can be measured with. A paused switch uses no CPU.
    """

    name: str
    title: str
    hugepages_mib = 0
    kinds: frozenset[Kind] = frozenset(
        {"rate", "latency", "wakeup", "tso", "flood", "spread", "idle", "memory", "startup"}
    )
    max_frame_len = TSO_FRAME_LEN
    software_guests_only = False
    host_interface = ""
    """The host's interface of the uplink, where `setup.uplink` asks for one."""

    def __init__(self, folder: Path, cpu: int, setup: Setup) -> None:
        """`folder` exists and is this switch's own."""
        self.folder = folder
        self.cpu = cpu
        self.setup = setup
        self.sockets = tuple(folder / f"p{i}.sock" for i in range(setup.ports))

    @classmethod
    def can(cls, case: Case) -> bool:
        """Whether this case can, and is worth to, be measured with it."""
        return case.kind in cls.kinds and case.frame_len <= cls.max_frame_len

    @abstractmethod
    def start(self) -> None:
        """Start it; afterwards it listens on `sockets`. MissingError if it is not installed."""

    @abstractmethod
    def close(self) -> None:
        """End it and leave nothing behind. May be called at any time."""

    @abstractmethod
    def version(self) -> str: ...

    @property
    @abstractmethod
    def pid(self) -> int:
        """The process in which the frames are moved."""

    def connect(self, guests: Sequence[SoftwareGuest]) -> None:
        """Connect a guest to each port."""
        for guest, socket in zip(guests, self.sockets, strict=True):
            guest.connect(socket)

    def forget(self) -> None:  # noqa: B027
        """The guests are about to go; others will be connected."""

    def prepare(self, case: Case) -> None:  # noqa: B027
        """Get ready for this case. It is running when this is called."""

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def pause(self) -> None:
        """Take it off its CPU."""
        os.kill(self.pid, signal.SIGSTOP)


class Vswitch(Switch):
    """`vswitch start` with its default settings and its worker pinned."""

    name = "vswitch"
    title = "vswitch"
    kinds = Switch.kinds | {"tap-out", "tap-in"}
    host_interface = "vsb-vswitch"
    polling = "adaptive"
    workers = 1
    program: tuple[str, ...] = ()
    """The `vswitch` to be started; () is the one that this runs on."""

    def start(self) -> None:
        control = self.folder / "control.sock"
        config = self.folder / "ports.toml"
        lines = ["[switch]", f'control = "{control}"', f'polling = "{self.polling}"']
        # Several of them share the CPU to which the process is confined.
        lines += [f"cpus = [{self.cpu}]"] if self.workers == 1 else [f"workers = {self.workers}"]
        for name, socket in self.ports().items():
            lines += ["[[port]]", f'name = "{name}"', f'socket = "{socket}"']
        if self.setup.uplink:
            lines += ["[uplink]", 'type = "tap"', f'name = "{self.host_interface}"']
        config.write_text("\n".join(lines) + "\n")
        self._process = SwitchProcess(config, control, self.folder / "log", self.program)
        with running_on({self.cpu}):
            self._process.start()

    def ports(self) -> dict[str, Path]:
        """Ports and their sockets."""
        return {socket.stem: socket for socket in self.sockets}

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        if hasattr(self, "_process") and self._process.running:
            self.resume()
            self._process.stop()

    def version(self) -> str:
        return __version__


class BusyVswitch(Vswitch):
    """vswitch with polling = "busy". Differs only when there is nothing to do."""

    name = "vswitch-busy"
    title = "vswitch, busy polling"
    polling = "busy"
    kinds = frozenset({"latency", "wakeup"})


class CrowdedVswitch(Vswitch):
    """vswitch with 62 more ports, to each of which a guest is connected that does nothing."""

    name = "vswitch-64"
    title = "vswitch, 62 idle ports"
    kinds = frozenset({"rate", "idle"})
    _IDLE = 62

    def __init__(self, folder: Path, cpu: int, setup: Setup) -> None:
        super().__init__(folder, cpu, setup)
        self._idle: list[SoftwareGuest] = []

    @classmethod
    def can(cls, case: Case) -> bool:
        return super().can(case) and case == Case(case.kind, "software", 64)

    def ports(self) -> dict[str, Path]:
        idle = {f"idle{i}": self.folder / f"idle{i}.sock" for i in range(self._IDLE)}
        return {**super().ports(), **idle}

    def start(self) -> None:
        super().start()
        few = BufferOptions(queue_size=64)
        for i in range(self._IDLE):
            guest = SoftwareGuest(f"52:54:00:00:01:{i:02x}", buffers=few, polling=True)
            self._idle.append(guest)
            guest.connect(self.folder / f"idle{i}.sock")

    def close(self) -> None:
        super().close()
        for guest in self._idle:
            guest.close()
        self._idle.clear()


class TwoWorkers(Vswitch):
    """vswitch with two workers on its CPU, one of which has nothing to do.

    Shows what sharing costs where two workers may write one receiveq, and no more: a second CPU for
    the second worker is not there.
    """

    name = "vswitch-2w"
    title = "vswitch, two workers"
    kinds = frozenset({"rate"})
    workers = 2

    @classmethod
    def can(cls, case: Case) -> bool:
        plain = [Case("rate", "software", length) for length in (64, 1500)]
        return super().can(case) and case in plain

    def start(self) -> None:
        super().start()
        with self._process.client() as client:
            for name in self.ports():
                client.worker_pin(name, 0)


class TestpmdIo(Switch):
    """testpmd between two vhost ports: every frame goes to the other port, unseen."""

    name = "testpmd"
    title = "testpmd io"
    hugepages_mib = 256
    kinds = frozenset({"rate", "latency", "wakeup", "tso", "idle", "memory", "startup"})

    def start(self) -> None:
        tso = int(self.setup.tso)
        vdevs = [f"net_vhost{i},iface={path},tso={tso}" for i, path in enumerate(self.sockets)]
        options = ["--forward-mode=io", "--total-num-mbufs=32768"]
        self._testpmd = Testpmd([self.cpu], vdevs, options, memory_mib=self.hugepages_mib)
        self._testpmd.command("start")

    @property
    def pid(self) -> int:
        return self._testpmd.pid

    def close(self) -> None:
        if hasattr(self, "_testpmd"):
            self._testpmd.close()

    def version(self) -> str:
        return testpmd.version()
