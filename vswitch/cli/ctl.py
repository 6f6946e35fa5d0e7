"""The `vswitchctl` command: asks a running switch and changes it over its control socket.

Exit codes: 0 done, 1 error, 2 wrong usage, 3 the switch cannot be reached, 4 not found, 5 exists.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from vswitch._version import __version__
from vswitch.cli.common import completion_script, run_program
from vswitch.config.feature_names import FRONTENDS, OF_OFFLOADS, OFFERED
from vswitch.errors import NotFoundError, VswitchError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vswitch.api import Unsaved
    from vswitch.control.client import Client


@dataclass
class State:
    """What the options in front of a command say."""

    socket: str | None = None
    json: bool = False
    timeout: float = 10.0

    @contextmanager
    def connect(self) -> Iterator[Client]:
        """A connection to the switch for the length of a `with` block."""
        from vswitch.control.client import Client

        with Client(self.socket, timeout=self.timeout) as client:
            yield client

    def show(self, result: object, table: Callable[[Any], RenderableType]) -> None:
        """Print a result: as JSON, or as what `table` makes of it."""
        if self.json:
            click.echo(json.dumps(result))
        else:
            from vswitch.cli.tables import console

            console().print(table(result))

    def done(self, result: object, text: str) -> None:
        """Print what was done: the result as JSON, or a line of text."""
        click.echo(json.dumps(result) if self.json else text)

    def warn(self, text: str) -> None:
        """Say something on stderr that is worth knowing although all was done."""
        warning = json.dumps({"warning": {"message": text}})
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


class _Command(click.Command):
    """A command that takes --json, as all of them do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_json_option())


class _Group(click.Group):
    command_class = _Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_json_option())


