"""A switch in a process of its own, as a user starts it, and software guests on its ports."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.support.frames import BROADCAST, frame, frames, mac
from vswitch.api import PortInfo, PortStats
from vswitch.control.client import Client
from vswitch.lab.guest import DEFAULT_FEATURES, SoftwareGuest
from vswitch.lab.guest.net_driver import AnyQueue
from vswitch.lab.guest.options import by_subject
from vswitch.lab.guest.packets import format_mac
from vswitch.lab.guest.raw import DESC_F_INDIRECT, DESC_LEN, RawDesc
from vswitch.lab.load.load import SEQUENCE_LEN, Flow, FlowResult, Load
from vswitch.vhost_user.protocol import Feature

DEADLINE_S = 60.0
"""After so long what is waited for is broken; no test asserts that anything is faster."""


AGuest = TypeVar("AGuest", bound=SoftwareGuest)


class RunningSwitch:
    """`vswitch start` with an empty configuration; ports come and go over the control socket.

    `settings` are keys of [switch], `tables` whatever else is to stand in the configuration, `env`
    is added to the environment, `command` goes before the arguments in place of `python -P
    -m vswitch`. What it logs is in `log`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tables: str = "",
        env: dict[str, str] | None = None,
        command: tuple[str, ...] = (sys.executable, "-P", "-m", "vswitch"),
        **settings: object,
    ) -> None:
        self.run_dir = run_dir
        control = run_dir / "control.sock"
        lines = ["[switch]", f'control = "{control}"']
        lines += [
            f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}"
            for key, value in settings.items()
        ]
        config = run_dir / "ports.toml"
        config.write_text("\n".join(lines) + f"\n{tables}")
        self.log = ""
        self._more = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [*command, "start", "--config", str(config)],
            env={**os.environ, **(env or {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, name="switch log", daemon=True)
        self._reader.start()
        try:
            self.wait_for_log("vswitch: ready")
            self.client = Client(control)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self.log += line
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def wait_for_log(self, text: str, start: int = 0, timeout: float = DEADLINE_S) -> None:
        """Wait until `text` stands in the log after position `start`."""
        with self._more:
            self._more.wait_for(lambda: self._ended or self.log.find(text, start) >= 0, timeout)
            found = self.log.find(text, start) >= 0
            when = "of a switch that has ended" if self._ended else f"after {timeout:g} s"
            assert found, f"no {text!r} in the log {when}:\n{self.log[start:]}"

    def kill(self) -> None:
        """End it as a crash does."""
        self.client.close()
        self.process.kill()
        self.process.wait()
        self._close_log()

    def _close_log(self) -> None:
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def stop(self) -> None:
        """Stop it as a user does, and see that it went in good order."""
        self.client.close()
        self.process.terminate()
        try:
            status = self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._close_log()
        assert status == 0, self.log
        assert "Traceback" not in self.log, self.log


class Wire:
    """One test's ports and guests on a running switch; all are gone after `close`."""

    _numbers = itertools.count(1)

    def __init__(self, switch: RunningSwitch) -> None:
        self.switch = switch
        self.client = switch.client
        self.log_start = len(switch.log)
        self.extra_features = Feature(0)
        """Added to what the guests of this test want."""
        self._names: list[str] = []
        self._stack = contextlib.ExitStack()

    def port(self, name: str, **options: Any) -> Path:
        """Add a port; returns its socket. `options` as for Client.add_port."""
        socket = self.switch.run_dir / f"{next(self._numbers)}.sock"
        self.client.add_port(name, socket, **options)
        self._names.append(name)
        return socket

    def guest(
        self, name: str, n: int, ip: str | None = None, *, mode: str = "server",
        mtu_of_port: int | None = None, **options: Any,
    ) -> SoftwareGuest:  # fmt: skip
        """The n-th guest, connected to a port of its own. `options` as for by_subject()."""
        options["features"] = options.get("features", DEFAULT_FEATURES) | self.extra_features
        guest = self._stack.enter_context(SoftwareGuest(mac(n), ip, **by_subject(**options)))
        queues = options.get("queues", 1)
        if mode == "server":
            guest.connect(self.port(name, mtu=mtu_of_port, queues=queues))
        else:
            socket = self.switch.run_dir / f"{next(self._numbers)}.sock"
            guest.listen(socket)
            self.client.add_port(name, socket, mode="client", mtu=mtu_of_port, queues=queues)
            self._names.append(name)
            guest.accept()
        return guest

    def enter(self, guest: AGuest) -> AGuest:
        """Close this guest too at the end of the test."""
        self._stack.enter_context(guest)
        return guest

    def info(self, name: str) -> PortInfo:
        return self.client.port(name)

    def stats(self, name: str) -> PortStats:
        return self.client.stats(name)[0]

    def drops(self, name: str) -> dict[str, int]:
        return self.stats(name)["drops"]

    def learned(self) -> dict[str, str]:
        """MAC address to port, untagged."""
        return {entry["mac"]: entry["port"] for entry in self.client.fdb() if not entry["vlan"]}

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Ask until `condition` holds; for what the switch does on its own time."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not after {DEADLINE_S:g} s"
            time.sleep(0.005)  # between two looks

    def wait_state(self, name: str, state: str) -> None:
        self.wait_until(lambda: self.info(name)["state"] == state, f"port {name} becomes {state}")

    def wait_drops(self, name: str, drops: dict[str, int]) -> None:
        self.wait_until(lambda: self.drops(name) == drops, f"{name} has dropped {drops}")

    def wait_log(self, text: str) -> None:
        """Wait until the switch has logged `text` since this test began."""
        self.switch.wait_for_log(text, self.log_start)

    def remove(self, name: str) -> None:
        self.client.del_port(name)
        self._names.remove(name)

    def close(self) -> None:
        self._stack.close()
        for name in self._names:
            self.client.del_port(name)


def teach(*guests: SoftwareGuest) -> None:
    """Have the switch learn every guest: each sends a frame of its own, heard by the others."""
    for guest in guests:
        hello = frame(BROADCAST, format_mac(guest.mac), 60, 999)
        guest.send([hello])
        for other in guests:
            if other is not guest:
                assert other.recv(1) == [hello]


def used_on(queues: Sequence[AnyQueue], more: int) -> None:
    """Wait until the switch has used so many more buffers in each of these running queues."""
    before = [queue.ring.used_idx for queue in queues]
    deadline = time.monotonic() + DEADLINE_S
    for queue, was in zip(queues, before, strict=True):
        while (queue.ring.used_idx - was) % 65536 < more:
            assert time.monotonic() < deadline, f"{queue.ring.name}: nothing moves"
            time.sleep(0.001)  # between two looks


@contextlib.contextmanager
def loading(load: Load) -> Iterator[list[FlowResult]]:
    """At full rate in a thread of its own; afterwards the results are in the list."""
    results: list[FlowResult] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            results.extend(load.run(3600.0))
        except BaseException as error:
            failed.append(error)

    runner = threading.Thread(target=run)
    runner.start()
    try:
        yield results
    finally:
        while runner.is_alive():
            load.stop()  # which counts only when it runs already
            runner.join(0.001)
    if failed:
        raise failed[0]


def all_came(results: list[FlowResult], receivers: list[SoftwareGuest]) -> None:
    """What verified flows have sent in their only run has arrived, in order, or still does."""
    for result, receiver in zip(results, receivers, strict=True):
        # What was on its way when they were stopped. Each ends with its number.
        rest = [
            int.from_bytes(one[-SEQUENCE_LEN:], sys.byteorder)
            for one in receiver.recv(result.sent - result.received, DEADLINE_S)
        ]
        assert rest == list(range(result.received, result.sent))
        assert (result.lost, result.misordered, result.corrupt, result.written_off) == (0,) * 4


@contextlib.contextmanager
def exchanging(b: SoftwareGuest, c: SoftwareGuest) -> Iterator[None]:
    """Two guests that know each other exchange frames as fast as they can, compared byte by byte.

    They do so before, during and after the block, and in the end every frame has arrived, in order;
    whoever lost some was disturbed.
    """
    flows = [
        Flow(
            sender.transmitqs[0], receiver.receiveqs[0],
            frames(format_mac(receiver.mac), format_mac(sender.mac), [60, 1514]),
            window=64, verify=True, write_off_s=DEADLINE_S,
        )
        for sender, receiver in ((b, c), (c, b))
    ]  # fmt: skip
    receiveqs = [*b.receiveqs, *c.receiveqs]
    with loading(Load(flows)) as results:
        used_on(receiveqs, 500)
        yield
        used_on(receiveqs, 500)
    all_came(results, [c, b])
    b.drain()
    c.drain()


def silent(*guests: SoftwareGuest) -> bool:
    """Whether nothing waits in these guests' receiveqs.

    Meaningful once the switch has handled what could have come: after drain() of the senders, since
    it gives a frame's buffer back only when every copy of it has been delivered.
    """
    return not any(guest.poll_frames(1) for guest in guests)


def posted(guest: SoftwareGuest) -> set[int]:
    """Where receive buffers, and the tables that describe them, begin and end."""
    queue = guest.receiveqs[0]
    ring = queue.raw_packed() if queue.ring.packed else queue.raw
    found = set()
    for index in range(queue.layout.size):
        desc = ring.read_desc(index)
        if desc.flags & DESC_F_INDIRECT:
            for at in range(desc.addr, desc.addr + desc.len, DESC_LEN):
                piece = RawDesc(*struct.unpack("<QIHH", guest.memory.read(at, DESC_LEN)))
                found |= {piece.addr, piece.addr + piece.len - 1}
        if desc.len:
            found |= {desc.addr, desc.addr + desc.len - 1}
    return found


def open_files(wire: Wire) -> list[str]:
    """What the switch's descriptors name, in order."""
    found = []
    for path in Path(f"/proc/{wire.switch.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since they were listed
            found.append(os.readlink(path))
    return sorted(found)


def translated(*guests: SoftwareGuest) -> None:
    """Wait until the switch knows where the guests' receive buffers are."""
    for one in guests:
        one.iommu.wait_for_misses(posted(one))
