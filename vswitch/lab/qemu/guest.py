"""A QEMU guest with one virtio network card behind a vhost-user socket."""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from vswitch.lab.errors import MachineError
from vswitch.lab.qemu import process
from vswitch.lab.qemu.accel import Accelerator, accelerator, qemu_version
from vswitch.lab.qemu.command_line import GuestSettings, command_line
from vswitch.lab.qemu.image import GuestImage
from vswitch.lab.qemu.process import Deadline
from vswitch.lab.qemu.qmp import Qmp
from vswitch.lab.qemu.shell import CommandResult, GuestShell

BOOT_TIMEOUT_S = 90.0
"""Three seconds on an idle core under TCG; several guests share two cores with other work."""

PATIENCE_S = 60.0
"""What a guest does in milliseconds may take seconds on a loaded machine; after that it hangs."""

_MIGRATION_LOOK_S = 0.05
_TRICKLE = 1 << 20
"""Bytes a second of postcopy that nobody has asked for: minutes for the smallest guest."""
_AT_ONCE_MS = 10_000
"""A downtime limit with which a guest of the lab is stopped for the rest after the first round."""


class MigrationResult(NamedTuple):
    """How a guest moved: the states that QEMU was in, and pages that were asked for in postcopy."""

    seen: frozenset[str]
    postcopy_requests: int


