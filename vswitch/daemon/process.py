"""The process of a running switch: log, control socket, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vswitch.api import SwitchApi
from vswitch.config.settings import Settings
from vswitch.control.protocol import default_socket_paths, is_own, temporary_directory
from vswitch.control.server import ControlServer
from vswitch.daemon import log
from vswitch.daemon.heartbeat import Heartbeat
from vswitch.daemon.outlet import Outlet
from vswitch.daemon.supervisor import Supervisor
from vswitch.errors import SocketError, VswitchError
from vswitch.host import privileges
from vswitch.host.unixsocket import InUseError, ListeningSocket, listen, unlink_if_ours
from vswitch.relay.process import Relay, hold_program

if TYPE_CHECKING:
    from vswitch.fastpath.shared.turns import LoopTurns

_log = logging.getLogger(__name__)

CONTROL_PERMISSIONS = 0o600
FINISH_PATIENCE_S = 1.0
"""How long whoever reads the log may take for what is left of it when all is over."""
_IMPORTED_LATER = ("uvloop", "vswitch.switch", "vswitch.config.write", "concurrent.futures.thread")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RunningSwitch(SwitchApi, Protocol):
    """A switch as the daemon needs it."""

    @property
    def failed(self) -> asyncio.Future[Any]:
        """Gets an exception when the switch cannot go on, e.g. because a worker ended."""
        ...

    def stuck_workers(self) -> list[int]:
        """Workers that have made no progress since the last call."""
        ...


Create = Callable[[Settings, Relay, Path], Awaitable[RunningSwitch]]
"""Builds the switch; the path is that of its control socket."""


def run(
    settings: Settings,
    config_path: Path | None = None,
    config_read: Settings | None = None,
    *,
    create: Create | None = None,
) -> int:
    """Run a switch until it is told to stop; returns the exit code, 0 after an orderly end.

    Says `vswitch: ready, ...` on stderr when all sockets are open. `config_path` is where the
    `save` request writes by default, `config_read` what was read there; `create` builds the switch
    (default: `Switch.create`).
    """
    outlet = Outlet(sys.stderr.fileno())
    lines = log.set_up(settings.switch.log_level, outlet)
    # What libraries and the interpreter have to say goes the same way.
    with contextlib.redirect_stderr(outlet):
        try:
            return _run_as_the_user(
                settings, config_path, config_read, create or _create, lines, outlet
            )
        except VswitchError as exc:
            outlet.write(f"vswitch: {exc}\n")
            return 1
        finally:
            outlet.finish(FINISH_PATIENCE_S)


def _run_as_the_user(
    settings: Settings,
    config_path: Path | None,
    config_read: Settings | None,
    create: Create,
    lines: log.CalmHandler,
    outlet: Outlet,
) -> int:
    # While this is the only thread: the others get their rights from it.
    privileges.forbid_new_privileges()
    privileges.use_all_descriptors()
    control = _become_the_user(settings)
    outlet.start(lambda: privileges.limit_capabilities(frozenset()))

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(settings, control, config_path, config_read, create, lines, outlet))


async def _create(settings: Settings, relay: Relay, control: Path) -> RunningSwitch:
    from vswitch.switch import Switch

    return await Switch.create(settings, relay, journals=control.with_name(f"{control.name}.rings"))


def _become_the_user(settings: Settings) -> Path:
    """Make a directory for the control socket, then be who is to own it; returns its path."""
    control = settings.switch.control or default_socket_paths()[0]
    who = privileges.identity(settings.switch.user, settings.switch.group)
    try:
        is_new = not control.parent.exists()
        control.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if who is not None and is_new:
            os.chown(control.parent, who.uid, who.gid)
    except OSError as exc:
        raise SocketError(
            f"cannot create the directory {control.parent} for the control socket: {exc.strerror}",
            hint='name another one: `control = "PATH"` in the [switch] table',
        ) from exc
    uid = os.geteuid()
    if control.parent == temporary_directory(uid) and not is_own(control.parent, uid):
        raise SocketError(
            f"{control.parent}, where the control socket of this user would be, is somebody else's",
            hint='name another place: `control = "PATH"` in the [switch] table; or set '
            "XDG_RUNTIME_DIR to a directory of your own",
        )
    if who is not None:
        # What is imported later, while it can still be read: root's home may hold all of it.
        for name in _IMPORTED_LATER:
            importlib.import_module(name)
        hold_program()
        privileges.become(who)
    return control


def _give_up_privileges(settings: Settings) -> None:
    """After setting up: keep no capability but what the uplinks of the configuration take."""
    if os.geteuid() == 0:
        return
    kept = privileges.limit_capabilities(
        frozenset({privileges.CAP_NET_ADMIN}) if settings.uplinks else frozenset()
    )
    _log.info(
        "running as uid %d, gid %d, with %s",
        os.geteuid(), os.getegid(), "CAP_NET_ADMIN" if kept else "no capabilities",
    )  # fmt: skip


async def _run(
    settings: Settings,
    control_path: Path,
    config_path: Path | None,
    config_read: Settings | None,
    create: Create,
    lines: log.CalmHandler,
    outlet: Outlet,
) -> int:
    stopping = _stop_on_signals(outlet)
    listener, relay, switch = await _open(settings, control_path, create)
    turns: LoopTurns | None = None
    control = ControlServer(
        switch,
        listener,
        relay,
        config_path=config_path,
        config_read=config_read,
        request_stop=stopping.set,
        turns=lambda: None if turns is None else turns.info(),
    )
    try:
        await control.start()
        _give_up_privileges(settings)
        # Modules and types stay as long as the process: looking through them for garbage again and
        # again would hold the loop up for 15 ms each time.
        gc.collect()
        gc.freeze()
        _say_ready(switch, listener.path, outlet)
        # From here on it serves others; what it took to set up is of no interest.
        turns = _measure_turns(asyncio.get_running_loop())
        failure = await _until_the_end(switch, relay, stopping, lines)
    finally:
        _log.info("stopping")
        if turns is not None:
            turns.close()
        await _close(switch, control, relay, outlet)
    if failure is not None:
        _log.error("the switch failed and was stopped: %s", failure, exc_info=failure)
        return 1
    _log.info("stopped")
    return 0


def _stop_on_signals(outlet: Outlet) -> asyncio.Event:
    """The event that the first of them sets; the second one ends the process."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    seen: list[int] = []
    for number in _SIGNALS:
        loop.add_signal_handler(number, _on_signal, number, seen, stopping, outlet)
    loop.add_signal_handler(signal.SIGHUP, _on_hangup)
    return stopping


