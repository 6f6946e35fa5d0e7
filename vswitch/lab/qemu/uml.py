"""A User Mode Linux guest: a kernel as a process, with one virtio card of its own frontend."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Self

from vswitch.lab import programs, requirements
from vswitch.lab.errors import LabError, MachineError
from vswitch.lab.qemu import initrd, process
from vswitch.lab.qemu.guest import Guest
from vswitch.lab.qemu.image import GuestImage
from vswitch.lab.qemu.shell import GuestShell

UML = "linux.uml"
MODULES = Path("/usr/lib/uml/modules")
MEMORY_DIR = Path("/dev/shm")  # noqa: S108  # a name that is taken makes no difference
"""Where its memory is a file that can be shared; its own choice may be on a disk."""


def build_image(directory: Path) -> GuestImage:
    """The package's kernel, and an initrd with its modules in `directory`."""
    kernel, busybox = programs.find(UML), programs.find("busybox")
    releases = sorted(MODULES.iterdir()) if MODULES.is_dir() else []
    if kernel is None or busybox is None or not releases:
        raise LabError(
            f"no {UML}, no busybox, or no modules in {MODULES}",
            hint=requirements.installing("user-mode-linux", "busybox-static"),
        )
    modules = initrd.load_order(releases[-1], ("virtio_net",))
    packed = directory / "uml-initrd.gz"
    packed.write_bytes(initrd.build(Path(busybox).read_bytes(), modules, {}))
    return GuestImage(Path(kernel), packed, f"uml-{releases[-1].name}")


class UmlGuest(Guest):
    """Of `settings` it heeds name, socket, mac, ip, and memory_mib. It has no monitor."""

    @property
    def umid(self) -> str:
        """What tells its processes from others."""
        return f"{self.name}-{os.getpid()}"

    def start(self) -> Self:
        if self.running:
            raise MachineError(f"guest {self.name} is running already")
        shell, peer = socket.socketpair()
        self._shell = GuestShell(shell)
        one = self.settings
        with peer, self.console_log.open("ab") as console:
            self._process = process.start(
                [
                    str(self._image.kernel), f"mem={one.memory_mib}M",
                    f"initrd={self._image.initrd}", f"virtio_uml.device={one.socket}:1",
                    f"con0=null,fd:{console.fileno()}", "con=null",
                    f"ssl1=fd:{peer.fileno()}", "ssl=null",
                    # It writes its process id below HOME, and takes no umid twice.
                    f"umid={self.umid}",
                    "quiet", "panic=-1", f"lab.name={one.name}",
                    *([f"lab.ip={one.ip}"] if one.ip else []),
                ],
                log=self.qemu_log,
                pass_fds=(peer.fileno(), console.fileno()),
                env=os.environ | {"TMPDIR": str(MEMORY_DIR), "HOME": str(self.qemu_log.parent)},
            )  # fmt: skip
        return self

    def stop(self) -> None:
        """End it at once: nothing of it is to be kept, and to SIGTERM it answers with a panic."""
        self.kill()

    def kill(self) -> None:
        traced = self._traced()
        super().kill()
        # Its users' processes, which it has only traced, do not go with it.
        for pid in traced:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _traced(self) -> list[int]:
        """The processes of its group but the kernel's."""
        if self._process is None:
            return []
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # After the name in brackets: state, parent, group.
                fields = path.read_text().rpartition(")")[2].split()
                pid, group = int(path.parent.name), int(fields[2])
                if group == self._process.pid != pid:
                    found.append(pid)
        return found

    def reload_driver(self) -> None:
        """Take the driver away from the card, use its memory for something else, and give it back.

        Bound anew, the interface has what it had.
        """
        one = self.settings
        self.check(
            "cd /sys/bus/virtio/drivers/virtio_net\n"
            "echo virtio0 >unbind\n"
            "[ ! -e /sys/class/net/eth0 ] || exit 1\n"
            # All that is free is written to: a backend that still looks into the rings finds it.
            "head -c 20000000 /dev/urandom >/tmp/filled; rm /tmp/filled\n"
            "echo virtio0 >bind\n"
            "until [ -e /sys/class/net/eth0 ]; do usleep 20000; done\n"
            f"ip link set eth0 address {one.mac} up\n"
            + (f"ip addr add {one.ip} dev eth0\n" if one.ip else "")
        )
