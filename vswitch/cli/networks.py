"""`vswitchctl network` and `link`: broadcast domains, and cables between two ports."""

from __future__ import annotations

from typing import Any

import click

from vswitch.cli.options import given, keys
from vswitch.cli.state import (
    Group,
    State,
    complete_links,
    complete_networks,
    complete_ports,
    pass_state,
)
from vswitch.config.keys import NetworkKeys


@click.group(cls=Group)
def network() -> None:
    """Networks, each a broadcast domain: add, delete, list, show."""


@network.command("add")
@click.argument("name")
@keys(NetworkKeys, without=("name",))
@pass_state
def network_add(state: State, /, name: str, **options: Any) -> None:
    """Add the network NAME; ports come into it with --network NAME."""
    with state.connect() as switch:
        added = switch.add_network(name, **given(options))
    state.done(added, f"added network {name}")


@network.command("del")
@click.argument("name", shell_complete=complete_networks)
@pass_state
def network_del(state: State, name: str) -> None:
    """Delete the network NAME, which no port may be in."""
    with state.connect() as switch:
        switch.del_network(name)
    state.done({"removed": [name]}, f"deleted network {name}")


@network.command("list")
@pass_state
def network_list(state: State) -> None:
    """List networks, a line each."""
    from vswitch.cli import tables

    with state.connect() as switch:
        networks = switch.networks()
    state.show(networks, tables.networks)


@network.command("show")
@click.argument("name", shell_complete=complete_networks)
@pass_state
def network_show(state: State, name: str) -> None:
    """Show the network NAME and the ports in it."""
    from vswitch.cli import tables

    with state.connect() as switch:
        found = switch.network(name)
    state.show(found, tables.network)


@click.group(cls=Group)
def link() -> None:
    """Cables between two ports: add, delete, list."""


@link.command("add")
@click.argument("port", shell_complete=complete_ports)
@click.argument("other", shell_complete=complete_ports)
@click.option("--name", help="Unique among links; default: its ends.")
@pass_state
def link_add(state: State, port: str, other: str, name: str | None) -> None:
    """Plug a cable into PORT and OTHER: what enters one leaves the other."""
    with state.connect() as switch:
        added = switch.add_link(port, other, name=name)
    state.done(added, f"added link {added['name']}")


@link.command("del")
@click.argument("name", shell_complete=complete_links)
@pass_state
def link_del(state: State, name: str) -> None:
    """Pull the cable NAME; its ends are in the default network then."""
    with state.connect() as switch:
        switch.del_link(name)
    state.done({"removed": [name]}, f"deleted link {name}")


@link.command("list")
@pass_state
def link_list(state: State) -> None:
    """List cables, a line each."""
    from vswitch.cli import tables

    with state.connect() as switch:
        links = switch.links()
    state.show(links, tables.links)