async def _open(
    settings: Settings, control_path: Path, create: Create
) -> tuple[ListeningSocket, Relay, RunningSwitch]:
    # First of all, because a second switch with the same configuration must fail before it
    # touches anything else.
    listener = _open_control_socket(settings, control_path)
    relay: Relay | None = None
    try:
        relay = await Relay.start()
        return listener, relay, await create(settings, relay, control_path)
    except BaseException:
        unlink_if_ours(listener.path, listener)
        listener.close()
        if relay is not None:
            await relay.close()
        raise


async def _until_the_end(
    switch: RunningSwitch, relay: Relay, stopping: asyncio.Event, lines: log.CalmHandler
) -> BaseException | None:
    """Wait until the switch is to stop, or cannot go on: then what ended it is returned."""
    heartbeat = Heartbeat(
        Supervisor(),
        switch.stuck_workers,
        lambda: _summary(switch),
        also=lines.tell_left_out,
    )
    stopped: asyncio.Future[Any] = asyncio.ensure_future(stopping.wait())
    ends: list[asyncio.Future[Any]] = [switch.failed, relay.ended]
    await asyncio.wait([stopped, *ends], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    heartbeat.stop()
    return next((end.exception() for end in ends if end.done()), None)


async def _close(
    switch: RunningSwitch, control: ControlServer, relay: Relay, outlet: Outlet
) -> None:
    # The switch first: `stop` promises its caller that all is closed when the control
    # connection is.
    try:
        await switch.close()
    except VswitchError as exc:
        # Dead in part is dead: whoever supervises the process is to see that it is gone.
        _log.critical("%s: ending at once", exc.message)
        outlet.finish(FINISH_PATIENCE_S)
        os._exit(1)
    finally:
        await control.close()
        await relay.close()


def _measure_turns(loop: asyncio.AbstractEventLoop) -> LoopTurns | None:
    from vswitch.fastpath.shared.turns import LoopTurns

    try:
        return LoopTurns(loop)
    except OSError as exc:
        _log.warning("the turns of the event loop are not measured: %s", exc)
        return None


def _on_signal(number: int, seen: list[int], stopping: asyncio.Event, outlet: Outlet) -> None:
    if seen:
        _log.error("%s again: stopping at once", signal.Signals(number).name)
        outlet.finish(FINISH_PATIENCE_S)
        os._exit(1)
    seen.append(number)
    _log.info("%s", signal.Signals(number).name)
    stopping.set()


def _on_hangup() -> None:
    """To daemons it says: read the configuration anew. Nobody who means that wants to end one."""
    _log.warning(
        "SIGHUP: ignored. The configuration is not read again while the switch runs: change ports "
        "with vswitchctl, or start it anew (guests reconnect and go on)"
    )


def _open_control_socket(settings: Settings, path: Path) -> ListeningSocket:
    """Listen on the control socket. Raises SocketError."""
    permissions = settings.switch.control_permissions
    try:
        return listen(
            path,
            mode=CONTROL_PERMISSIONS if permissions is None else int(permissions, 8),
            owner=None,
            group=settings.switch.control_group,
            rights=False,
        )
    except InUseError as exc:
        raise SocketError(
            f"a switch or another program listens on the control socket {path} already",
            hint=f"stop it (`vswitchctl --socket {path} stop`), or give this switch another one: "
            '`control = "PATH"` in the [switch] table',
        ) from exc


def _summary(switch: SwitchApi) -> str:
    n_ports, n_uplinks = switch.n_ports
    parts = [f"{n_ports} port{'s' * (n_ports != 1)}"]
    if n_uplinks:
        parts.append(f"{n_uplinks} uplink{'s' * (n_uplinks != 1)}")
    return ", ".join(parts)


def _say_ready(switch: SwitchApi, control: Path, outlet: Outlet) -> None:
    # Not through the log, whose level may hide it: programs wait for this line.
    outlet.write(f"vswitch: ready, {_summary(switch)}, control socket {control}\n")
