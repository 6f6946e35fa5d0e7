"""The commands `vswitch` and `vswitchctl`."""
