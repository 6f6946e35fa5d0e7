"""`python -m vswitch` is the `vswitch` command."""

from vswitch.cli.main import main

main()
