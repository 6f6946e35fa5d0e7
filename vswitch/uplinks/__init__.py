"""Uplinks: interfaces of the host that a switch is joined to."""
