"""Ports: what a guest, or an interface of the host, is joined to."""
