"""`vswitchctl`: ports, besides their settings and their counters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from vswitch.cli.state import State, command, complete_ports, pass_state
from vswitch.config.kind_names import UPLINK_KINDS
from vswitch.errors import NotFoundError, VswitchError

if TYPE_CHECKING:
    from vswitch.control.client import Client


@command("del-port")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_ports)
@pass_state
def del_port(state: State, names: tuple[str, ...]) -> None:
    """Delete ports; their guests lose the link. All of those named, or none if one is not there."""
    names = tuple(dict.fromkeys(names))
    removed: list[str] = []
    with state.connect() as switch:
        _check_ports(switch, names)
        try:
            for name in names:
                switch.del_port(name)
                removed.append(name)
        except VswitchError as exc:
            # Somebody else was quicker, or the switch goes away.
            if removed:
                exc.message += f"; deleted before that: {', '.join(removed)}"
            raise
    state.done({"removed": removed}, f"deleted port {', '.join(removed)}")


def _check_ports(switch: Client, names: Iterable[str]) -> None:
    """Raise NotFoundError, which names all of them, if some are no guests' ports."""
    problems = []
    for name in names:
        try:
            if switch.port(name)["kind"] in UPLINK_KINDS:
                problems.append(f'"{name}" is an uplink (vswitchctl uplink del {name})')
        except NotFoundError:
            problems.append(f'there is no port "{name}"')
    if problems:
        raise NotFoundError(
            f"{', '.join(problems)}; nothing was deleted",
            hint="vswitchctl list-ports lists them",
        )


@command()
@click.argument("name", required=False, shell_complete=complete_ports)
@pass_state
def show(state: State, name: str | None) -> None:
    """Show ports in full: state, negotiated features, guest memory, rings."""
    from vswitch.cli import tables

    with state.connect() as switch:
        ports = switch.ports() if name is None else [switch.port(name)]
    state.show(ports, tables.ports_in_full)


@command("list-ports")
@pass_state
def list_ports(state: State) -> None:
    """List ports and uplinks, a line each."""
    from vswitch.cli import tables

    with state.connect() as switch:
        ports = switch.ports()
    keys = ("name", "id", "kind", "state", "link", "network", "peer", "mode", "socket")
    state.show([{key: port[key] for key in keys} for port in ports], tables.ports_in_brief)  # type: ignore[literal-required]  # the keys are in PortInfo


@command("set-link")
@click.argument("name", shell_complete=complete_ports)
@click.argument("link", type=click.Choice(["up", "down"]))
@pass_state
def set_link(state: State, name: str, link: str) -> None:
    """Set the link of port NAME up or down: while down, nothing passes from or to its guest."""
    with state.connect() as switch:
        port = switch.set_link(name, link == "up")
    state.done(port, f"link of {name} is {port['link']}")
