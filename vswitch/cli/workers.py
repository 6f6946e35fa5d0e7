"""`vswitchctl worker`: the poll threads."""

from __future__ import annotations

import click

from vswitch.cli.state import Group, State, complete_ports, pass_state


@click.group(cls=Group)
def worker() -> None:
    """Poll threads."""


@worker.command("show")
@pass_state
def worker_show(state: State) -> None:
    """Show the poll threads: how busy they are, what they did, and their longest turns."""
    from vswitch.cli import tables

    with state.connect() as switch:
        found = {"event_loop": switch.event_loop(), "workers": switch.workers()}
    state.show(found, lambda each: tables.workers(each["workers"], each["event_loop"]))


@worker.command("pin")
@click.argument("port", shell_complete=complete_ports)
@click.argument("number", metavar="WORKER", required=False, type=click.IntRange(min=0))
@pass_state
def worker_pin(state: State, port: str, number: int | None) -> None:
    """Have WORKER poll all queues of PORT; without WORKER, let the switch choose again."""
    with state.connect() as switch:
        moved = switch.worker_pin(port, number)
    what = "is no longer pinned" if number is None else f"is pinned to worker {number}"
    state.done({"moved": moved}, f"port {port} {what}, {moved} queues moved")


@worker.command("rebalance")
@pass_state
def worker_rebalance(state: State) -> None:
    """Spread the queues that are not pinned over the workers by their load."""
    with state.connect() as switch:
        moved = switch.worker_rebalance()
    state.done({"moved": moved}, f"{moved} queues moved")
