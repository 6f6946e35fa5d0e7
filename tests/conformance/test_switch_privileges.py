"""Who a switch runs as, and what it may do once it is ready: as the kernel has it in /proc."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.frames import mac
from tests.support.running import DEADLINE_S, RunningSwitch, Wire, teach
from vswitch.errors import SocketError, UplinkError
from vswitch.relay import process

pytestmark = pytest.mark.root("becomes another user")

NOBODY = 65534
NET_ADMIN = 1 << 12
TAP = f"vsp{os.getpid()}"[:15]

# Becomes another user as a login would, after everything is imported that this user may not read.
AS_NOBODY = (
    "import os, sys, uvloop, vswitch.config.read, vswitch.daemon.process, vswitch.switch\n"
    "from vswitch.relay.process import hold_program; hold_program()\n"
    "from vswitch.cli.main import main\n"
    f"os.setgroups([]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY})\n"
    f"os.setresuid({NOBODY}, {NOBODY}, {NOBODY})\n"
    "main()\n"
)

Start = Callable[..., RunningSwitch]


@pytest.fixture
def directory(tmp_path: Path, run_dir: Path) -> Path:
    """Of user nobody, where everybody can look."""
    run_dir.chmod(0o755)
    mine = run_dir / tmp_path.name[-8:]
    mine.mkdir()
    os.chown(mine, NOBODY, NOBODY)
    return mine


@pytest.fixture
def start_switch(directory: Path) -> Iterator[Start]:
    running: list[RunningSwitch] = []

    def function(**options: object) -> RunningSwitch:
        running.append(RunningSwitch(directory, **options))  # type: ignore[arg-type]
        return running[-1]

    yield function
    for switch in running:
        switch.stop()


def threads(switch: RunningSwitch) -> list[dict[str, str]]:
    """/proc/PID/task/TID/status of the main thread, then of the others."""
    found = []
    directory = Path(f"/proc/{switch.process.pid}/task")
    for task in sorted(directory.iterdir(), key=lambda path: int(path.name)):
        lines = (task / "status").read_text().splitlines()
        found.append({key: value.strip() for key, value in (line.split(":", 1) for line in lines)})
    assert found[0]["Pid"] == found[0]["Tgid"]
    return found


def capabilities(thread: dict[str, str]) -> set[int]:
    """What it has, or could take, as numbers; one if all of these agree."""
    held = {int(thread[f"Cap{kind}"], 16) for kind in ("Prm", "Eff")}
    assert int(thread["CapInh"], 16) == int(thread["CapAmb"], 16) == 0
    return held


def check(switch: RunningSwitch, uid: int, gid: int, main: int) -> None:
    every = threads(switch)
    assert len(every) > 1
    for thread in every:
        assert thread["Uid"].split() == [str(uid)] * 4
        assert thread["Gid"].split() == [str(gid)] * 4
        assert thread["NoNewPrivs"] == "1"
    assert capabilities(every[0]) == {main}
    for thread in every[1:]:
        assert capabilities(thread) == {0}, thread["Name"]


def owner_and_mode(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def test_without_root_and_without_a_tap(start_switch: Start, directory: Path) -> None:
    switch = start_switch(command=(sys.executable, "-c", AS_NOBODY))
    check(switch, NOBODY, NOBODY, 0)
    wire = Wire(switch)
    try:
        teach(wire.guest("a", 1), wire.guest("b", 2))
        with pytest.raises(UplinkError, match="CAP_NET_ADMIN is missing"):
            switch.client.add_uplink(TAP)
    finally:
        wire.close()


def test_root_stays_root_and_its_workers_have_no_capabilities(start_switch: Start) -> None:
    switch = start_switch()
    every = threads(switch)
    assert every[0]["Uid"].split() == ["0"] * 4
    assert capabilities(every[0]) != {0}
    assert {thread["NoNewPrivs"] for thread in every} == {"1"}
    workers = [thread for thread in every if thread["Name"].startswith("vs-worker")]
    assert [capabilities(thread) for thread in workers] == [{0}]


# As on a machine that has other things to do when the workers start.
LATE = """
import time
from vswitch.dataplane import threads as workers
from vswitch.cli.main import main
real = workers.limit_capabilities
def limit_capabilities(kept):
    time.sleep(0.3)  # this late; a switch that waits for it is right however long it takes
    {ending}
    return real(kept)
