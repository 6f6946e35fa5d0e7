"""One switch and three QEMU guests that all end-to-end tests share.

A test says with `require` which guests it needs and gets them booted and on the wire, whatever an
earlier test left behind; at most three run at a time. The switch is driven as a user would, with
`vswitchctl --json`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vswitch import Client
from vswitch.lab.qemu import process
from vswitch.lab.qemu.command_line import GuestSettings
from vswitch.lab.qemu.guest import Guest
from vswitch.lab.qemu.image import GuestImage
from vswitch.lab.qemu.switch_process import SwitchProcess

NAMES = ("vm1", "vm2", "vm3")
NETWORK = "10.77.0"
HOST_IP = f"{NETWORK}.254"

PATIENCE_S = 60.0
"""After so long what is waited for is broken; no test asserts that anything is faster."""

VSWITCHCTL = Path(sys.executable).with_name("vswitchctl")


def wait_until(what: str, condition: Callable[[], object]) -> None:
    """Wait for `condition` to be true, AssertionError after PATIENCE_S."""
    deadline = process.Deadline(PATIENCE_S)
    while not condition():
        assert not deadline.passed(), f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(0.02)  # between two looks at it


def somebody_listens(path: Path) -> bool:
    """Whether a Unix socket listens at `path`; the file is there a moment before it does."""
    accepting = 0x10000
    sockets = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return any(int(words[3], 16) & accepting and words[7:] == [str(path)] for words in sockets)


@dataclass(frozen=True)
class Refusal:
    """What a failed `vswitchctl --json` said."""

    exit_code: int
    code: str
    message: str
    hint: str


@dataclass(frozen=True)
class Kind:
    """How a guest differs from the usual ones, and its port (options of `vswitchctl add-port`)."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    port_options: tuple[object, ...] = ()


class Testbed:
    """See the module. `directory` holds configuration, sockets and logs."""

    __test__ = False

    def __init__(self, directory: Path, image: GuestImage, workers: int = 1) -> None:
        self.directory = directory
        self.image = image
        self.control = directory / "control.sock"
        self.config = directory / "ports.toml"
        self.log = directory / "vswitch.log"
        self.switch = SwitchProcess(self.config, self.control, self.log)
        self.guests = {name: self._guest(self.settings(name)) for name in NAMES}
        ports = [
            f'[[port]]\nname = "{name}"\nsocket = "{self.socket(name)}"\nmode = "server"\n'
            for name in NAMES
        ]
        self.config.write_text(
            f'[switch]\nname = "e2e"\ncontrol = "{self.control}"\nworkers = {workers}\n\n'
            + "\n".join(ports)
        )

    def close(self) -> None:
        """Stop the guests, then the switch, which must end well."""
        for guest in self.guests.values():
            guest.stop()
        if self.switch.running:
            assert self.switch.stop() == 0, "the switch's exit code"

    # Guests.

    def socket(self, port: str) -> Path:
        return self.directory / f"{port}.sock"

    def settings(self, name: str) -> GuestSettings:
        """How a guest is when nothing special is asked for. Two kinds of memory are among them."""
        number = NAMES.index(name) + 1
        return GuestSettings(
            name=name,
            socket=self.socket(name),
            mac=f"52:54:00:77:00:{number:02x}",
            ip=f"{NETWORK}.{number}/24",
            memory_mib=160,
            memory_backend="shm" if name == "vm2" else "memfd",
        )

    def _guest(self, settings: GuestSettings) -> Guest:
        return Guest(settings, self.image, self.directory)

    def require(self, *names: str) -> list[Guest]:
        """The named guests, running, booted, and with a port that forwards."""
        if not self.switch.running:
            self.switch.start()
        ports = {port["name"] for port in self.ctl("list-ports")}
        started = []
        for name in names:
            if name not in ports:
                self.ctl("add-port", name, self.socket(name))
            if not self.guests[name].running:
                started.append(self.guests[name].start())
        for guest in started:
            guest.wait_up()
        for name in names:
            self.wait_state(name, "ready")
        return [self.guests[name] for name in names]

    @contextmanager
    def in_place_of(self, name: str, **changes: Any) -> Iterator[Guest]:
        """A guest that differs from the usual one called `name`, which is stopped for it.

        It is not started, and the port is gone: the test does both. Afterwards all is as before.
        """
        usual = self.guests[name]
        usual.stop()
        self._remove_port(name)
        guest = self._guest(replace(self.settings(name), **changes))
        self.guests[name] = guest
        try:
            yield guest
        finally:
            guest.stop()
            self._remove_port(name)
            self.socket(name).unlink(missing_ok=True)
            self.guests[name] = usual

    @contextmanager
    def kinds(self, **kinds: Kind) -> Iterator[list[Guest]]:
        """Guests of other kinds in the places of the named ones, all of them up and on the wire."""
        if not self.switch.running:
            self.switch.start()
        with ExitStack() as stack:
            guests = [
                stack.enter_context(self.in_place_of(name, **kind.settings))
                for name, kind in kinds.items()
            ]
            for guest, kind in zip(guests, kinds.values(), strict=True):
                self.ctl("add-port", *kind.port_options, guest.name, guest.settings.socket)
                guest.start()
            for guest in guests:
                guest.wait_up()
                self.wait_state(guest.name, "ready")
            yield guests

    def _remove_port(self, name: str) -> None:
        if self.switch.running and name in {port["name"] for port in self.ctl("list-ports")}:
            self.ctl("del-port", name)

    # The switch.

    def ctl(self, *words: object) -> Any:
        """What `vswitchctl --json WORDS` prints; it must succeed."""
        done = self._ctl(words)
        assert done.returncode == 0, f"vswitchctl {words}: {done.stderr}"
        return json.loads(done.stdout)

    def ctl_refused(self, *words: object) -> Refusal:
        """How `vswitchctl --json WORDS` fails; it must."""
        done = self._ctl(words)
        assert done.returncode != 0, f"vswitchctl {words} succeeded: {done.stdout}"
        error = json.loads(done.stderr)["error"]
        return Refusal(done.returncode, error["code"], error["message"], error["hint"])

    def _ctl(self, words: tuple[object, ...]) -> subprocess.CompletedProcess[str]:
        argv = [str(VSWITCHCTL), "--socket", str(self.control), "--json", *map(str, words)]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=PATIENCE_S)

    def client(self) -> Client:
        return Client(self.control)

    def show(self, port: str) -> Any:
        """What `vswitchctl --json show PORT` says about it."""
        shown = self.ctl("show", port)
        return shown[0] if isinstance(shown, list) else shown

    def wait_state(self, port: str, state: str) -> None:
        with self.client() as client:
            wait_until(f"port {port} is {state}", lambda: client.port(port)["state"] == state)

    def fdb(self) -> dict[str, str]:
        """MAC address -> port."""
        return {entry["mac"]: entry["port"] for entry in self.ctl("fdb", "show")}

    def logged_after(self, offset: int) -> str:
        """What the switch logged since its log was `offset` bytes long."""
        return self.log.read_bytes()[offset:].decode()

    def log_len(self) -> int:
        return self.log.stat().st_size


