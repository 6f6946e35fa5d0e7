"""`vswitchctl`: the switch as a whole, what happens on it, and its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from vswitch._version import __version__
from vswitch.cli.state import State, command, pass_state

if TYPE_CHECKING:
    from vswitch.api import Unsaved


@command()
@pass_state
def version(state: State) -> None:
    """Show the versions of this command and of the running switch."""
    with state.connect() as switch:
        info = switch.version()
    state.done(
        {"client": __version__, "switch": info},
        f"vswitchctl {__version__}\n"
        f"{info['name']}: vswitch {info['version']}, protocol {info['protocol']}, "
        f"Python {info['python']}, pid {info['pid']}, up {info['uptime_s']:.0f} s, "
        f"configuration {info['config'] or 'none'}",
    )


@command()
@pass_state
def ping(state: State) -> None:
    """Ask the switch for a sign of life."""
    with state.connect() as switch:
        round_trip_s = switch.ping()
        pid = switch.switch["pid"]
    state.done(
        {"pid": pid, "round_trip_s": round_trip_s},
        f"pong from pid {pid} in {round_trip_s * 1e6:.0f} µs",
    )


@command()
@click.argument("path", required=False, type=click.Path())
@click.option("--force", is_flag=True, help="Overwrite a file that was changed meanwhile.")
@pass_state
def save(state: State, path: str | None, force: bool) -> None:
    """Write the running ports and uplinks as TOML to PATH, or to the switch's own file."""
    with state.connect() as switch:
        written: Path = switch.save(path, force=force)
        unsaved = switch.unsaved
    state.done({"path": str(written), "unsaved": unsaved}, f"saved {written}")
    if unsaved is not None and not state.json:
        for text in _in_words(unsaved):
            state.warn(f"not saved, a file has no word for it: {text}")


def _in_words(unsaved: Unsaved) -> Iterator[str]:
    if unsaved["links_down"]:
        yield f"link down of {', '.join(unsaved['links_down'])} (vswitchctl set-link)"
    if "log_level" in unsaved:
        yield f"log level {unsaved['log_level']} (vswitchctl log-level)"


@command()
@pass_state
def stop(state: State) -> None:
    """Stop the switch and wait until it has."""
    with state.connect() as switch:
        pid = switch.switch["pid"]
        switch.stop()
    state.done({"pid": pid}, f"stopped the switch with pid {pid}")


def _complete_events(_ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    from vswitch.api import EventName

    return [name for name in get_args(EventName) if name.startswith(incomplete)]


@command()
@click.argument("names", nargs=-1, metavar="[EVENT]...", shell_complete=_complete_events)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N events.")
@pass_state
def events(state: State, names: tuple[str, ...], count: int | None) -> None:
    """Follow what happens on the switch: all events, or those named."""
    from vswitch.cli.tables import event_line

    shown = lost = 0
    with state.connect() as switch:
        try:
            for event in switch.events(*names):
                state.done(event, event_line(event))
                sys.stdout.flush()
                if switch.events_lost > lost:
                    lost = switch.events_lost
                    state.warn(f"{lost} events were lost")
                shown += 1
                if shown == count:
                    break
        except KeyboardInterrupt:
            return  # the usual way to end it
