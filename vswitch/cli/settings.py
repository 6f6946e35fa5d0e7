"""`vswitchctl`: what can be set: an option for each key of a port, and the log level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import click

from vswitch.cli.options import given, keys
from vswitch.cli.patterns import expanded
from vswitch.cli.state import State, command, complete_ports, pass_state
from vswitch.config.keys import LogLevel, PortKeys, RuntimeKeys
from vswitch.errors import VswitchError

if TYPE_CHECKING:
    from vswitch.api import PortInfo


@command("add-port")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.argument("socket", type=click.Path())
@click.option("--client", is_flag=True, help="Connect to SOCKET, where the frontend listens.")
@keys(PortKeys, RuntimeKeys, without=("name", "socket", "mode"))
@pass_state
def add_port(
    state: State, /, names: tuple[str, ...], socket: str, client: bool, **options: Any
) -> None:
    """Add the port NAME with the vhost-user socket SOCKET.

    Or several: r[1-4]-eth[0-3] stands for sixteen, and {name} in SOCKET for the name of each.
    """
    if not names:
        raise click.UsageError("Missing argument 'SOCKET'.")
    found = expanded(names)
    if len(found) > 1 and "{name}" not in socket:
        raise click.UsageError(
            f"{len(found)} ports cannot have one socket: put {{name}} into it, "
            "for example /run/vswitch/{name}.sock"
        )
    mode = "client" if client else "server"
    ports: list[PortInfo] = []
    with state.connect() as switch:
        try:
            for name in found:
                path = socket.replace("{name}", name)
                ports.append(switch.add_port(name, path, mode=mode, **given(options)))
        except VswitchError as exc:
            if ports:
                last = found[len(ports) - 1]
                exc.message += f"; added before that: {len(ports)} ports, up to {last}"
            raise
    if len(found) == 1:
        [port] = ports
        state.done(port, f"added port {port['name']} ({port['state']}, {port['socket']})")
    else:
        state.done(ports, f"added {len(ports)} ports: {found[0]} to {found[-1]}")


@command("set-port")
@click.argument("name", shell_complete=complete_ports)
@keys(RuntimeKeys)
@pass_state
def set_port(state: State, /, name: str, **options: Any) -> None:
    """Change limits or network of the port or uplink NAME.

    0 takes a limit away, an empty network is the default one.
    """
    changes = given(options)
    if not changes:
        raise click.UsageError("say what to change; `vswitchctl show` has what is set")
    with state.connect() as switch:
        port = switch.set_port(name, **changes)
    text = ", ".join(
        f"{key.replace('_', '-')} {'default' if value is None else value}"
        for key, value in changes.items()
    )
    state.done(port, f"port {name}: {text}")


@command("log-level")
@click.argument("level", required=False, type=click.Choice(get_args(LogLevel)))
@pass_state
def log_level(state: State, level: str | None) -> None:
    """Show the log level of the switch, or set it to LEVEL."""
    with state.connect() as switch:
        now = switch.log_level(level)
    state.done({"level": now}, now)