def protocol_counters(guest: Guest) -> dict[str, dict[str, int]]:
    """What the guest's kernel has counted: protocol (Ip, Icmp, Tcp, ...) -> name -> value."""
    lines = [line.split() for line in guest.check("cat /proc/net/snmp").splitlines()]
    return {
        names[0].rstrip(":"): dict(zip(names[1:], map(int, values[1:]), strict=True))
        for names, values in zip(lines[::2], lines[1::2], strict=True)
    }


class SteadyPing:
    """A ping that runs in a guest meanwhile, twenty a second; see `pinging`."""

    def __init__(self, source: Guest, address: str) -> None:
        self._source = source
        source.check(f"ping -i 0.05 {address} >/tmp/ping.log 2>&1 & echo $! >/tmp/ping.pid")

    def wait_answered(self, more: int) -> None:
        """Wait until so many more answers have come than there are now."""
        self._source.check(
            "answered() { grep -c ' seq=' /tmp/ping.log; }\n"
            f"until=$(($(answered) + {more}))\n"
            "while [ $(answered) -lt $until ]; do usleep 50000; done",
            PATIENCE_S,
        )

    def stop(self) -> list[int]:
        """End it; the numbers of the requests, from 0 on, that were answered, in order."""
        said = self._source.check(
            "pid=$(cat /tmp/ping.pid); kill -INT $pid; "
            "while kill -0 $pid 2>/dev/null; do usleep 10000; done; cat /tmp/ping.log"
        )
        return [int(number) for number in re.findall(r" seq=(\d+) ", said)]


@contextmanager
def pinging(source: Guest, target: Guest) -> Iterator[None]:
    """Pings go from guest to guest before, during and after the block, and none may get lost.

    The last ones may be on their way when the ping is stopped, however long that is. Those of the
    block are not among them: an answer has come to a request that was sent after it, and five to
    those that the ping itself sent then.
    """
    assert source.ping(target.ip), f"{source.name} does not reach {target.name} to begin with"
    steady = SteadyPing(source, target.ip)
    try:
        steady.wait_answered(1)
        yield
        assert source.ping(target.ip, timeout_s=PATIENCE_S), f"{target.name} does not answer now"
        steady.wait_answered(5)
    finally:
        answered = steady.stop()
    lost = set(range(answered[-1])) - set(answered)
    assert not lost, f"{source.name} -> {target.name}: {len(lost)} of {answered[-1]} lost"


def pings_until_answered(source: Guest, address: str) -> None:
    """Wait until an address answers, as someone would with `ping` in a terminal."""
    wait_until(f"{address} answers {source.name}", lambda: source.ping(address, timeout_s=1))
