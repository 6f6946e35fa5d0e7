"""What tables of a configuration have to do with each other: names, sockets, networks, cables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vswitch.config.keys import DEFAULT_NETWORK

Table = Mapping[str, Any]
"""The keys of one table as far as they are usable by themselves; others are missing."""

Kind = Literal["port", "uplink", "network", "link"]


class Clash(NamedTuple):
    """What is wrong with a key because of another table; `position` counts from 1."""

    kind: Kind
    position: int
    key: str
    reason: str


class Tables(NamedTuple):
    """Those of a whole configuration; sockets are absolute paths."""

    ports: Sequence[Table] = ()
    uplinks: Sequence[Table] = ()
    networks: Sequence[Table] = ()
    links: Sequence[Table] = ()

    @property
    def ends(self) -> Iterator[tuple[Kind, int, Table]]:
        """Whatever has a name that a cable can end at."""
        for i, table in enumerate(self.ports, 1):
            yield "port", i, table
        for i, table in enumerate(self.uplinks, 1):
            yield "uplink", i, table


def find_clashes(
    control: Path | None, workers: int | None, tables: Tables, *, complete: bool = True
) -> list[Clash]:
    """All that is wrong between tables whose other keys need not be valid.

    `control` is the control socket, `workers` how many there are, None if that is not known. Not
    `complete`: names that are missing may have been in a table that is not usable.
    """
    return [
        *_names(tables),
        *_sockets(control, tables),
        *_workers(workers, tables),
        *_networks(tables, complete),
        *_links(tables, complete),
        *_static_macs(tables),
    ]


def _names(tables: Tables) -> Iterator[Clash]:
    names: dict[str, str] = {}
    for kind, i, table in tables.ends:
        name = table.get("name")
        if name in names:
            yield Clash(kind, i, "name", f"is already the name of {names[name]}")
        elif name is not None:
            names[name] = f"{kind}[{i}]"
    of_kind: tuple[tuple[Kind, Sequence[Table]], ...]
    of_kind = (("network", tables.networks), ("link", tables.links))
    for kind, some in of_kind:
        seen: dict[str, int] = {}
        for i, table in enumerate(some, 1):
            name = table.get("name")
            if name in seen:
                yield Clash(kind, i, "name", f"is already the name of {kind}[{seen[name]}]")
            elif name is not None:
                seen[name] = i


def _sockets(control: Path | None, tables: Tables) -> Iterator[Clash]:
    sockets: dict[str, str] = {}
    if control is not None:
        sockets[same_file_key(control)] = "switch.control"
    for i, port in enumerate(tables.ports, 1):
        name, socket = port.get("name"), port.get("socket")
        if socket is None:
            continue
        key = same_file_key(socket)
        if key in sockets:
            yield Clash("port", i, "socket", f"is already the socket of {sockets[key]}")
        else:
            sockets[key] = f'port "{name}"' if name is not None else f"port[{i}]"


def _workers(workers: int | None, tables: Tables) -> Iterator[Clash]:
    for i, port in enumerate(tables.ports, 1):
        worker = port.get("worker")
        if worker is not None and workers is not None and worker >= workers:
            reason = f"must be below {workers}, the number of workers in [switch]"
            yield Clash("port", i, "worker", reason)


def _networks(tables: Tables, complete: bool) -> Iterator[Clash]:
    known = {DEFAULT_NETWORK, *(table.get("name") for table in tables.networks)}
    for kind, i, table in tables.ends:
        network = table.get("network")
        if network is not None and network not in known and complete:
            names = ", ".join(sorted(name for name in known if name is not None))
            yield Clash(kind, i, "network", f"there is no such [[network]] (there are {names})")


def _links(tables: Tables, complete: bool) -> Iterator[Clash]:
    ends = {table["name"]: table for _, _, table in tables.ends if "name" in table}
    taken: dict[str, int] = {}
    for i, link in enumerate(tables.links, 1):
        for name in link.get("ports", ()):
            if name in taken:
                reason = f'"{name}" is an end of link[{taken[name]}] already'
                yield Clash("link", i, "ports", reason)
                continue
            taken[name] = i
            if name in ends:
                if ends[name].get("network") is not None:
                    reason = f'"{name}" is in network "{ends[name]["network"]}": a cable is in none'
                    yield Clash("link", i, "ports", reason)
            elif complete:
                yield Clash("link", i, "ports", f'there is no port or uplink "{name}"')


def _static_macs(tables: Tables) -> Iterator[Clash]:
    """An address is behind one port of a network; at the end of a cable there are none."""
    ends = {name for link in tables.links for name in link.get("ports", ())}
    seen: dict[tuple[str, str], str] = {}
    for kind, i, table in tables.ends:
        macs, label = table.get("static_macs") or (), f"{kind}[{i}]"
        if macs and table.get("name") in ends:
            yield Clash(kind, i, "static_macs", "it is the end of a cable, which has no addresses")
            continue
        network = table.get("network") or DEFAULT_NETWORK
        for mac in macs:
            other = seen.setdefault((network, mac), label)
            if other != label:
                yield Clash(kind, i, "static_macs", f"{mac} is one of {other} already")


def same_file_key(path: Path) -> str:
    """Equal for two spellings of one path (`//`, `..`, links among its directories)."""
    return os.path.join(os.path.realpath(path.parent), path.name)  # noqa: PTH118