class Guest:
    """A running guest. A context manager: leaving it stops QEMU, whatever happened inside.

    Start it from a thread that lives as long as the guest shall (see `process`). The console and
    what QEMU says are kept in `log_dir`, and the end of both is part of every MachineError.
    """

    def __init__(
        self,
        settings: GuestSettings,
        image: GuestImage,
        log_dir: Path,
        accel: Accelerator | None = None,
    ) -> None:
        self.settings = settings
        self.name = settings.name
        self.console_log = log_dir / f"{settings.name}.console.log"
        self.qemu_log = log_dir / f"{settings.name}.qemu.log"
        self._image = image
        self._accel = accel
        self._process: subprocess.Popen[bytes] | None = None
        self._shell: GuestShell | None = None
        self._qmp: Qmp | None = None

    @property
    def ip(self) -> str:
        """The guest's address without the prefix length; empty if it has none."""
        return (self.settings.ip or "").partition("/")[0]

    def start(self) -> Self:
        """Start QEMU and return at once; `wait_up` waits for the guest."""
        if self.running:
            raise MachineError(f"guest {self.name} is running already")
        accel = self._accel or accelerator(self._image)
        shell, shell_peer = socket.socketpair()
        qmp, qmp_peer = socket.socketpair()
        self._shell, self._qmp = GuestShell(shell), Qmp(qmp)
        with shell_peer, qmp_peer:
            # Connected sockets by descriptor: no paths that could be stale, taken or too long.
            fds = (shell_peer.fileno(), qmp_peer.fileno())
            self._process = process.start(
                command_line(self.settings, self._image, accel, self.console_log, fds),
                log=self.qemu_log,
                pass_fds=fds,
                # QEMU takes firmware from its current directory before its own.
                cwd=self.qemu_log.parent,
            )
        return self

    @property
    def qemu_version(self) -> tuple[int, int]:
        """Major and minor version of the QEMU that it runs in."""
        return qemu_version(self._image.qemu)

    @property
    def running(self) -> bool:
        """Whether the QEMU process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of QEMU."""
        if self._process is None:
            raise MachineError(f"guest {self.name} was never started")
        return self._process.pid

    @property
    def qmp(self) -> Qmp:
        """QEMU's monitor. It answers only once QEMU has met its vhost-user peer."""
        if self._qmp is None:
            raise MachineError(f"guest {self.name} is not running")
        return self._qmp

    def wait_up(self, timeout_s: float = BOOT_TIMEOUT_S) -> Self:
        """Wait until the guest's shell answers, with eth0 configured."""
        with self._with_logs("waiting for it to boot"):
            self._channel().wait_ready(None, Deadline(timeout_s))
        return self

    def run(self, script: str, timeout_s: float = PATIENCE_S) -> CommandResult:
        """Run a shell script in the guest; exit code and output (stdout and stderr mixed)."""
        with self._with_logs(f"running {script!r}"):
            return self._channel().run(script, timeout_s)

    def check(self, script: str, timeout_s: float = PATIENCE_S) -> str:
        """Like `run`, but MachineError unless the script exits with 0; returns the output."""
        result = self.run(script, timeout_s)
        if result.exit_code:
            raise MachineError(
                f"guest {self.name}: {script!r} exited with {result.exit_code}:\n{result.output}"
            )
        return result.output

    def ping(self, address: str, count: int = 1, timeout_s: float = PATIENCE_S) -> bool:
        """Whether `address` answers every one of `count` echo requests within `timeout_s`."""
        return self.ping_ms(address, count, timeout_s) is not None

    def ping_ms(self, address: str, count: int = 1, timeout_s: float = PATIENCE_S) -> float | None:
        """The shortest round trip of `count` echo requests in milliseconds; None if one got lost.

        Stops at the `count`th answer, at the latest after `timeout_s` seconds.
        """
        limit = max(1, round(timeout_s))
        result = self.run(f"ping -q -A -c {count} -w {limit} {shlex.quote(address)}", timeout_s + 2)
        counts = re.search(r"(\d+) packets transmitted, (\d+) packets received", result.output)
        trips = re.search(r"min/avg/max = ([\d.]+)/", result.output)
        if counts is None or trips is None or int(counts[2]) < count:
            return None
        return float(trips[1])

    def carrier(self) -> bool:
        """Whether the guest sees a link: QEMU takes it away while the switch is gone."""
        return self.check("cat /sys/class/net/eth0/carrier").strip() == "1"

    def reboot(self, timeout_s: float = BOOT_TIMEOUT_S) -> Self:
        """Press the reset button and wait until the guest is up again."""
        shell = self._channel()
        with self._with_logs("rebooting it"):
            deadline = Deadline(timeout_s)
            before, seen = shell.boot_id, len(self.qmp.events)
            self.qmp.command("system_reset", timeout_s=timeout_s)
            self.qmp.wait_event("RESET", after=seen, timeout_s=deadline.left())
            shell.wait_ready(before, deadline)
        return self

    def migrate_to(
        self,
        target: Guest,
        through: Path,
        timeout_s: float = 120.0,
        *,
        before_its_memory: Callable[[], None] | None = None,
    ) -> MigrationResult:
        """Move the running guest to another QEMU that waits for it (`incoming`).

        `through` is a Unix socket for the two to meet. Afterwards `target` is the guest; this QEMU
        is still there, with the guest's last state, and does nothing. With `before_its_memory` it
        is a postcopy migration: the guest runs over there at once, and until this function returns
        its memory comes so slowly that it is not all there. MachineError if it was nevertheless.
        """
        deadline = Deadline(timeout_s)
        speed: dict[str, Any] = {"max-bandwidth": 1 << 30}
        if self._loses_writes():
            speed["downtime-limit"] = _AT_ONCE_MS
        seen = set()
        with self._with_logs("migrating it"), target._with_logs("receiving it"):
            if before_its_memory is not None:
                speed = {"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": _TRICKLE}
                for qemu in (self.qmp, target.qmp):
                    qemu.command(
                        "migrate-set-capabilities",
                        deadline.left(),
                        capabilities=[{"capability": "postcopy-ram", "state": True}],
                    )
            target.qmp.command("migrate-incoming", deadline.left(), uri=f"unix:{through}")
            self.qmp.command("migrate-set-parameters", **speed)
            self.qmp.command("migrate", uri=f"unix:{through}")
            for qemu in (self.qmp, target.qmp):
                while True:
                    answer = qemu.command("query-migrate", deadline.left())
                    status = answer["status"]
                    seen.add(status)
                    if status == "completed":
                        break
                    if status in {"failed", "cancelled", "postcopy-paused"}:
                        raise MachineError(f"guest {self.name}: the migration {status}")
                    if qemu is self.qmp and before_its_memory is not None:
                        if status == "active":
                            qemu.command("migrate-start-postcopy", deadline.left())
                        elif status == "postcopy-active":
                            before_its_memory()
                            answer = qemu.command("query-migrate", deadline.left())
                            if answer["status"] != status:
                                raise MachineError(f"guest {self.name}: its memory was there first")
                            before_its_memory = None
                            rest = {"max-postcopy-bandwidth": 1 << 30}
                            qemu.command("migrate-set-parameters", deadline.left(), **rest)
                    time.sleep(_MIGRATION_LOOK_S)
                if qemu is self.qmp:
                    requests = answer["ram"]["postcopy-requests"]
            target._channel().boot_id = self._channel().boot_id
        return MigrationResult(frozenset(seen), requests)

    def _loses_writes(self) -> bool:
        """Whether QEMU itself may damage the guest while it moves it.

        Under TCG before 9.0, a page that the guest's CPU goes on writing after QEMU has read which
        ones were written may not count as written again ("physmem: Fix migration dirty bitmap
        coherency with TCG memory access"). It is that which the guest writes between two such
        looks and loses, so the fewer the better.
        """
        return self.qemu_version < (9, 0) and (self._accel or accelerator(self._image)) == "tcg"

    def plug_memory(self, size_mib: int) -> None:
        """Hot-plug a module of memory of that size; the guest has it once it is online."""
        number = len(self.qmp.command("query-memory-devices")) + 1
        memory: dict[str, Any] = {
            "qom-type": "memory-backend-memfd",
            "id": f"plugged{number}",
            "size": size_mib << 20,
            "share": True,
        }
        self.qmp.command("object-add", **memory)
        self.qmp.command(
            "device_add", driver="pc-dimm", id=f"dimm{number}", memdev=f"plugged{number}"
        )

    def stop(self) -> None:
        """Stop QEMU, politely and then not; does nothing if it is not running."""
        if self._process is not None:
            process.stop(self._process)
        self._hang_up()

    def kill(self) -> None:
        """End QEMU at once, as a crash would."""
        if self._process is not None:
            process.kill(self._process)
        self._hang_up()

    def logs(self) -> str:
        """The end of the console and of what QEMU said."""
        return (
            f"--- {self.console_log}\n{process.tail(self.console_log)}\n"
            f"--- {self.qemu_log}\n{process.tail(self.qemu_log)}"
        )

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _channel(self) -> GuestShell:
        if self._shell is None:
            raise MachineError(f"guest {self.name} is not running")
        return self._shell

    def _hang_up(self) -> None:
        for connection in (self._shell, self._qmp):
            if connection is not None:
                connection.close()
        self._shell = self._qmp = None

    @contextlib.contextmanager
    def _with_logs(self, doing: str) -> Iterator[None]:
        try:
            yield
        except MachineError as error:
            raise MachineError(
                f"guest {self.name}, {doing}: {error.message}\n{self.logs()}", hint=error.hint
            ) from None
