"""`vswitchctl fdb`: the MAC addresses that the switch knows."""

from __future__ import annotations

import click

from vswitch.cli.state import Group, State, complete_networks, complete_ports, pass_state


@click.group(cls=Group)
def fdb() -> None:
    """MAC addresses: show, add, delete, flush."""


_network = click.option("--network", shell_complete=complete_networks, help="Of this network only.")


@fdb.command("show")
@_network
@pass_state
def fdb_show(state: State, network: str | None) -> None:
    """Show the MAC addresses known and the ports they are behind."""
    from vswitch.cli import tables

    with state.connect() as switch:
        entries = switch.fdb(network)
    state.show(entries, tables.fdb)


_vlan = click.option(
    "--vlan", type=int, default=0, show_default=True, help="VLAN of the entry, 0 for untagged."
)


@fdb.command("add")
@click.argument("mac")
@click.argument("port", shell_complete=complete_ports)
@_vlan
@pass_state
def fdb_add(state: State, mac: str, port: str, vlan: int) -> None:
    """Pin MAC to PORT: the entry does not age and does not move."""
    with state.connect() as switch:
        switch.fdb_add(mac, port, vlan=vlan)
    state.done({"mac": mac, "vlan": vlan, "port": port}, f"added {mac} on {port}")


@fdb.command("del")
@click.argument("mac")
@_vlan
@_network
@pass_state
def fdb_del(state: State, mac: str, vlan: int, network: str | None) -> None:
    """Delete the entry of MAC, in the only network that has it if none is named."""
    with state.connect() as switch:
        switch.fdb_del(mac, vlan=vlan, network=network)
    state.done({"mac": mac, "vlan": vlan}, f"deleted {mac}")


@fdb.command("flush")
@click.argument("port", required=False, shell_complete=complete_ports)
@_network
@pass_state
def fdb_flush(state: State, port: str | None, network: str | None) -> None:
    """Delete the learned addresses, of PORT or all; static ones stay."""
    with state.connect() as switch:
        n_removed = switch.fdb_flush(port, network=network)
    state.done({"removed": n_removed}, f"deleted {n_removed} learned addresses")
