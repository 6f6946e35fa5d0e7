"""The `vswitch` command: starts a switch in the foreground, the demo, and a load generator."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn, get_args

import click

from vswitch._version import __version__
from vswitch.cli.common import LazyCommand, LazyGroup, completion_script, run_program
from vswitch.config.keys import LogLevel

EXAMPLES = Path(__file__).parents[1] / "examples"
"""In a checkout a link to config/."""

_LEVELS = click.Choice(get_args(LogLevel))


@click.group(
    cls=LazyGroup,
    lazy={
        "bench": LazyCommand(
            "vswitch.lab.load.command:bench",
            "Send frames through any vhost-user switch and count them.",
        ),
        "demo": LazyCommand(
            "vswitch.lab.qemu.demo:demo",
            "Boot three guests on a switch and let them ping each other.",
        ),
    },
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, "--version", prog_name="vswitch", message="%(prog)s %(version)s")
def cli() -> None:
    """A software switch that wires virtual machines into a lab network over vhost-user.

    A running switch is controlled with `vswitchctl`.
    """


@cli.command()
@click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Configuration with ports and uplinks; without it the switch starts with none.",
)
@click.option("--check", is_flag=True, help="Validate the configuration and exit.")
@click.option("--control", metavar="PATH", help="Control socket, in place of the file's.")
@click.option("--log-level", type=_LEVELS, help="Least level to log, in place of the file's.")
def start(config_path: Path | None, check: bool, control: str | None, log_level: str | None) -> int:
    """Run a switch in the foreground until SIGTERM, SIGINT or `vswitchctl stop`.

    Logs to stderr, and says `vswitch: ready, ...` there when all sockets are open.
    """
    from vswitch.config.read import Settings, load, switch_settings

    if check and config_path is None:
        raise click.UsageError("--check needs a file: --config FILE")
    settings = Settings() if config_path is None else load(config_path)
    read = settings
    changes = {
        "control": None if control is None else str(Path(control).absolute()),
        "log_level": log_level,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes:
        values = settings.switch.model_dump(exclude_unset=True) | changes
        settings = Settings(
            switch=switch_settings(values), ports=settings.ports, uplinks=settings.uplinks
        )
    if check:
        click.echo(
            f"{config_path}: good: {len(settings.ports)} port(s), {len(settings.uplinks)} uplink(s)"
        )
        return 0

    from vswitch.daemon.process import run

    if config_path is None:
        return run(settings)
    return run(settings, config_path.absolute(), read)


@cli.command()
def examples() -> None:
    """Print the directory of commented configurations and a unit for systemd.

    To start from: cp "$(vswitch examples)/user.toml" .
    """
    click.echo(EXAMPLES)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete the words of `vswitch`.

    For bash: eval "$(vswitch completion bash)"
    """
    click.echo(completion_script("vswitch", cli, shell))


def main() -> NoReturn:
    """The console script."""
    run_program("vswitch", cli)
