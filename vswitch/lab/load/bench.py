"""Two software guests as a load generator for any vhost-user backend: rate, loss, latency."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vswitch import ethertypes
from vswitch.lab.guest.errors import BackendTimeoutError, GuestError
from vswitch.lab.guest.guest import SoftwareGuest
from vswitch.lab.guest.options import DEFAULT_FEATURES, Wanted
from vswitch.lab.guest.packets import BROADCAST
from vswitch.lab.guest.shapes import BufferOptions
from vswitch.lab.load.latency import latencies
from vswitch.lab.load.load import Flow, FlowResult, Load
from vswitch.vhost_user.protocol import Feature

MIN_FRAME_LEN = 64
MAX_FRAME_LEN = 9000
_MACS = ("52:54:00:be:00:01", "52:54:00:be:00:02")
_RX_BUF_LEN = 2048
_WARM_UP = 0.2
_LATENCY_SHARE = 0.5
_SETTLE_S = 1.0
_FIRST_FRAME_S = 15.0
"""How long a switch may take until it forwards: VPP brings an interface up some seconds later."""
_AGAIN_S = 0.1
"""Time between two attempts meanwhile, and without a frame until nothing is under way any more."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What came of one run. `lost` frames were sent and did not arrive; latencies in microseconds.

    `bits_per_s` counts the frames without check sequence, preamble and gap.
    """

    frames_per_s: float
    bits_per_s: float
    sent: int
    received: int
    lost: int
    latency_median_us: float
    latency_p99_us: float


@dataclass(frozen=True, slots=True)
class Options:
    """How the guests are to be. `window` is the most frames under way in a direction."""

    frame_len: int = MIN_FRAME_LEN
    seconds: float = 3.0
    window: int = 128
    queue_size: int = 256
    packed: bool = False
    both: bool = False


def measure(sockets: Sequence[str | Path], options: Options) -> Rates:
    """Connect a guest to each of two sockets and send from the first to the second, and back.

    Polls, so it takes the whole CPU that the calling thread runs on. GuestError when nothing
    gets through, and when a backend refuses a guest or breaks a rule.
    """
    with contextlib.ExitStack() as stack:
        guests = [stack.enter_context(_guest(mac, options)) for mac in _MACS]
        for guest, socket in zip(guests, sockets, strict=True):
            guest.connect(socket)
        _introduce(*guests)
        flows = [_flow(guests[0], guests[1], options)]
        if options.both:
            flows.append(_flow(guests[1], guests[0], options))
        load = Load(flows)
        load.run(options.seconds * _WARM_UP, settle_s=_SETTLE_S)
        results = load.run(options.seconds, settle_s=_SETTLE_S)
        spent = sorted(latencies(flows[0], options.seconds * _LATENCY_SHARE))
    return _rates(results, options.frame_len, spent)


def _rates(results: Sequence[FlowResult], frame_len: int, spent: Sequence[int]) -> Rates:
    frames_per_s = sum(result.frames_per_s for result in results)
    sent = sum(result.sent for result in results)
    received = sum(result.received for result in results)
    return Rates(
        frames_per_s=frames_per_s,
        bits_per_s=8 * frame_len * frames_per_s,
        sent=sent,
        received=received,
        lost=max(0, sent - received),
        latency_median_us=spent[len(spent) // 2] / 1e3,
        latency_p99_us=spent[min(len(spent) - 1, len(spent) * 99 // 100)] / 1e3,
    )


def _guest(mac: str, options: Options) -> SoftwareGuest:
    needed = Feature.RING_PACKED if options.packed else Feature(0)
    return SoftwareGuest(
        mac,
        wanted=Wanted(features=DEFAULT_FEATURES | needed, required_features=needed),
        buffers=BufferOptions(
            queue_size=options.queue_size,
            indirect=False,
            max_frame_len=options.frame_len,
            rx_buf_len=_RX_BUF_LEN,
        ),
        strict=False,
        polling=True,
    )


def _frame(dst: bytes, src: bytes, length: int) -> bytes:
    return (dst + src + ethertypes.wire(ethertypes.EXPERIMENT)).ljust(length, b"\0")


def _introduce(*guests: SoftwareGuest) -> None:
    """Have the switch learn where both are, and see that anything gets through.

    Again and again: what a switch gets before it is ready may be lost.
    """
    for guest, other in (guests, guests[::-1]):
        broadcast = [_frame(BROADCAST, guest.mac, MIN_FRAME_LEN)]
        deadline = time.monotonic() + _FIRST_FRAME_S
        while True:
            with contextlib.suppress(BackendTimeoutError):  # it has not even taken the earlier ones
                guest.send(broadcast, timeout=_AGAIN_S)
            if other.recv(1, _AGAIN_S):
                break
            if time.monotonic() > deadline:
                raise GuestError(
                    f"a broadcast sent to {guest.path} did not arrive at {other.path} "
                    f"within {_FIRST_FRAME_S:g} s",
                    hint="both sockets must belong to one switch that forwards between them",
                )
    # A switch that kept all of them delivers them now: none may be counted as a measured frame.
    for guest in guests:
        while guest.recv(1, _AGAIN_S):
            pass


def _flow(sender: SoftwareGuest, receiver: SoftwareGuest, options: Options) -> Flow:
    header_len = receiver.receiveqs[0].ring.header_len
    buffers = -(-(header_len + options.frame_len) // _RX_BUF_LEN)
    return Flow(
        sender.transmitqs[0],
        receiver.receiveqs[0],
        [_frame(receiver.mac, sender.mac, options.frame_len)],
        window=max(1, min(options.window, options.queue_size // buffers)),
    )
