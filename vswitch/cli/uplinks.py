"""`vswitchctl uplink`: TAP interfaces that join the switch to the host."""

from __future__ import annotations

from typing import Any

import click

from vswitch.cli.options import given, keys
from vswitch.cli.state import Group, State, complete_ports, pass_state
from vswitch.config.keys import RuntimeKeys, UplinkKeys


@click.group(cls=Group)
def uplink() -> None:
    """Uplinks to the host: add, delete."""


@uplink.command("add")
@click.argument("name")
@keys(UplinkKeys, RuntimeKeys, without=("type", "name"))
@pass_state
def uplink_add(state: State, /, name: str, **options: Any) -> None:
    """Open the TAP interface NAME, created if need be, and join it to the switch."""
    with state.connect() as switch:
        port = switch.add_uplink(name, **given(options))
    state.done(port, f"added uplink {name} ({port['state']})")
    if port["warning"] and not state.json:
        state.warn(port["warning"])


@uplink.command("del")
@click.argument("name", shell_complete=complete_ports)
@pass_state
def uplink_del(state: State, name: str) -> None:
    """Close the uplink NAME."""
    with state.connect() as switch:
        switch.del_uplink(name)
    state.done({"removed": [name]}, f"deleted uplink {name}")
