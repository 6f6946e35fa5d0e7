"""The `vswitchctl` command: asks a running switch and changes it over its control socket.

Exit codes: 0 done, 1 error, 2 wrong usage, 3 the switch cannot be reached, 4 not found, 5 exists.
"""

from __future__ import annotations

from typing import NoReturn

import click

from vswitch._version import __version__
from vswitch.cli.common import LazyCommand, LazyGroup, completion_script, run_program
from vswitch.cli.state import Group, State, pass_state


class _Root(LazyGroup, Group):
    """Imports a command when it is called, for the shell waits for each."""


_LAZY = {
    name: LazyCommand(f"vswitch.cli.{module}:{name.replace('-', '_')}", line)
    for name, module, line in (
        (
            "add-port",
            "settings",
            "Add the port NAME with the vhost-user socket SOCKET.",
        ),
        ("del-port", "ports", "Delete ports; their guests lose the link."),
        ("events", "running", "Follow what happens on the switch: all events, or those named."),
        ("fdb", "fdb", "MAC addresses: show, add, delete, flush."),
        ("link", "networks", "Cables between two ports: add, delete, list."),
        ("list-ports", "ports", "List ports and uplinks, a line each."),
        ("log-level", "settings", "Show the log level of the switch, or set it to LEVEL."),
        ("network", "networks", "Networks, each a broadcast domain: add, delete, list, show."),
        ("ping", "running", "Ask the switch for a sign of life."),
        ("save", "running", "Write the running ports and uplinks as TOML to a file."),
        ("set-link", "ports", "Set the link of port NAME up or down."),
        (
            "set-port",
            "settings",
            "Change limits or network of the port or uplink NAME.",
        ),
        ("show", "ports", "Show ports in full: state, negotiated features, guest memory, rings."),
        ("stats", "counters", "Show the counters of ports."),
        ("stop", "running", "Stop the switch and wait until it has."),
        ("uplink", "uplinks", "Uplinks to the host: add, delete."),
        ("version", "running", "Show the versions of this command and of the running switch."),
        ("worker", "workers", "Poll threads."),
    )
}
"""Where each command is, and its line in `--help`, which imports none of them."""


@click.group(cls=_Root, lazy=_LAZY, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-s",
    "--socket",
    envvar="VSWITCH_SOCKET",
    metavar="PATH",
    help="Control socket of the switch  [default: that of the user's own switch, in "
    "$XDG_RUNTIME_DIR/vswitch or /tmp/vswitch-UID, else /run/vswitch/control.sock]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the switch.",
)
@click.version_option(
    __version__, "--version", prog_name="vswitchctl", message="%(prog)s %(version)s"
)
@click.pass_context
def cli(ctx: click.Context, socket: str | None, timeout: float) -> None:
    """Control a running vswitch.

    Exit codes: 0 done, 1 error, 2 wrong usage, 3 the switch cannot be reached, 4 no such port or
    entry, 5 it exists already.
    """
    state = ctx.ensure_object(State)
    state.socket = socket
    state.timeout = timeout


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@pass_state
def completion(state: State, shell: str) -> None:
    """Print what makes SHELL complete the words of `vswitchctl`, names of ports among them.

    For bash: eval "$(vswitchctl completion bash)"
    """
    script = completion_script("vswitchctl", cli, shell)
    state.done({"shell": shell, "script": script}, script)


def main() -> NoReturn:
    """The console script."""
    state = State()
    run_program("vswitchctl", cli, obj=state)


if __name__ == "__main__":
    main()
