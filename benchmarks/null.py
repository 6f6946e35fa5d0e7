"""No switch at all, in its best rhythm: what the software generator itself can reach."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.guests import MACS, QUEUE_SIZE, RX_BUF_LEN, ethernet, frames_under_way, guest
from benchmarks.native.null_backend import NullBackend
from benchmarks.samples import Case
from benchmarks.switches import Switch
from vswitch._version import __version__
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.load.load import Flow, Load


class Rhythm(NamedTuple):
    """Frames that move together, and how many looks at fewer are too many; see NullBackend."""

    burst: int
    patience: int


EAGER = Rhythm(32, 0)
RHYTHMS = (EAGER, Rhythm(64, 5000), Rhythm(96, 5000), Rhythm(128, 5000))
TRIALS = 3
_TRIAL_S = 0.02


class NullSwitch(Switch):
    """No switch: indices and lengths go from ring to ring, no frame is looked at or copied.

    The generator's ceiling in a "rate" case. Which rhythm suits it best differs from machine to
    machine, so each is tried before the first sample of a case. Single frames are moved at once.
    """

    name = "null"
    title = "no switch"
    kinds = frozenset({"rate", "latency", "wakeup"})
    software_guests_only = True
    max_frame_len = 2000

    _guests: Sequence[SoftwareGuest] | None = None
    _case = Case("rate", "software", 64)
    rhythm = EAGER
    _backend: NullBackend | None = None
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """There is nothing to start before there are guests."""

    def connect(self, guests: Sequence[SoftwareGuest]) -> None:
        for each in guests:
            each.build_offline(each.wanted.features)
        self._guests = guests
        self.resume()

    def forget(self) -> None:
        self.pause()
        self._guests = None

    def prepare(self, case: Case) -> None:
        self.pause()
        self._case = case
        self.rhythm = EAGER
        if case.kind == "rate":
            before, self._guests = self._guests, None
            best = {rhythm: max(self._try(rhythm) for _ in range(TRIALS)) for rhythm in RHYTHMS}
            self.rhythm = max(best, key=lambda rhythm: best[rhythm])
            self._guests = before
        self.resume()

    def _try(self, rhythm: Rhythm) -> float:
        """Frames a second in this rhythm, with guests of its own."""
        case = self._case
        sender, receiver = (guest(mac, case, self.max_frame_len) for mac in MACS)
        self.rhythm = rhythm
        try:
            self.connect((sender, receiver))
            window = frames_under_way(case.frame_len, RX_BUF_LEN, QUEUE_SIZE)
            frame = ethernet(receiver.mac, sender.mac, case.frame_len)
            flow = Flow(sender.transmitqs[0], receiver.receiveqs[0], [frame], window=window)
            load = Load([flow])
            load.run(_TRIAL_S / 2, settle_s=1.0)
            return load.run(_TRIAL_S, settle_s=1.0)[0].frames_per_s
        finally:
            self.forget()
            sender.close()
            receiver.close()

    @property
    def pid(self) -> int:
        return os.getpid()

    def resume(self) -> None:
        if self._guests is None or self._thread is not None:
            return
        sender, receiver = self._guests
        backend = NullBackend(
            sender.transmitqs[0],
            receiver.receiveqs[0],
            self._case.frame_len,
            burst=self.rhythm.burst,
            patience=self.rhythm.patience,
        )

        def run() -> None:
            os.sched_setaffinity(0, {self.cpu})
            backend.run()

        self._backend = backend
        self._thread = threading.Thread(target=run, name="null backend", daemon=True)
        self._thread.start()

    def pause(self) -> None:
        if self._backend is not None and self._thread is not None:
            self._backend.stop()
            self._thread.join()
            self._backend = self._thread = None

    def close(self) -> None:
        self.forget()

    def version(self) -> str:
        return __version__
