"""`vswitch demo`: three guests and this host on one switch, pinging each other.

Everything it makes lies in a temporary directory of its own and is gone at the end, whichever way
the end comes.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import tomlkit
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vswitch.lab import programs, requirements
from vswitch.lab.errors import LabError
from vswitch.lab.qemu import host, process
from vswitch.lab.qemu.accel import accelerator, qemu_version
from vswitch.lab.qemu.image import GuestImage, ensure_image
from vswitch.lab.qemu.stations import (
    HostStation,
    Plug,
    Station,
    qemu_stations,
    software_stations,
)
from vswitch.lab.qemu.switch_process import SwitchProcess

CONFIG = Path(__file__).parents[2] / "examples" / "demo.toml"
GuestKind = Literal["auto", "qemu", "software"]


@click.command()
@click.option(
    "--guests",
    type=click.Choice(["auto", "qemu", "software"]),
    default="auto",
    show_default=True,
    help="QEMU guests, the built-in software guests, or QEMU if it can be had.",
)
@click.option("--keep", is_flag=True, help="Keep everything running until Ctrl-C.")
def demo(guests: GuestKind, keep: bool) -> int:
    """Boot three guests on a switch and let them ping each other.

    Starts `vswitch start` with demo.toml, boots three QEMU guests, joins this host through a
    TAP interface where rights allow, pings between all of them, and shows what the switch saw. As
    root it installs through apt what is missing for that. Exit code 0: every pair answered.
    """
    programs.only_installed()
    with process.sigterm_unwinds(), tempfile.TemporaryDirectory(prefix="vswitch-demo-") as name:
        return Demo(Path(name), guests).run(keep=keep)


@dataclass(frozen=True, slots=True)
class Plan:
    """What of the configuration the demo works with; `uplink` is a TAP interface or None."""

    config: Path
    control: Path
    plugs: list[Plug]
    uplink: str | None
    host_ip: str


class Demo:
    """One run in `directory`, an empty directory of its own."""

    def __init__(self, directory: Path, guests: GuestKind) -> None:
        self._directory = directory
        self._guests = guests
        self._console = Console(highlight=False)
        self._start = time.monotonic()

    def run(self, *, keep: bool) -> int:
        """Returns the exit code: 0 if every pair answered."""
        image = self._image()
        with self._switch() as (switch, plan), ExitStack() as stack:
            stations = stack.enter_context(self._boot(plan, image))
            if plan.uplink is not None:
                host.ip("address", "add", f"{plan.host_ip}/24", "dev", plan.uplink)
                stations = [*stations, HostStation(plan.host_ip)]
                self._say(f"this host is {plan.host_ip} on {plan.uplink}")
            answers = self._ping_all(stations)
            self._show_matrix(stations, answers)
            for words in (["fdb", "show"], ["stats"]):
                self._show_command(plan, words)
            lost = [pair for pair, answer in answers.items() if answer is None]
            if lost:
                said = process.tail(switch.log)
                self._console.print(f"The switch's log:\n{said}", style="dim", markup=False)
            if keep:
                self._wait_for_interrupt(plan)
            self._say("stopping guests and switch")
        self._report(len(answers), lost)
        return 1 if lost else 0

    # What there is to run with.

    def _image(self) -> GuestImage | None:
        """Kernel and initrd for QEMU guests; None: use software guests."""
        if self._guests == "software":
            return None
        try:
            with self._working("looking for QEMU") as progress:
                requirements.ensure(requirements.DEMO, progress)
                progress("preparing the guests' kernel")
                image = ensure_image(progress)
                progress("trying whether KVM works")
                accel = accelerator(image)
        except LabError as error:
            if self._guests == "qemu":
                raise
            self._say(f"no QEMU guests: {error}")
            self._say("using the built-in software guests instead")
            return None
        version = ".".join(map(str, qemu_version()))
        self._say(f"QEMU {version} with {accel}, guests run {image.name}")
        return image

    def _plan(self, *, with_uplink: bool) -> Plan:
        """Write the demo's own copy of the configuration, with names and addresses free here."""
        document: dict[str, Any] = tomlkit.parse(CONFIG.read_text())
        uplink = None
        if with_uplink:
            uplink = document["uplink"]["name"] = host.free_interface(document["uplink"]["name"])
        else:
            del document["uplink"]
        config = self._directory / CONFIG.name
        config.write_text(tomlkit.dumps(document))
        network = host.free_network()
        plugs = [
            Plug(
                port=str(port["name"]),
                socket=self._directory / port["socket"],
                mode=port.get("mode", "server"),
                mac=f"52:54:00:77:00:{number:02x}",
                ip=str(network[number]),
            )
            for number, port in enumerate(document["port"], 1)
        ]
        control = self._directory / document["switch"]["control"]
        return Plan(config, control, plugs, uplink, str(network[254]))

    # What runs.

    @contextmanager
    def _switch(self) -> Iterator[tuple[SwitchProcess, Plan]]:
        obstacle = host.tap_obstacle()
        plan = self._plan(with_uplink=obstacle is None)
        with self._working("starting the switch"):
            try:
                switch = self._start_switch(plan)
            except LabError as error:
                if plan.uplink is None:
                    raise
                # Root in a container may still lack the right, and only trying tells.
                obstacle = error.message
                plan = self._plan(with_uplink=False)
                switch = self._start_switch(plan)
        with switch:
            self._say(f"vswitch start --config {plan.config} runs as process {switch.pid}")
            if obstacle is not None:
                self._say(f"no TAP uplink, so this host takes no part: {obstacle}")
            yield switch, plan

    def _start_switch(self, plan: Plan) -> SwitchProcess:
        return SwitchProcess(plan.config, plan.control, self._directory / "vswitch.log").start()

    @contextmanager
    def _boot(self, plan: Plan, image: GuestImage | None) -> Iterator[list[Station]]:
        with ExitStack() as stack:
            with self._working(f"starting {len(plan.plugs)} guests") as progress:
                if image is None:
                    stations = stack.enter_context(software_stations(plan.plugs))
                else:
                    booting = qemu_stations(plan.plugs, image, self._directory, progress)
                    stations = stack.enter_context(booting)
            kind = "software" if image is None else "QEMU"
            names = ", ".join(f"{one.name} {one.ip}" for one in stations)
            self._say(f"{len(stations)} {kind} guests are up: {names}")
            yield stations

    def _ping_all(self, stations: list[Station]) -> dict[tuple[str, str], float | None]:
        answers = {}
        with self._working("pinging") as progress:
            for source in stations:
                for target in stations:
                    if source is not target:
                        progress(f"{source.name} pings {target.name}")
                        answers[source.name, target.name] = source.ping_ms(target.ip)
        return answers

    def _wait_for_interrupt(self, plan: Plan) -> None:
        self._say(f"running until Ctrl-C; try: vswitchctl --socket {plan.control} show")
        try:
            signal.pause()
        except KeyboardInterrupt:
            self._console.print()

    # What is shown.

    def _show_matrix(
        self, stations: list[Station], answers: dict[tuple[str, str], float | None]
    ) -> None:
        table = Table()
        table.add_column("")
        for station in stations:
            table.add_column(station.name, justify="right")
        for source in stations:
            cells = [Text(f"{source.name}  {source.ip}")]
            for target in stations:
                if source is target:
                    cells.append(Text("-", style="dim"))
                    continue
                answer = answers[source.name, target.name]
                lost = Text("lost", style="bold red")
                cells.append(lost if answer is None else Text(f"{answer:.2f}", style="green"))
            table.add_row(*cells)
        self._console.print("\nPing round trips in ms, from row to column:")
        self._console.print(table)

    def _show_command(self, plan: Plan, words: list[str]) -> None:
        """Run a command of vswitchctl as the user would, and show what it prints."""
        shown = ["vswitchctl", "--socket", str(plan.control), *words]
        self._console.print()
        self._console.print(f"$ {shlex.join(shown)}", style="bold", markup=False, soft_wrap=True)
        sys.stdout.flush()
        command = programs.python("vswitch.cli.ctl", *shown[1:])
        done = subprocess.run(command, timeout=30, check=False)
        if done.returncode:
            raise LabError(f"`{shlex.join(shown)}` ended with {done.returncode}")

    def _report(self, count: int, lost: list[tuple[str, str]]) -> None:
        taken = time.monotonic() - self._start
        if lost:
            pairs = ", ".join(f"{source} -> {target}" for source, target in lost)
            self._say(f"{len(lost)} of {count} pings had no answer: {pairs}")
            if any("host" in pair for pair in lost):
                self._say("does a firewall on this host drop ICMP on the TAP interface?")
        else:
            self._say(f"all {count} pings were answered; the demo took {taken:.0f} s")

    def _say(self, text: str) -> None:
        taken = time.monotonic() - self._start
        self._console.print(f"[{taken:5.1f} s] {text}", markup=False, soft_wrap=True)

    @contextmanager
    def _working(self, text: str) -> Iterator[requirements.Progress]:
        """Show that something goes on, and what: a spinner, or lines where there is no terminal."""
        if not self._console.is_terminal:
            self._say(text)
            yield self._say
            return
        with self._console.status(Text(text)) as status:
            yield lambda line: status.update(Text(line))