workers.limit_capabilities = limit_capabilities
main()
"""


def test_it_is_ready_when_its_workers_are(start_switch: Start) -> None:
    switch = start_switch(command=(sys.executable, "-c", LATE.format(ending="")), workers=2)
    assert [
        (thread["Name"], capabilities(thread))
        for thread in threads(switch)
        if thread["Name"].startswith("vs-worker")
    ] == [("vs-worker-0", {0}), ("vs-worker-1", {0})]


def test_it_does_not_start_with_a_worker_that_has_capabilities(directory: Path) -> None:
    config = directory / "ports.toml"
    config.write_text(f'[switch]\ncontrol = "{directory}/c"\n')
    ending = "raise OSError(1, 'Operation not permitted')"
    done = subprocess.run(
        [sys.executable, "-c", LATE.format(ending=ending), "start", "--config", str(config)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "worker 0 cannot be started: Operation not permitted" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in directory.iterdir()] == ["ports.toml"]


def test_as_many_descriptors_as_it_may_have(start_switch: Start) -> None:
    """One frontend takes 768 of them for 128 queue pairs, and the usual limit is 1024."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 2048))\n"
    main = "from vswitch.cli.main import main; main()"
    switch = start_switch(command=(sys.executable, "-c", limit + main))
    text = Path(f"/proc/{switch.process.pid}/limits").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("Max open files")]
    assert line.split()[3:5] == ["2048", "2048"]


def test_root_becomes_the_user_and_keeps_nothing(start_switch: Start, directory: Path) -> None:
    switch = start_switch(
        user="nobody",
        workers=2,
        control_group="1",
        control_permissions="0660",
        tables=f'[[port]]\nname = "mine"\nsocket = "{directory}/mine"\npermissions = "0600"\n'
        f'[[port]]\nname = "theirs"\nsocket = "{directory}/theirs"\n'
        'owner = "1"\ngroup = "2"\npermissions = "0640"\n',
    )
    gid = NOBODY
    check(switch, NOBODY, gid, 0)
    assert threads(switch)[0]["Groups"].split() == [str(gid)]
    assert "running as uid 65534, gid 65534, with no capabilities" in switch.log
    assert owner_and_mode(directory / "control.sock") == (NOBODY, 1, 0o660)
    assert owner_and_mode(directory / "mine") == (NOBODY, gid, 0o600)
    assert owner_and_mode(directory / "theirs") == (1, 2, 0o640)
    journals = directory / "control.sock.rings"
    assert owner_and_mode(journals) == (NOBODY, gid, 0o700)
    assert owner_and_mode(journals / "mine.rings")[0] == NOBODY

    # Ports come and go as before, for the user.
    wire = Wire(switch)
    try:
        teach(wire.guest("a", 1), wire.guest("b", 2))
        assert mac(1) in wire.learned()
        with pytest.raises(SocketError, match=r'to user "root": uid 65534 may not'):
            switch.client.add_port("late", directory / "late", owner="root")
        assert not (directory / "late").exists()
        with pytest.raises(UplinkError, match="CAP_NET_ADMIN is missing"):
            switch.client.add_uplink(TAP)
    finally:
        wire.close()
    # Also what is imported only now, from a place where this user may read nothing.
    assert switch.client.save(directory / "saved.toml").read_text().count("[[port]]") == 2
    (directory / "saved.toml").unlink()
    switch.client.stop()
    switch.process.wait(DEADLINE_S)
    assert sorted(path.name for path in directory.iterdir()) == ["control.sock.rings", "ports.toml"]


