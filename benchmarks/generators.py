"""What sends the frames, takes them back in, and counts: always in a closed loop."""

from __future__ import annotations

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable

from benchmarks.guests import (
    FLOOD_PORTS,
    IN_FLIGHT,
    MACS,
    QUEUE_SIZE,
    RX_BUF_LEN,
    TSO_BUF_LEN,
    TSO_RX_QUEUE_SIZE,
    ethernet,
    frames_under_way,
    guest,
    tso_frame,
)
from benchmarks.machine import cpu_time_ns, resident_bytes
from benchmarks.samples import Case, Kind, Reading, RingFormat, percentile
from benchmarks.switches import Switch
from benchmarks.testpmd import Testpmd
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.guest.packets import BROADCAST
from vswitch.lab.load.latency import latencies
from vswitch.lab.load.load import Flow, Load

WARM_UP = 0.2
"""Part of a sample's length that is run before it, for caches, learned addresses and flow tables.
"""
GAP_S = 0.001
"""Pause before each frame of a "wakeup" case."""
_IDLE_LEAST_S = 1.0
_FALL_ASLEEP_S = 0.2
_QUIET_S = 0.01
"""When nothing has arrived for so long, nothing is under way."""


class Generator(ABC):
    """Two guests on the ports of one switch. Polls while it measures and sleeps otherwise."""

    name: str
    title: str
    hugepages_mib = 0
    kinds: frozenset[Kind] = frozenset({"rate"})
    max_frame_len = 9000

    def __init__(self, switch: Switch, cpu: int, ring: RingFormat = "split") -> None:
        """`ring` is the format of the rings where it cannot be changed any more later."""
        self.switch = switch
        self.cpu = cpu
        self.ring = ring

    @abstractmethod
    def connect(self) -> None:
        """Connect both guests to the switch, which is running."""

    @abstractmethod
    def arrange(self, case: Case) -> None:
        """Get ready for a sample; what this takes is no part of it. The switch is running."""

    @abstractmethod
    def measure(self, case: Case, seconds: float) -> Reading:
        """Warm up and measure what was arranged."""

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
    kinds = frozenset({"rate", "latency", "wakeup", "tso", "flood", "spread", "idle", "memory"})

    _guests: tuple[SoftwareGuest, ...] = ()
    _flows: list[Flow]

    def connect(self) -> None:
        """See whether the switch takes such guests at all."""
        if len(self.switch.sockets) == len(MACS):
            self._connect(Case("rate", self.name, 64, self.ring))

    def _connect(self, case: Case) -> None:
        self.close()
        macs = [f"52:54:00:00:00:{i + 1:02x}" for i in range(len(self.switch.sockets))]
        longest = self.max_frame_len if len(macs) == len(MACS) else case.frame_len
        self._guests = tuple(guest(mac, case, longest) for mac in macs)
        self.switch.connect(self._guests)

    def arrange(self, case: Case) -> None:
        self._connect(case)
        sender, receiver, *others = self._guests
        self._settle()
        transmitq, receiveq = sender.transmitqs[0], receiver.receiveqs[0]
        if case.kind in ("flood", "spread"):
            to = [BROADCAST] if case.kind == "flood" else [one.mac for one in self._guests[1:]]
            frames = [ethernet(dst, sender.mac, case.frame_len) for dst in to]
            # A window needs every frame to come to one receiver; the others are emptied as often.
            # Of what is spread, no receiver can have more than the transmitq holds.
            window = IN_FLIGHT if case.kind == "flood" else 0
            first = receiveq if window else None
            self._flows = [Flow(transmitq, first, frames, window=window)]
            rest = others if window else self._guests[1:]
            self._flows += [Flow(None, one.receiveqs[0], frames) for one in rest]
            return
        if case.kind == "tso":
            frame, header = tso_frame(receiver.mac, sender.mac)
            window = frames_under_way(case.frame_len, TSO_BUF_LEN, TSO_RX_QUEUE_SIZE)
        else:
            frame, header = ethernet(receiver.mac, sender.mac, case.frame_len), b""
            window = frames_under_way(case.frame_len, RX_BUF_LEN, QUEUE_SIZE)
        rewrite = case.kind == "tso"
        self._flows = [
            Flow(transmitq, receiveq, [frame], window=window, header=header, rewrite=rewrite)
        ]

    def measure(self, case: Case, seconds: float) -> Reading:
        if case.kind == "idle":
            return self._idle(max(seconds, _IDLE_LEAST_S))
        if case.kind == "memory":
            return Reading(resident_bytes(self.switch.pid))
        if case.kind not in ("latency", "wakeup"):
            load = Load(self._flows)
            load.run(seconds * WARM_UP, settle_s=1.0)
            results = load.run(seconds, settle_s=1.0)
            # More received than sent: frames of the warm-up that somebody held up.
            copies = FLOOD_PORTS if case.kind == "flood" else 1
            lost = abs(copies * results[0].sent - sum(one.received for one in results))
            arrived = sum(one.received_in_time for one in results[case.kind == "spread" :])
            return Reading(arrived / results[0].seconds, lost=lost)
        (flow,) = self._flows
        gap_s = GAP_S if case.kind == "wakeup" else 0.0
        latencies(flow, seconds * WARM_UP, gap_s=gap_s)
        return reading_of_times(latencies(flow, seconds, gap_s=gap_s))

    def _idle(self, seconds: float) -> Reading:
        """CPU time of a switch that has had time to fall asleep, in percent of one CPU."""
        time.sleep(_FALL_ASLEEP_S)
        before, start = cpu_time_ns(self.switch.pid), time.monotonic_ns()
        time.sleep(seconds)
        spent, length = cpu_time_ns(self.switch.pid) - before, time.monotonic_ns() - start
        return Reading(100 * spent / length)

    def _settle(self) -> None:
        """Take what is still under way, and have the switch know where the receiver is.

        Without a frame now and then, a switch forgets whoever sends nothing.
        """
        sender, *receivers = self._guests
        if not self.switch.software_guests_only:
            for receiver in receivers:
                receiver.send([ethernet(BROADCAST, receiver.mac, 64)])
            sender.recv(len(receivers))
        frames = [ethernet(BROADCAST, BROADCAST, 64)]
        quiet = Load([Flow(None, one.receiveqs[0], frames) for one in receivers])
        while any(one.received for one in quiet.run(_QUIET_S)):
            pass

    def close(self) -> None:
        self.switch.forget()
        for each in self._guests:
            each.close()
        self._guests = ()


def reading_of_times(spent: Iterable[int]) -> Reading:
    """Median and p99 of the nanoseconds that single frames took."""
    ordered = sorted(spent)
    return Reading(percentile(ordered, 0.5), p99=percentile(ordered, 0.99))


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
            f",mrg_rxbuf=1,in_order=0,packed_vq={int(self.ring == 'packed')}"
            for i, (path, mac) in enumerate(zip(self.switch.sockets, MACS, strict=True))
        ]
        options = ["--forward-mode=io", "--total-num-mbufs=8192"]
        options += [f"--eth-peer={i},{MACS[1 - i]}" for i in range(2)]
        self._testpmd = Testpmd([self.cpu], vdevs, options, memory_mib=self.hugepages_mib)

    def arrange(self, case: Case) -> None:
        self._testpmd.command(f"set txpkts {case.frame_len}")

    def measure(self, _case: Case, seconds: float) -> Reading:
        pmd = self._testpmd
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