def _complete_ports(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The names of ports and uplinks; none if the switch cannot be asked."""
    root = ctx.find_root()
    state = State(socket=root.params.get("socket"), timeout=1.0)
    try:
        with state.connect() as client:
            names = [port["name"] for port in client.ports()]
    except VswitchError:
        return []
    return [name for name in names if name.startswith(incomplete)]


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
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


def _offload_names(_ctx: click.Context, _: click.Parameter, value: str) -> bool | list[str]:
    """`on`, `off` or names with commas between them; which names there are, the switch knows."""
    return {"on": True, "off": False}.get(value, value.split(","))


def _feature_words(_ctx: click.Context, _: click.Parameter, value: str) -> list[str]:
    """Words with commas between them; which there are, the switch knows."""
    return value.split(",") if value else []


def _complete_features(_ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The word behind the last comma. A first one with `-` is an option to click, and not asked."""
    before, comma, last = incomplete.rpartition(",")
    names = [f"-{name}" for name in OFFERED] + [n for n in OFFERED if n not in OF_OFFLOADS]
    return [before + comma + name for name in names if name.startswith(last)]


_offloads = click.option(
    "--offloads",
    default="on",
    show_default=True,
    callback=_offload_names,
    metavar="LIST",
    help="Checksum and segmentation offloads: on, off, or some of csum,tso4,tso6,ecn,uso,ufo.",
)


_LIMITS = {
    "max_macs": "Most MAC addresses learned from it.",
    "storm_broadcast": "Broadcast frames a second that it may send.",
    "storm_multicast": "Multicast frames a second that it may send.",
    "storm_unknown": "Frames a second to unknown addresses that it may send.",
    "storm_burst": "Frames at once within these rates.",
}


def _limits(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a port's or uplink's limits; 0 is the default, as is None."""
    for name, text in reversed(_LIMITS.items()):
        option = click.option(f"--{name.replace('_', '-')}", metavar="N", type=int, help=text)
        function = option(function)
    return function


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Limits as the switch wants them: those that were given, None for 0."""
    others = {name: value for name, value in options.items() if name not in _LIMITS}
    return others | {name: options[name] or None for name in _LIMITS if options[name] is not None}


@cli.command("add-port")
@click.argument("name")
@click.argument("socket", type=click.Path())
@click.option("--client", is_flag=True, help="Connect to SOCKET, where the frontend listens.")
@click.option("--queues", type=int, default=1, show_default=True, help="Most queue pairs.")
@click.option(
    "--mtu", type=int, help="Largest MTU of the guest, in bytes; QEMU tells it with host_mtu=."
)
@click.option("--owner", help="User who owns the socket.")
@click.option("--group", help="Group of the socket.")
@click.option("--permissions", metavar="OCTAL", help="Permissions of the socket, e.g. 0660.")
@_offloads
@click.option(
    "--frontend",
    type=click.Choice(FRONTENDS),
    help="Frontend that cannot use all that is offered, or means other things by it.",
)
@click.option(
    "--features",
    default="",
    callback=_feature_words,
    shell_complete=_complete_features,
    metavar="LIST",
    help="Virtio features not to offer, e.g. -CTRL_VQ,-STATUS; without -, to offer all the same.",
)
@click.option("--worker", type=click.IntRange(min=0), help="Worker that polls all of its queues.")
@_limits
@pass_state
def add_port(state: State, /, name: str, socket: str, client: bool, **options: Any) -> None:
    """Add the port NAME with the vhost-user socket SOCKET."""
    with state.connect() as switch:
        port = switch.add_port(
            name, socket, mode="client" if client else "server", **_given(options)
        )
    state.done(port, f"added port {name} ({port['state']}, {port['socket']})")


@cli.command("del-port")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=_complete_ports)
@pass_state
def del_port(state: State, names: tuple[str, ...]) -> None:
    """Delete ports; their guests lose the link. All of those named, or none if one is not there."""
    names = tuple(dict.fromkeys(names))
    removed: list[str] = []
    with state.connect() as switch:
        _check_ports(switch, names)
        try:
            for name in names:
                switch.del_port(name)
                removed.append(name)
        except VswitchError as exc:
            # Somebody else was quicker, or the switch goes away.
            if removed:
                exc.message += f"; deleted before that: {', '.join(removed)}"
            raise
    state.done({"removed": removed}, f"deleted port {', '.join(removed)}")


def _check_ports(switch: Client, names: Iterable[str]) -> None:
    """Raise NotFoundError, which names all of them, if some are no guests' ports."""
    problems = []
    for name in names:
        try:
            if switch.port(name)["kind"] != "vhost-user":
                problems.append(f'"{name}" is an uplink (vswitchctl uplink del {name})')
        except NotFoundError:
            problems.append(f'there is no port "{name}"')
    if problems:
        raise NotFoundError(
            f"{', '.join(problems)}; nothing was deleted",
            hint="vswitchctl list-ports lists them",
        )


@cli.command()
@click.argument("name", required=False, shell_complete=_complete_ports)
@pass_state
def show(state: State, name: str | None) -> None:
    """Show ports in full: state, negotiated features, guest memory, rings."""
    from vswitch.cli import tables

    with state.connect() as switch:
        ports = switch.ports() if name is None else [switch.port(name)]
    state.show(ports, tables.ports_in_full)


@cli.command("list-ports")
@pass_state
def list_ports(state: State) -> None:
    """List ports and uplinks, a line each."""
    from vswitch.cli import tables

    with state.connect() as switch:
        ports = switch.ports()
    keys = ("name", "id", "kind", "state", "link", "mode", "socket")
    state.show([{key: port[key] for key in keys} for port in ports], tables.ports_in_brief)  # type: ignore[literal-required]  # the keys are in PortInfo


@cli.command()
@click.argument("name", required=False, shell_complete=_complete_ports)
@click.option("-w", "--watch", is_flag=True, help="Show rates, again and again.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks with --watch.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End --watch after N times.")
@pass_state
def stats(state: State, name: str | None, watch: bool, interval: float, count: int | None) -> None:
    """Show the counters of ports: frames, bytes, drops by reason, notifications."""
    from vswitch.cli import tables

    if not watch:
        with state.connect() as switch:
            state.show(switch.stats(name), tables.counters)
        return
    with state.connect() as switch:
        try:
            _watch(state, switch, name, interval, count)
        except KeyboardInterrupt:
            return  # the usual way to end it


def _watch(
    state: State, switch: Client, name: str | None, interval: float, count: int | None
) -> None:
    """Print counters `count` times; each is a line of JSON, or a table of rates."""
    from rich.live import Live

    from vswitch.cli import tables

    console = tables.console()
    in_place = console.is_terminal and not state.json
    before, before_s = switch.stats(name), time.monotonic()
    with Live(console=console, auto_refresh=False) if in_place else nullcontext() as live:
        for _ in itertools.count() if count is None else range(count):
            time.sleep(interval)
            now, now_s = switch.stats(name), time.monotonic()
            if state.json:
                click.echo(json.dumps(now))
            elif live is not None:
                live.update(tables.rates(before, now, now_s - before_s), refresh=True)
            else:
                console.print(tables.rates(before, now, now_s - before_s))
            sys.stdout.flush()
            before, before_s = now, now_s


@cli.group(cls=_Group)
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
@click.argument("port", shell_complete=_complete_ports)
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
@click.argument("port", required=False, shell_complete=_complete_ports)
@pass_state
def fdb_flush(state: State, port: str | None) -> None:
    """Delete the learned addresses, of PORT or all; static ones stay."""
    with state.connect() as switch:
        n_removed = switch.fdb_flush(port)
    state.done({"removed": n_removed}, f"deleted {n_removed} learned addresses")


@cli.group(cls=_Group)
def uplink() -> None:
    """Uplinks to the host: add, delete."""


@uplink.command("add")
@click.argument("name")
@click.option("--mtu", type=int, help="MTU to set on the interface, in bytes.")
@click.option("--bridge", help="Linux bridge the interface joins.")
@_offloads
@_limits
@pass_state
def uplink_add(state: State, /, name: str, **options: Any) -> None:
    """Open the TAP interface NAME, created if need be, and join it to the switch."""
    with state.connect() as switch:
        port = switch.add_uplink(name, **_given(options))
    state.done(port, f"added uplink {name} ({port['state']})")
    if port["warning"] and not state.json:
        state.warn(port["warning"])


@uplink.command("del")
@click.argument("name", shell_complete=_complete_ports)
@pass_state
def uplink_del(state: State, name: str) -> None:
    """Close the uplink NAME."""
    with state.connect() as switch:
        switch.del_uplink(name)
    state.done({"removed": [name]}, f"deleted uplink {name}")


@cli.group(cls=_Group)
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
@click.argument("port", shell_complete=_complete_ports)
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


@cli.command("set-port")
@click.argument("name", shell_complete=_complete_ports)
@_limits
@pass_state
def set_port(state: State, /, name: str, **options: Any) -> None:
    """Change limits of the port or uplink NAME while it runs; 0 takes a limit away."""
    changes = _given(options)
    if not changes:
        raise click.UsageError("say what to change; `vswitchctl show` has what is set")
    with state.connect() as switch:
        port = switch.set_port(name, **changes)
    text = ", ".join(
        f"{key.replace('_', '-')} {'default' if value is None else value}"
        for key, value in changes.items()
    )
    state.done(port, f"port {name}: {text}")


@cli.command("set-link")
@click.argument("name", shell_complete=_complete_ports)
@click.argument("link", type=click.Choice(["up", "down"]))
@pass_state
def set_link(state: State, name: str, link: str) -> None:
    """Set the link of port NAME up or down: while down, nothing passes from or to its guest."""
    with state.connect() as switch:
        port = switch.set_link(name, link == "up")
    state.done(port, f"link of {name} is {port['link']}")


@cli.command("log-level")
@click.argument("level", required=False, type=click.Choice(["debug", "info", "warning", "error"]))
@pass_state
def log_level(state: State, level: str | None) -> None:
    """Show the log level of the switch, or set it to LEVEL."""
    with state.connect() as switch:
        now = switch.log_level(level)
    state.done({"level": now}, now)


@cli.command()
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


@cli.command()
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


@cli.command()
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
    if unsaved["static_macs"]:
        yield f"{unsaved['static_macs']} static MAC addresses (vswitchctl fdb show)"
    if unsaved["links_down"]:
        yield f"link down of {', '.join(unsaved['links_down'])} (vswitchctl set-link)"
    if "log_level" in unsaved:
        yield f"log level {unsaved['log_level']} (vswitchctl log-level)"


@cli.command()
@pass_state
def stop(state: State) -> None:
    """Stop the switch and wait until it has."""
    with state.connect() as switch:
        pid = switch.switch["pid"]
        switch.stop()
    state.done({"pid": pid}, f"stopped the switch with pid {pid}")


@cli.command()
@click.argument("names", nargs=-1, metavar="[EVENT]...")
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
