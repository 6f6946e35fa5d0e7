"""`python -m vswitch` is the `vswitch` command."""

import contextlib
import os
import sys

with contextlib.suppress(FileNotFoundError):  # the current directory is gone
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():  # noqa: PTH109
        # `-m` put the current directory first. Nothing more is to be imported from there.
        del sys.path[0]

from vswitch.cli.main import main

main()
