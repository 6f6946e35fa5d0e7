"""`vswitch start` with a fake switch: `python -m tests.support.fakedaemon start --config FILE`.

With FAIL=1 in the environment the switch fails as soon as a port named `crash` is added.
"""

from __future__ import annotations

import os
import sys
import types

from tests.support.fakeswitch import FakeSwitch
from vswitch.api import PortInfo
from vswitch.cli.main import main
from vswitch.config.settings import PortSettings


class Switch(FakeSwitch):
    async def add_port(self, settings: PortSettings) -> PortInfo:
        info = await super().add_port(settings)
        if settings.name == "crash":
            self.failed.set_exception(RuntimeError("worker 0 ended"))
        return info


module = types.ModuleType("vswitch.switch")
module.Switch = Switch  # type: ignore[attr-defined]
sys.modules["vswitch.switch"] = module
os.environ.pop("VSWITCH_SOCKET", None)
main()
