"""What the commands of `vswitchctl` share: the switch that they ask, and --json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from vswitch.cli.common import to_json
from vswitch.errors import VswitchError

if TYPE_CHECKING:
    from vswitch.cli.layout import Layout
    from vswitch.control.client import Client


class State:
    """What the options in front of a command say."""

    def __init__(self, socket: str | None = None, *, timeout: float = 10.0) -> None:
        self.socket = socket
        self.timeout = timeout
        self.json = False

    @contextmanager
    def connect(self) -> Iterator[Client]:
        """A connection to the switch for the length of a `with` block."""
        from vswitch.control.client import Client

        with Client(self.socket, timeout=self.timeout) as client:
            yield client

    def show(self, result: object, layout: Callable[[Any], Sequence[Layout]]) -> None:
        """Print a result: as JSON, or as what `layout` makes of it."""
        if self.json:
            click.echo(to_json(result))
        else:
            from vswitch.cli.layout import show

            show(layout(result))

    def done(self, result: object, text: str) -> None:
        """Print what was done: the result as JSON, or a line of text."""
        click.echo(to_json(result) if self.json else text)

    def warn(self, text: str) -> None:
        """Say something on stderr that is worth knowing although all was done."""
        warning = to_json({"warning": {"message": text}})
        click.echo(warning if self.json else f"vswitchctl: warning: {text}", err=True)


pass_state = click.make_pass_decorator(State, ensure=True)


def _want_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(State).json = True


def _json_option() -> click.Option:
    return click.Option(
        ["--json"],
        is_flag=True,
        is_eager=True,  # before whatever else may be wrong
        expose_value=False,
        callback=_want_json,
        help="Print JSON.",
    )


class Command(click.Command):
    """A command that takes --json, as all of them do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_json_option())


class Group(click.Group):
    """A group of commands that take --json, which it takes, too."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_json_option())


command = partial(click.command, cls=Command)


def complete_ports(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The names of ports and uplinks; none if the switch cannot be asked."""
    return _named(ctx, incomplete, lambda client: [port["name"] for port in client.ports()])


def complete_networks(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The same of networks."""
    return _named(ctx, incomplete, lambda client: [each["name"] for each in client.networks()])


def complete_links(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The same of cables."""
    return _named(ctx, incomplete, lambda client: [link["name"] for link in client.links()])


def _named(ctx: click.Context, incomplete: str, names: Callable[[Client], list[str]]) -> list[str]:
    state = State(socket=ctx.find_root().params.get("socket"), timeout=1.0)
    try:
        with state.connect() as client:
            return [name for name in names(client) if name.startswith(incomplete)]
    except VswitchError:
        return []
