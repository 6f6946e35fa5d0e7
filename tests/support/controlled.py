"""A control server on a fake switch, in a thread of its own, for clients that block."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from tests.support.fakeswitch import FakeSwitch
from vswitch.config.settings import Settings, SwitchSettings
from vswitch.control.server import ControlServer
from vswitch.host.unixsocket import listen
from vswitch.relay.process import Relay

DEADLINE_S = 60.0


class Controlled:
    """Runs the server until `close`; `switch` and `server` belong to the loop of its thread."""

    def __init__(self, path: Path, *, config_path: Path | None = None, mode: int = 0o600) -> None:
        self.path = path
        self.config_path = config_path
        self.mode = mode
        self.switch: FakeSwitch
        self.server: ControlServer
        self._started = threading.Event()
        self._loop = uvloop.new_event_loop()  # as in a real switch
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._started.wait(DEADLINE_S)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self.switch = await FakeSwitch.create(
            Settings(switch=SwitchSettings(name="lab", control=self.path))
        )
        listener = listen(self.path, mode=self.mode, owner=None, group=None, rights=False)
        relay = await Relay.start()
        self.server = ControlServer(
            self.switch, listener, relay, config_path=self.config_path, request_stop=self._stop.set
        )
        await self.server.start()
        self._started.set()
        await self._stop.wait()
        await self.switch.close()
        await self.server.close()
        await relay.close()

    def do(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call a function in the server's thread."""

        async def call() -> Any:
            return function(*arguments, **named)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(DEADLINE_S)

    def wait(self, condition: Callable[[], object]) -> None:
        """Until something is true in the server's thread."""

        deadline = time.monotonic() + DEADLINE_S
        while not self.do(condition):
            assert time.monotonic() < deadline
            time.sleep(0.001)  # between two looks

    def close(self) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # its loop has ended just now
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
