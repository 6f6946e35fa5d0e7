"""What is done to the service inside, step by step; what came of it goes to /out/result.json."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import traceback
from pathlib import Path

from vswitch.control.client import Client
from vswitch.lab.guest import SoftwareGuest

RUN = Path("/run/vswitch")
DROP_IN = Path("/etc/systemd/system/vswitch.service.d/test.conf")
ENDS = Path("/out/ends")
"""What came of each main process, a word each."""
DEADLINE_S = 60.0
FRAMES = 100
WATCHDOG_S = 2

result: dict[str, object] = {}


def systemctl(*arguments: str) -> str:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True)
    if arguments[0] != "show":
        print(*arguments, done.returncode, done.stdout, done.stderr, flush=True)
    return done.stdout.strip()


def show(what: str) -> str:
    return systemctl("show", "--value", "-p", what, "vswitch")


def restart_after(number: signal.Signals) -> str:
    """What systemd says became of a main process that got a signal, when there is another one."""
    pid = show("MainPID")
    ends = len(ENDS.read_text().split()) if ENDS.exists() else 0
    os.kill(int(pid), number)
    deadline = time.monotonic() + DEADLINE_S
    while show("MainPID") in (pid, "0") or show("SubState") != "running":
        if time.monotonic() > deadline:
            return "not restarted"
        time.sleep(0.05)  # between two looks
    return " ".join(ENDS.read_text().split()[ends:])


def alive_for(seconds: float) -> float:
    """Wait until the watchdog has heard from the service for so long; how long that was."""

    def heard_us() -> int:
        return int(show("WatchdogTimestampMonotonic"))

    pid = show("MainPID")
    first = heard_us()
    deadline = time.monotonic() + DEADLINE_S
    while (heard_for := (heard_us() - first) / 1e6) < seconds:
        if show("MainPID") != pid or time.monotonic() > deadline:
            break
        time.sleep(0.05)  # between two looks
    return heard_for


def exchange() -> int:
    """How many of FRAMES frames get from one guest to another, the second behind an IOMMU.

    As such a receiver loses those for which the switch does not know its buffers yet, what did not
    come is sent again.
    """
    one, two = bytes.fromhex("525400000001"), bytes.fromhex("525400000002")
    with SoftwareGuest(one.hex(":")) as a, SoftwareGuest(two.hex(":"), iommu=True) as b:
        a.connect(RUN / "vm1.sock")
        b.connect(RUN / "vm2.sock")
        b.send([b"\xff" * 6 + two + b"\x88\xb5" + bytes(46)])
        a.recv(1)
        missing = set(range(FRAMES))
        deadline = time.monotonic() + DEADLINE_S
        while missing and time.monotonic() < deadline:
            a.send([two + one + b"\x88\xb5" + i.to_bytes(46, "big") for i in sorted(missing)])
            got = b.recv(len(missing), timeout=0.2)
            missing -= {int.from_bytes(each[14:60], "big") for each in got}
        return FRAMES - len(missing)


def run() -> None:
    DROP_IN.parent.mkdir()
    # A system call that the filter refuses shall be seen, and the watchdog not take its time.
    DROP_IN.write_text(
        f"[Service]\nSystemCallErrorNumber=kill\nWatchdogSec={WATCHDOG_S}\n"
        f"ExecStopPost=+/bin/sh -c 'echo $$SERVICE_RESULT >>{ENDS}'\n"
    )
    systemctl("daemon-reload")
    systemctl("start", "vswitch")
    result["started"] = show("ActiveState"), show("SubState"), show("StatusText")
    status = Path(f"/proc/{show('MainPID')}/status").read_text().splitlines()
    result["process"] = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    result["arrived"] = exchange()
    with Client(RUN / "control.sock") as client:
        client.add_port("vm3", RUN / "vm3.sock")
        client.del_port("vm3")
        result["uplink"] = client.port("vswitch0")["state"]
    result["alive for"] = alive_for(3 * WATCHDOG_S)
    result["restarts while well"] = show("NRestarts")
    result["hung"] = restart_after(signal.SIGSTOP)
    result["killed"] = restart_after(signal.SIGKILL)
    result["arrived after that"] = exchange()
    systemctl("stop", "vswitch")
    result["stopped"] = show("ActiveState"), show("Result"), show("ExecMainStatus")
    result["left behind"] = sorted(path.name for path in RUN.iterdir())


try:
    run()
except BaseException:
    result["error"] = traceback.format_exc()
Path("/out/result.json").write_text(json.dumps(result))
systemctl("--force", "--force", "poweroff")
