"""`vswitchctl fdb`: the MAC addresses that the switch knows."""

from __future__ import annotations

import click

from vswitch.cli.state import Group, State, complete_ports, pass_state


@click.group(cls=Group)
def fdb() -> None:
    """MAC addresses: show, add, delete, flush."""


@fdb.command("show")
@pass_state
def fdb_show(state: State) -> None:
    """Show the MAC addresses known and the ports they are behind."""
    from vswitch.cli import tables

    with state.connect() as switch:
        entries = switch.fdb()
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
@pass_state
def fdb_del(state: State, mac: str, vlan: int) -> None:
    """Delete the entry of MAC."""
    with state.connect() as switch:
        switch.fdb_del(mac, vlan=vlan)
    state.done({"mac": mac, "vlan": vlan}, f"deleted {mac}")


@fdb.command("flush")
@click.argument("port", required=False, shell_complete=complete_ports)
@pass_state
def fdb_flush(state: State, port: str | None) -> None:
    """Delete the learned addresses, of PORT or all; static ones stay."""
    with state.connect() as switch:
        n_removed = switch.fdb_flush(port)
    state.done({"removed": n_removed}, f"deleted {n_removed} learned addresses")