def test_the_relay_lies_where_its_user_cannot_look(start_switch: Start, tmp_path: Path) -> None:
    """As all of the package does in a clone in root's home."""
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    program = shutil.copy(process.PROGRAM, hidden)
    switch = start_switch(
        user="nobody",
        command=(
            sys.executable,
            "-c",
            "from pathlib import Path\n"
            "from vswitch.relay import process\n"
            f"process.PROGRAM = Path({str(program)!r})\n"
            "from vswitch.cli.main import main; main()",
        ),
    )
    [relay] = (
        Path(f"/proc/{switch.process.pid}/task/{switch.process.pid}/children").read_text().split()
    )
    assert Path(f"/proc/{relay}/exe").readlink() == Path(program)
    assert Path(f"/proc/{relay}/comm").read_text() == "vswitch-relay\n"
    assert str(program) not in {os.readlink(fd) for fd in Path(f"/proc/{relay}/fd").iterdir()}
    wire = Wire(switch)
    try:
        teach(wire.guest("a", 1), wire.guest("b", 2))
    finally:
        wire.close()


def test_a_tap_keeps_one_capability_and_the_workers_none(start_switch: Start) -> None:
    cpu = min(os.sched_getaffinity(0))
    switch = start_switch(
        user="nobody",
        group="1",
        cpus=[cpu],
        tables=f'[uplink]\ntype = "tap"\nname = "{TAP}"\nmtu = 1400\n',
    )
    check(switch, NOBODY, 1, NET_ADMIN)
    assert "running as uid 65534, gid 1, with CAP_NET_ADMIN" in switch.log
    worker = next(each for each in threads(switch) if each["Name"].startswith("vs-worker"))
    assert worker["Cpus_allowed_list"] == str(cpu), "pinning takes no rights"
    # It manages it, and those that are added later.
    assert switch.client.port(TAP)["state"] == "up"
    second = TAP[:14] + "b"
    switch.client.add_uplink(second, mtu=1300)
    assert switch.client.port(second)["mtu"] == 1300
    switch.client.del_uplink(second)
    switch.client.del_uplink(TAP)
    switch.client.add_uplink(TAP)


@pytest.mark.parametrize(("uplink", "kept"), [(False, 0), (True, NET_ADMIN)])
def test_capabilities_from_a_service_manager(start_switch: Start, uplink: bool, kept: int) -> None:
    """Without root: what it was given it keeps only for uplinks."""
    main = AS_NOBODY[: AS_NOBODY.index("os.setgroups")] + (
        "from vswitch.host import privileges as p\n"
        f"p.become(p.Identity({NOBODY}, {NOBODY}, ()))\n"
        "main()\n"
    )
    switch = start_switch(
        command=(sys.executable, "-c", main),
        tables=f'[uplink]\ntype = "tap"\nname = "{TAP}"\n' if uplink else "",
    )
    check(switch, NOBODY, NOBODY, kept)


def test_it_makes_the_directory_of_its_control_socket(directory: Path) -> None:
    os.chown(directory, 0, 0)
    config = directory / "ports.toml"
    config.write_text(
        f'[switch]\nuser = "nobody"\ncontrol = "{directory}/run/c"\n'
        f'[[port]]\nname = "a"\nsocket = "{directory}/run/a"\n'
    )
    switch = subprocess.Popen(
        [sys.executable, "-m", "vswitch", "start", "--config", str(config)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert switch.stderr is not None
    assert any(line.startswith("vswitch: ready") for line in switch.stderr)
    assert owner_and_mode(directory / "run") == (NOBODY, NOBODY, 0o755)
    switch.terminate()
    switch.communicate(timeout=DEADLINE_S)
    assert switch.returncode == 0
    assert [path.name for path in (directory / "run").iterdir()] == ["c.rings"]


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ('user = "nobody"', (), "permission denied to uid 65534 in"),
        ('user = "no.such.user"', (), "switch.user: no such user on this machine"),
        ('group = "daemon"', (), "switch.group: goes with `user`, which is missing"),
        ('user = "4242"', (), "switch.user: uid 4242 is in no password file"),
        ('user = "root"', ("-c", AS_NOBODY), "only root can run the switch as another user"),
    ],
)
def test_what_cannot_be(
    directory: Path, settings: str, code: tuple[str, ...], message: str
) -> None:
    os.chown(directory, 0, 0)
    config = directory / "ports.toml"
    config.write_text(f'[switch]\n{settings}\ncontrol = "{directory}/c"\n')
    done = subprocess.run(
        [sys.executable, *(code or ("-m", "vswitch")), "start", "--config", str(config)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in directory.iterdir()] == ["ports.toml"]
