"""What sends the frames, takes them back in, and counts: always in a closed loop."""

from __future__ import annotations

import os
import signal
import time
from abc import ABC, abstractmethod

from benchmarks.samples import Case, Kind, Reading, percentile
from benchmarks.switches import Switch
from benchmarks.testpmd import Testpmd
from vswitch.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.guest.latency import latencies
from vswitch.guest.load import Flow, Load
from vswitch.guest.packets import BROADCAST

MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
QUEUE_SIZE = 256
IN_FLIGHT = 128
"""Frames of a direction that are under way at most."""
WARM_UP = 0.2
"""Part of a sample's length that is run before it, for caches, learned addresses and flow tables.
"""
GAP_S = 0.001
"""Pause before each frame of a "wakeup" case."""
_QUIET_S = 0.01
"""When nothing has arrived for so long, nothing is under way."""
_RX_BUF_LEN = 2048
_HEADER_LEN = 12
_ETHERTYPE_EXPERIMENT = b"\x88\xb5"


class Generator(ABC):
    """Two guests on the ports of one switch. Polls while it measures and sleeps otherwise."""

    name: str
    title: str
    hugepages_mib = 0
    kinds: frozenset[Kind] = frozenset({"rate"})
    max_frame_len = 9000

    def __init__(self, switch: Switch, cpu: int) -> None:
        self.switch = switch
        self.cpu = cpu

    @abstractmethod
    def connect(self) -> None:
        """Connect both guests to the switch, which is running."""

    @abstractmethod
    def measure(self, case: Case, seconds: float) -> Reading:
        """Warm up and measure. The switch is running and prepared."""

    @abstractmethod
    def close(self) -> None: ...

    @property
    def pid(self) -> int:
        """The process whose thread generates."""
        return os.getpid()

    def resume(self) -> None:  # noqa: B027
        """Get ready to measure."""

    def pause(self) -> None:  # noqa: B027
        """Use no CPU any more."""


class SoftwareGenerator(Generator):
    """Two of our software guests, driven by one thread: frames from the first to the second.

    It prepares every frame once and does not touch it again, so nearly all of its work is in the
    rings. Each sample has new guests: which pages of the machine their memory is made of decides
    what stays in the caches, and no switch shall have the same good or bad luck in all samples.
    """

    name = "software"
    title = "software guests, one direction"
    kinds = frozenset({"rate", "latency", "wakeup"})

    _guests: tuple[SoftwareGuest, ...] = ()

    def connect(self) -> None:
        self.close()
        self._guests = tuple(map(self._guest, MACS))
        self.switch.connect((self._guests[0], self._guests[1]))

    def _guest(self, mac: str) -> SoftwareGuest:
        # One descriptor a frame, as Linux has it for frames in one piece. Not strict: DPDK is lax
        # about num_buffers.
        return SoftwareGuest(
            mac,
            queue_size=QUEUE_SIZE,
            features=DEFAULT_FEATURES,
            indirect=False,
            max_frame_len=self.max_frame_len,
            rx_buf_len=_RX_BUF_LEN,
            strict=False,
            polling=True,
        )

    def measure(self, case: Case, seconds: float) -> Reading:
        self.connect()
        sender, receiver = self._guests
        self._settle()
        frame = ethernet(receiver.mac, sender.mac, case.frame_len)
        buffers = -(-(_HEADER_LEN + case.frame_len) // _RX_BUF_LEN)
        window = min(IN_FLIGHT, QUEUE_SIZE // buffers)
        flow = Flow(sender.transmitqs[0], receiver.receiveqs[0], [frame], window=window)
        if case.kind == "rate":
            load = Load([flow])
            load.run(seconds * WARM_UP, settle_s=1.0)
            (result,) = load.run(seconds, settle_s=1.0)
            # More received than sent: frames of the warm-up that somebody held up.
            return Reading(result.frames_per_s, lost=abs(result.sent - result.received))
        gap_s = GAP_S if case.kind == "wakeup" else 0.0
        latencies(flow, seconds * WARM_UP, gap_s=gap_s)
        spent = sorted(latencies(flow, seconds, gap_s=gap_s))
        return Reading(percentile(spent, 0.5), p99=percentile(spent, 0.99))

    def _settle(self) -> None:
        """Take what is still under way, and have the switch know where the receiver is.

        Without a frame now and then, a switch forgets whoever sends nothing.
        """
        sender, receiver = self._guests
        if not self.switch.software_guests_only:
            receiver.send([ethernet(BROADCAST, receiver.mac, 64)])
            sender.recv(1)
        quiet = Load([Flow(None, receiver.receiveqs[0], [ethernet(BROADCAST, BROADCAST, 64)])])
        while quiet.run(_QUIET_S)[0].received:
            pass

    def close(self) -> None:
        self.switch.forget()
        for guest in self._guests:
            guest.close()
        self._guests = ()


def ethernet(dst: bytes, src: bytes, length: int) -> bytes:
    """A frame of `length` bytes, no frame check sequence."""
    return (dst + src + _ETHERTYPE_EXPERIMENT).ljust(length, b"\0")


class TestpmdGenerator(Generator):
    """testpmd with two virtio-user ports in io mode: frames go round in both directions."""

    name = "testpmd"
    title = "testpmd virtio-user, both directions"
    hugepages_mib = 128
    max_frame_len = 2000
    _BURSTS = IN_FLIGHT // 32

    def connect(self) -> None:
        vdevs = [
            f"net_virtio_user{i},path={path},mac={mac},queue_size={QUEUE_SIZE}"
            ",mrg_rxbuf=1,in_order=0"
            for i, (path, mac) in enumerate(zip(self.switch.sockets, MACS, strict=True))
        ]
        options = ["--forward-mode=io", "--total-num-mbufs=8192"]
        options += [f"--eth-peer={i},{MACS[1 - i]}" for i in range(2)]
        self._testpmd = Testpmd(self.cpu, vdevs, options, memory_mib=self.hugepages_mib)

    def measure(self, case: Case, seconds: float) -> Reading:
        pmd = self._testpmd
        pmd.command(f"set txpkts {case.frame_len}")
        pmd.command(f"start tx_first {self._BURSTS}")
        time.sleep(seconds * WARM_UP)
        frames_before, start = self._received()
        time.sleep(seconds)
        frames_after, end = self._received()
        pmd.command("stop")
        rate = (frames_after - frames_before) / (end - start)
        return Reading(rate, lost=2 * IN_FLIGHT - self._survivors())

    def _received(self) -> tuple[int, float]:
        """Frames received so far, and when that was."""
        asked = time.monotonic()
        received, _ = self._testpmd.frames()
        return received, (asked + time.monotonic()) / 2

    def _survivors(self) -> int:
        """Frames that are still in the rings, by starting anew: testpmd first empties its ports."""
        before, _ = self._testpmd.frames()
        self._testpmd.command("start")
        self._testpmd.command("stop")
        after, _ = self._testpmd.frames()
        return after - before

    @property
    def pid(self) -> int:
        return self._testpmd.pid

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def close(self) -> None:
        if hasattr(self, "_testpmd"):
            self._testpmd.close()
