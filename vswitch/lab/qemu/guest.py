"""A QEMU guest with one virtio network card behind a vhost-user socket."""

from __future__ import annotations

import contextlib
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from vswitch.lab.errors import MachineError
from vswitch.lab.qemu import process
from vswitch.lab.qemu.accel import Accelerator, accelerator, qemu_version
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

MemoryBackend = Literal["memfd", "shm", "posix-shm", "hugetlb", "hugetlbfs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSettings:
    """What to boot. Sizes of rings are entries, `memory_mib` is MiB."""

    name: str
    socket: Path
    mac: str
    ip: str | None = None
    """Address and prefix length of eth0, such as 10.77.0.1/24; None leaves it without one."""
    listen: bool = False
    """QEMU creates the vhost-user socket and the switch connects to it, not the other way round."""
    tap: str | None = None
    """A TAP interface of QEMU's own that the card is behind, and not behind the socket."""
    memory_mib: int = 192
    memory_backend: MemoryBackend = "memfd"
    """A memfd, with huge pages (of 2 MiB) for hugetlb, or a file in a file system; posix-shm is
    memory-backend-shm, which QEMU has from 9.1 on."""
    hugetlbfs: Path = Path("/dev/hugepages")
    """Where the file system for `hugetlbfs` is mounted."""
    share: bool = True
    """False maps guest memory privately: what a careless command line does."""
    cpus: int = 1
    queues: int = 1
    queue_size: int = 256
    """Of the receiveqs; QEMU's transmitqs have 256 entries."""
    tx_queue_size: int | None = None
    mtu: int | None = None
    """What QEMU tells guest and switch (`host_mtu`)."""
    mrg_rxbuf: bool = True
    packed: bool = False
    event_idx: bool = True
    modern: bool = True
    """False leaves the legacy (virtio 0.9) interface only."""
    incoming: bool = False
    """Do not boot: wait for a guest that moves here, see `Guest.migrate_to`."""
    max_memory_mib: int | None = None
    """With this, `Guest.plug_memory` can add memory up to it."""
    iommu: bool = False
    """Put the network card behind a virtual IOMMU (Intel's), which the guest's kernel then uses."""
    device_options: str = ""
    """More properties of virtio-net-pci, as on QEMU's command line: `csum=off,guest_tso4=off`."""


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
                self._command(accel, *fds),
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

    def _command(self, accel: Accelerator, shell_fd: int, qmp_fd: int) -> list[str]:
        one = self.settings
        words = [f"lab.name={one.name}"]
        # An emulated timer is late on a busy host. The kernel counts its ticks while it boots, and
        # takes too few for broken wiring: "IO-APIC + timer doesn't work!", a panic.
        words += ["no_timer_check"] if accel == "tcg" else []
        words += [f"lab.ip={one.ip}"] if one.ip else []
        # Strict: a mapping is taken back with its buffer, not with many others some time later.
        words += ["intel_iommu=on", "iommu.strict=1"] if one.iommu else []
        iommu = ["-device", "intel-iommu,intremap=off,device-iotlb=on"] if one.iommu else []
        # A guest tells the card of what it unmapped by ATS, which is PCI Express's; QEMU's cards on
        # the root bus are conventional ones.
        iommu += ["-device", "pcie-root-port,id=root1,chassis=1"] if one.iommu else []
        return [
            self._image.qemu, "-name", one.name, "-accel", accel,
            "-cpu", "host" if accel == "kvm" else "max",
            "-smp", str(one.cpus), "-m", _memory_size(one),
            "-nodefaults", "-no-user-config", "-display", "none",
            "-object", _memory_object(one),
            "-machine", f"{'q35' if one.iommu else 'pc'},memory-backend=mem", *iommu,
            "-chardev", f"file,id=console,path={self.console_log}", "-serial", "chardev:console",
            "-chardev", f"socket,id=shell,fd={shell_fd}", "-serial", "chardev:shell",
            "-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control",
            *_netdev(one, self.qemu_version),
            "-device", _network_card(one, accel, self.qemu_version),
            "-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd),
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off " + " ".join(words),
            *(["-incoming", "defer"] if one.incoming else []),
        ]  # fmt: skip


def _memory_size(one: GuestSettings) -> str:
    if one.max_memory_mib is None:
        return str(one.memory_mib)
    return f"size={one.memory_mib}M,slots=4,maxmem={one.max_memory_mib}M"


def _memory_object(one: GuestSettings) -> str:
    common = f"id=mem,size={one.memory_mib}M,share={_on_off(one.share)}"
    match one.memory_backend:
        case "memfd":
            return f"memory-backend-memfd,{common}"
        case "shm":
            return f"memory-backend-file,{common},mem-path=/dev/shm"
        case "posix-shm":
            return f"memory-backend-shm,{common}"
        case "hugetlb":
            return f"memory-backend-memfd,{common},hugetlb=on,hugetlbsize=2M"
        case "hugetlbfs":
            return f"memory-backend-file,{common},mem-path={one.hugetlbfs}"


def _netdev(one: GuestSettings, version: tuple[int, int]) -> list[str]:
    if one.tap is not None:
        return ["-netdev", f"tap,id=net,ifname={one.tap},script=no,downscript=no,vhost=off"]
    netdev = f"vhost-user,id=net,chardev=vhost,queues={one.queues}"
    return ["-chardev", _socket_chardev(one, version), "-netdev", netdev]


def _socket_chardev(one: GuestSettings, version: tuple[int, int]) -> str:
    common = f"socket,id=vhost,path={one.socket}"
    if one.listen:
        return f"{common},server=on,wait=off"
    # QEMU 9.2 renamed the option.
    return f"{common},reconnect-ms=1000" if version >= (9, 2) else f"{common},reconnect=1"


def _network_card(one: GuestSettings, accel: Accelerator, version: tuple[int, int]) -> str:
    card = (
        f"virtio-net-pci,netdev=net,mac={one.mac},romfile=,"
        f"rx_queue_size={one.queue_size},mrg_rxbuf={_on_off(one.mrg_rxbuf)},"
        f"packed={_on_off(one.packed)},event_idx={_on_off(one.event_idx)},"
        f"disable-modern={_on_off(not one.modern)},disable-legacy={_on_off(one.iommu)}"
    )
    if one.iommu:
        card += ",bus=root1,iommu_platform=on,ats=on"
    if one.tx_queue_size is not None:
        card += f",tx_queue_size={one.tx_queue_size}"
    if one.queues > 1:
        card += ",mq=on"
    if one.mtu:
        card += f",host_mtu={one.mtu}"
    if accel == "tcg" and version < (8, 0):
        # Debian 12's QEMU 7.2 crashes with vhost-user and MSI-X under TCG.
        card += ",vectors=0"
    elif one.queues > 1:
        card += f",vectors={2 * one.queues + 2}"
    return f"{card},{one.device_options}" if one.device_options else card


def _on_off(value: bool) -> str:
    return "on" if value else "off"
