"""The process of a running switch: log, control socket, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from vswitch.control.api import SwitchApi
from vswitch.control.protocol import default_socket_path
from vswitch.control.server import ControlServer
from vswitch.errors import SocketError, VswitchError
from vswitch.settings import Settings
from vswitch.unixsocket import InUseError, ListeningSocket, listen, unlink_if_ours

_log = logging.getLogger(__name__)

CONTROL_PERMISSIONS = 0o600
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class RunningSwitch(SwitchApi, Protocol):
    """A switch as the daemon needs it."""

    @property
    def failed(self) -> asyncio.Future[Any]:
        """Gets an exception when the switch cannot go on, e.g. because a worker ended."""
        ...


Create = Callable[[Settings], Awaitable[RunningSwitch]]


def run(
    settings: Settings, config_path: Path | None = None, *, create: Create | None = None
) -> int:
    """Run a switch until it is told to stop; returns the exit code, 0 after an orderly end.

    Says `vswitch: ready, ...` on stderr when all sockets are open. `config_path` is where the
    `save` request writes by default; `create` builds the switch (default: `Switch.create`).
    """
    _set_up_log(settings.switch.log_level)
    try:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(settings, config_path, create or _create))
    except VswitchError as exc:
        sys.stderr.write(f"vswitch: {exc}\n")
        return 1


async def _create(settings: Settings) -> RunningSwitch:
    from vswitch.switch import Switch

    control = settings.switch.control or default_socket_path()
    return await Switch.create(settings, journals=control.with_name(f"{control.name}.rings"))


def _set_up_log(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logger = logging.getLogger("vswitch")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())


async def _run(settings: Settings, config_path: Path | None, create: Create) -> int:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    seen: list[int] = []
    for number in _SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup: it is to outlive its terminal
        loop.add_signal_handler(number, _on_signal, number, seen, stopping)

    # First of all, because a second switch with the same configuration must fail before it
    # touches anything else.
    listener = open_control_socket(settings)
    try:
        switch = await create(settings)
    except BaseException:
        unlink_if_ours(listener.path, listener)
        listener.close()
        raise

    control = ControlServer(switch, listener, config_path=config_path, request_stop=stopping.set)
    try:
        await control.start()
        _say_ready(switch, listener.path)
        stopped: asyncio.Future[Any] = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({stopped, switch.failed}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        failure = switch.failed.exception() if switch.failed.done() else None
    finally:
        _log.info("stopping")
        # The switch first: `stop` promises its caller that all is closed when the control
        # connection is.
        try:
            await switch.close()
        finally:
            await control.close()
    if failure is not None:
        _log.error("the switch failed and was stopped: %s", failure, exc_info=failure)
        return 1
    _log.info("stopped")
    return 0


def _on_signal(number: int, seen: list[int], stopping: asyncio.Event) -> None:
    if seen:
        _log.error("%s again: stopping at once", signal.Signals(number).name)
        os._exit(1)
    seen.append(number)
    _log.info("%s", signal.Signals(number).name)
    stopping.set()


def open_control_socket(settings: Settings) -> ListeningSocket:
    """Listen on the control socket that `settings` name, or on the default one.

    Its directory is created if need be. Raises SocketError, ConfigError.
    """
    path = settings.switch.control or default_socket_path()
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as exc:
        raise SocketError(
            f"cannot create the directory {path.parent} for the control socket: {exc.strerror}",
            hint='name another one: `control = "PATH"` in the [switch] table',
        ) from exc
    permissions = settings.switch.control_permissions
    try:
        return listen(
            path,
            mode=CONTROL_PERMISSIONS if permissions is None else int(permissions, 8),
            owner=None,
            group=settings.switch.control_group,
        )
    except InUseError as exc:
        raise SocketError(
            f"a switch or another program listens on the control socket {path} already",
            hint=f"stop it (`vswitchctl --socket {path} stop`), or give this switch another one: "
            '`control = "PATH"` in the [switch] table',
        ) from exc


def _say_ready(switch: SwitchApi, control: Path) -> None:
    ports = switch.ports()
    n_uplinks = sum(port["kind"] != "vhost-user" for port in ports)
    n_ports = len(ports) - n_uplinks
    parts = [f"{n_ports} port{'s' * (n_ports != 1)}"]
    if n_uplinks:
        parts.append(f"{n_uplinks} uplink{'s' * (n_uplinks != 1)}")
    # Not through the log, whose level may hide it: programs wait for this line.
    sys.stderr.write(f"vswitch: ready, {', '.join(parts)}, control socket {control}\n")
    sys.stderr.flush()
