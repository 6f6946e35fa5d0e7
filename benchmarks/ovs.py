"""Open vSwitch with DPDK: the userspace datapath, MAC learning, two vhost-user ports."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.interfaces import remove_interface
from benchmarks.machine import program, running_on, version_of
from benchmarks.samples import Setup
from benchmarks.switches import Switch
from vswitch.lab.guest import SoftwareGuest
from vswitch.lab.qemu import process

# Debian keeps the build with DPDK where only its alternatives system points to it.
_PLACES = ("/usr/sbin", "/usr/lib/openvswitch-switch-dpdk")
_STANDARD_LEN = 1514
_SOCKET_MEM_MIB = 512
_RECONNECT_TIMEOUT_S = 10.0


class OvsDpdk(Switch):
    """A database and a daemon of our own in `folder`; nothing of the system's is touched."""

    name = "ovs"
    title = "OVS-DPDK"
    # It allocates more than it is told to begin with.
    hugepages_mib = 768
    bridge = "vsb-br0"

    def __init__(self, folder: Path, cpu: int, setup: Setup) -> None:
        super().__init__(folder, cpu, setup)
        # OVS puts the sockets of dpdkvhostuser ports into its run directory, named as the ports.
        self.sockets = tuple(folder / f"p{i}" for i in range(setup.ports))
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        daemon = program("ovs-vswitchd-dpdk", *_PLACES)
        server = program("ovsdb-server", *_PLACES)
        database = self.folder / "conf.db"
        schema = "/usr/share/openvswitch/vswitch.ovsschema"
        self._run(program("ovsdb-tool", *_PLACES), "create", str(database), schema)
        with running_on({self.cpu}):
            self._spawn(
                server, str(database), f"--remote=punix:{self._remote}", "--no-chdir",
                f"--unixctl={self.folder / 'ovsdb.ctl'}",
            )  # fmt: skip
            self._wait_for(self._remote)
            self._vsctl("--no-wait", "init")
            settings = {
                "dpdk-init": "true",
                "dpdk-socket-mem": str(_SOCKET_MEM_MIB),
                "dpdk-extra": f"--no-pci --file-prefix=vswitch-bench-{self.name}-{os.getpid()}",
                "pmd-cpu-mask": hex(1 << self.cpu),
                "userspace-tso-enable": str(self.setup.tso).lower(),
            }
            pairs = [f'other_config:{key}="{value}"' for key, value in settings.items()]
            self._vsctl("--no-wait", "set", "Open_vSwitch", ".", *pairs)
            self._daemon = self._spawn(
                daemon, f"unix:{self._remote}", "--no-chdir",
                f"--unixctl={self.folder / 'vswitchd.ctl'}",
            )  # fmt: skip
            add = [
                "add-br",
                self.bridge,
                "--",
                "set",
                "bridge",
                self.bridge,
                "datapath_type=netdev",
            ]
            for socket in self.sockets:
                port = socket.name
                add += ["--", "add-port", self.bridge, port, "--", "set", "Interface", port]
                if self._client:
                    add += ["type=dpdkvhostuserclient", f"options:vhost-server-path={socket}"]
                else:
                    add.append("type=dpdkvhostuser")
                # No larger than needed, for OVS sizes its buffers by it. It is not changed later:
                # memory for old and new buffers at once is more than there is.
                if self.setup.longest > _STANDARD_LEN:
                    add.append(f"mtu_request={self.setup.longest}")
            self._vsctl(*add, *self.more_ports())
        for port in (socket.name for socket in self.sockets):
            if error := self._interface(port, "error"):
                raise BenchmarkError(f"OVS refuses port {port}: {error}")

    def more_ports(self) -> list[str]:
        """Arguments of ovs-vsctl for ports besides those of guests."""
        return []

    @property
    def _client(self) -> bool:
        """Whether OVS is to connect to the guests' sockets: only then it offers segmentation."""
        return self.setup.tso

    def connect(self, guests: Sequence[SoftwareGuest]) -> None:
        if not self._client:
            super().connect(guests)
            return
        for guest, socket in zip(guests, self.sockets, strict=True):
            socket.unlink(missing_ok=True)
            guest.listen(socket)
        # It looks for a listener once a second.
        for guest in guests:
            guest.accept(_RECONNECT_TIMEOUT_S)

    @property
    def _remote(self) -> Path:
        return self.folder / "db.sock"

    @property
    def pid(self) -> int:
        return self._daemon.pid

    def version(self) -> str:
        return "Open vSwitch " + version_of(program("ovs-vsctl", *_PLACES), "--version")

    def close(self) -> None:
        for child in reversed(self._children):
            # It may be paused, and has nothing to tidy up that is not in our folder.
            process.kill(child)
        if self._children:
            remove_interface(self.bridge)
        self._children.clear()

    def _environment(self) -> dict[str, str]:
        folder = str(self.folder)
        names = ("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR")
        return {**os.environ, **dict.fromkeys(names, folder)}

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        child = process.start(command, log=self.folder / "log", env=self._environment())
        self._children.append(child)
        return child

    def _wait_for(self, path: Path) -> None:
        deadline = process.Deadline(10.0)
        while not path.exists():
            if deadline.passed() or self._children[-1].poll() is not None:
                raise BenchmarkError(
                    f"ovsdb-server did not start: {process.tail(self.folder / 'log')}"
                )
            time.sleep(0.01)

    def _vsctl(self, *arguments: str) -> str:
        tool = program("ovs-vsctl", *_PLACES)
        return self._run(tool, f"--db=unix:{self._remote}", "--timeout=30", *arguments)

    def _interface(self, port: str, column: str) -> str:
        """A column of an interface's record, empty if it is not set."""
        text = self._vsctl("--format=json", "--columns", column, "list", "Interface", port)
        value = json.loads(text)["data"][0][0]
        return value if isinstance(value, str) else ""

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self._environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BenchmarkError(
                f"{Path(command[0]).name} failed: {done.stderr.strip()}; "
                f"the log: {process.tail(self.folder / 'log')}"
            )
        return done.stdout
