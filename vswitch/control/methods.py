"""The methods of the control socket: their parameters, checked, and what each of them calls."""

from __future__ import annotations

import asyncio
import difflib
import logging
import os
import platform
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel

from vswitch._version import __version__
from vswitch.api import (
    PAGE_MAX,
    EventLoopInfo,
    EventName,
    HelloInfo,
    Page,
    SwitchApi,
    TurnsInfo,
    VersionInfo,
)
from vswitch.config.settings import (
    LinkSettings,
    NetworkSettings,
    PortSettings,
    Settings,
    Table,
    UplinkSettings,
)
from vswitch.control.params import (
    FdbAddParams,
    FdbFlushParams,
    FdbKeyParams,
    FdbParams,
    HelloParams,
    LogLevelParams,
    NameParams,
    NoParams,
    PageParams,
    SaveParams,
    SetLinkParams,
    SetPortParams,
    StatsParams,
    SubscribeParams,
    WorkerPinParams,
    checked,
)
from vswitch.control.protocol import PROTOCOL_VERSION, ControlError, Packed, pack
from vswitch.errors import ConfigError

_log = logging.getLogger(__name__)


class Session(NamedTuple):
    """What a method may do to the connection that it was called on."""

    subscribe: Callable[[frozenset[str] | None], None]
    unsubscribe: Callable[[], None]
    again: Callable[[], Awaitable[None]]
    """In the midst of a long answer: returns when it is this connection's turn again."""
    may_change: bool
    """Whether the client may call what is not in READ_ONLY."""


class Methods:
    """Checks parameters and does what was asked; knows nothing of sockets."""

    def __init__(
        self,
        switch: SwitchApi,
        *,
        config_path: Path | None,
        config_read: Settings | None,
        request_stop: Callable[[], None],
        turns: Callable[[], TurnsInfo | None],
    ) -> None:
        """`config_path` is where `save` writes by default, `request_stop` starts the shutdown.

        `config_read` is what was read from that file, `turns` are those of the event loop.
        """
        self._switch = switch
        self._config_path = config_path
        self._in_files: dict[Path, Settings] = {}
        """What the switch has read from files or written to them."""
        if config_path is not None and config_read is not None:
            self._in_files[config_path] = config_read
        self._request_stop = request_stop
        self._turns = turns
        self._start = time.monotonic()
        self._saving = asyncio.Lock()

    async def call(self, method: str, params: Mapping[str, Any], session: Session) -> Any:
        """The result of a request. Raises VswitchError for everything a client can get wrong."""
        model_and_function = METHODS.get(method)
        if model_and_function is None:
            close = difflib.get_close_matches(method[:64], METHODS, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"known are {', '.join(METHODS)}"
            raise ControlError(f'unknown method "{method[:64]}"', hint=hint, code="unknown-method")
        model, function = model_and_function
        if not session.may_change and method not in READ_ONLY:
            raise ControlError(
                f"{method}: this user may look at the switch and not change it",
                hint="run as the user who started the switch, as root, or as a member of the group "
                "of the control socket (control_group in the [switch] table)",
                code="permission-denied",
            )
        return await function(self, checked(method, model, params), session)

    async def _hello(self, params: HelloParams, session: Session) -> HelloInfo:  # noqa: ARG002
        if params.protocol != PROTOCOL_VERSION:
            raise ControlError(
                f"protocol version {params.protocol} is not spoken here, "
                f"vswitch {__version__} speaks {PROTOCOL_VERSION}",
                hint="use the client of the same release as the switch",
                code="unsupported-version",
            )
        return HelloInfo(
            name=self._switch.name,
            version=__version__,
            protocol=PROTOCOL_VERSION,
            pid=os.getpid(),
        )

    async def _ping(self, params: NoParams, session: Session) -> str:  # noqa: ARG002
        return "pong"

    async def _version(self, params: NoParams, session: Session) -> VersionInfo:  # noqa: ARG002
        return VersionInfo(
            name=self._switch.name,
            version=__version__,
            protocol=PROTOCOL_VERSION,
            pid=os.getpid(),
            python=platform.python_version(),
            config=None if self._config_path is None else str(self._config_path),
            uptime_s=round(time.monotonic() - self._start, 3),
        )

    async def _settings(self, params: PageParams, session: Session) -> Any:
        tables: dict[str, list[bytes]] = {name: [] for name in get_args(Table)}
        after: int | None = params.after
        while after is not None:
            page = self._switch.tables(after, params.limit or PAGE_MAX)
            for each in page.items:
                tables[each.table].append(pack(each.model_dump(mode="json")))
            after = page.next
            if params.limit is not None:
                break
            if after is not None:
                await session.again()
        found: dict[str, object] = {"switch": self._switch.switch_settings.model_dump(mode="json")}
        found |= {kind: Packed.array(len(all_), all_) for kind, all_ in tables.items()}
        return Packed.map(found if params.limit is None else found | {"next": after})

    async def _add_port(self, params: PortSettings, session: Session) -> Any:  # noqa: ARG002
        return await self._switch.add_port(params)

    async def _del_port(self, params: NameParams, session: Session) -> None:  # noqa: ARG002
        await self._switch.del_port(params.name)

    async def _ports(self, params: PageParams, session: Session) -> Any:
        return await _listed(self._switch.ports, params, session)

    async def _port(self, params: NameParams, session: Session) -> Any:  # noqa: ARG002
        return self._switch.port(params.name)

    async def _add_uplink(self, params: UplinkSettings, session: Session) -> Any:  # noqa: ARG002
        return await self._switch.add_uplink(params)

    async def _del_uplink(self, params: NameParams, session: Session) -> None:  # noqa: ARG002
        await self._switch.del_uplink(params.name)

    async def _stats(self, params: StatsParams, session: Session) -> Any:
        return await _listed(partial(self._switch.stats, params.name), params, session)

    async def _event_loop(self, params: NoParams, session: Session) -> EventLoopInfo:  # noqa: ARG002
        return EventLoopInfo(turns=self._turns())

    async def _workers(self, params: PageParams, session: Session) -> Any:
        if params.limit is not None:
            return await _listed(self._switch.workers, params, session)
        # Each page has all workers; what their queues are in all of them goes together.
        queues: dict[int, list[bytes]] = {}
        after: int | None = 0
        while after is not None:
            page = self._switch.workers(after)
            for worker in page.items:
                queues.setdefault(worker["id"], []).extend(map(pack, worker["queues"]))
            after = page.next
            if after is not None:
                await session.again()
        parts = []
        for worker in page.items:
            mine = queues[worker["id"]]
            parts += Packed.map({**worker, "queues": Packed.array(len(mine), mine)}).parts
        return Packed.array(len(page.items), parts)

    async def _worker_pin(self, params: WorkerPinParams, session: Session) -> Any:  # noqa: ARG002
        return {"moved": await self._switch.worker_pin(params.port, params.worker)}

    async def _worker_rebalance(self, params: NoParams, session: Session) -> Any:  # noqa: ARG002
        return {"moved": await self._switch.worker_rebalance()}

    async def _set_link(self, params: SetLinkParams, session: Session) -> Any:  # noqa: ARG002
        return await self._switch.set_link(params.name, params.up)

    async def _set_port(self, params: SetPortParams, session: Session) -> Any:  # noqa: ARG002
        changes = params.model_dump(exclude_unset=True)
        return await self._switch.set_port(changes.pop("name"), changes)

    async def _add_network(self, params: NetworkSettings, session: Session) -> Any:  # noqa: ARG002
        return await self._switch.add_network(params)

    async def _del_network(self, params: NameParams, session: Session) -> None:  # noqa: ARG002
        await self._switch.del_network(params.name)

    async def _networks(self, params: PageParams, session: Session) -> Any:
        return await _listed(self._switch.networks, params, session)

    async def _network(self, params: NameParams, session: Session) -> Any:  # noqa: ARG002
        return self._switch.network(params.name)

    async def _add_link(self, params: LinkSettings, session: Session) -> Any:  # noqa: ARG002
        return await self._switch.add_link(params)

    async def _del_link(self, params: NameParams, session: Session) -> None:  # noqa: ARG002
        await self._switch.del_link(params.name)

    async def _links(self, params: PageParams, session: Session) -> Any:
        return await _listed(self._switch.links, params, session)

    async def _fdb(self, params: FdbParams, session: Session) -> Any:
        return await _listed(partial(self._switch.fdb, params.network), params, session)

    async def _fdb_add(self, params: FdbAddParams, session: Session) -> None:  # noqa: ARG002
        self._switch.fdb_add(params.mac, params.port, params.vlan)

    async def _fdb_del(self, params: FdbKeyParams, session: Session) -> None:  # noqa: ARG002
        self._switch.fdb_del(params.mac, params.vlan, params.network)

    async def _fdb_flush(self, params: FdbFlushParams, session: Session) -> Any:  # noqa: ARG002
        return {"removed": await self._switch.fdb_flush(params.port, params.network)}

    async def _log_level(self, params: LogLevelParams, session: Session) -> Any:  # noqa: ARG002
        logger = logging.getLogger("vswitch")
        if params.level is not None:
            logger.setLevel(params.level.upper())
            _log.info("log level is %s", params.level)
        return {"level": _log_level()}

    async def _save(self, params: SaveParams, session: Session) -> Any:  # noqa: ARG002
        from vswitch.config.write import save  # tomlkit takes long to import, saving is rare

        if params.path is None:
            if self._config_path is None:
                raise ConfigError(
                    "the switch was started without a configuration file",
                    hint="name the file to save to",
                )
            path = self._config_path
        else:
            path = Path(params.path)
            if not path.is_absolute() or "\0" in params.path:
                raise ConfigError(
                    f"save: path: must be an absolute path (got {params.path!r})",
                    code="invalid-params",
                )
        async with self._saving:
            settings, unsaved = self._switch.settings, self._switch.unsaved()
            before = self._in_files.get(path)
            known = None if params.force else [] if before is None else [before]
            written = await asyncio.to_thread(save, settings, path, known=known)
            self._in_files[path] = settings
        level = _log_level()
        if level != settings.switch.log_level:
            unsaved["log_level"] = level
        _log.info("saved the running configuration to %s", written)
        return {"path": str(written), "unsaved": unsaved}

    async def _stop(self, params: NoParams, session: Session) -> None:  # noqa: ARG002
        _log.info("asked to stop over the control socket")
        self._request_stop()

    async def _subscribe(self, params: SubscribeParams, session: Session) -> Any:
        names = None if params.events is None else frozenset[str](params.events)
        session.subscribe(names)
        return {"events": sorted(names) if names is not None else list(get_args(EventName))}

    async def _unsubscribe(self, params: NoParams, session: Session) -> None:  # noqa: ARG002
        session.unsubscribe()


def _log_level() -> str:
    return str(logging.getLevelName(logging.getLogger("vswitch").getEffectiveLevel())).lower()


async def _listed(
    pages: Callable[[int, int], Page[Any]], params: PageParams, session: Session
) -> Any:
    """A page of a list, or all of it, which is made in one turn of the event loop a page."""
    if params.limit is not None:
        return pages(params.after, params.limit)._asdict()
    parts: list[bytes] = []
    n_items = 0
    after: int | None = 0
    while after is not None:
        page = pages(after, PAGE_MAX)
        n_items += len(page.items)
        parts.append(b"".join(map(pack, page.items)))
        after = page.next
        if after is not None:
            await session.again()
    return Packed.array(n_items, parts)


_Function = Callable[[Methods, Any, Session], Awaitable[Any]]

METHODS: Mapping[str, tuple[type[BaseModel], _Function]] = {
    "hello": (HelloParams, Methods._hello),
    "ping": (NoParams, Methods._ping),
    "version": (NoParams, Methods._version),
    "settings": (PageParams, Methods._settings),
    "add_port": (PortSettings, Methods._add_port),
    "del_port": (NameParams, Methods._del_port),
    "ports": (PageParams, Methods._ports),
    "port": (NameParams, Methods._port),
    "add_uplink": (UplinkSettings, Methods._add_uplink),
    "del_uplink": (NameParams, Methods._del_uplink),
    "stats": (StatsParams, Methods._stats),
    "event_loop": (NoParams, Methods._event_loop),
    "workers": (PageParams, Methods._workers),
    "worker_pin": (WorkerPinParams, Methods._worker_pin),
    "worker_rebalance": (NoParams, Methods._worker_rebalance),
    "set_port": (SetPortParams, Methods._set_port),
    "set_link": (SetLinkParams, Methods._set_link),
    "add_network": (NetworkSettings, Methods._add_network),
    "del_network": (NameParams, Methods._del_network),
    "networks": (PageParams, Methods._networks),
    "network": (NameParams, Methods._network),
    "add_link": (LinkSettings, Methods._add_link),
    "del_link": (NameParams, Methods._del_link),
    "links": (PageParams, Methods._links),
    "fdb": (FdbParams, Methods._fdb),
    "fdb_add": (FdbAddParams, Methods._fdb_add),
    "fdb_del": (FdbKeyParams, Methods._fdb_del),
    "fdb_flush": (FdbFlushParams, Methods._fdb_flush),
    "subscribe": (SubscribeParams, Methods._subscribe),
    "unsubscribe": (NoParams, Methods._unsubscribe),
    "log_level": (LogLevelParams, Methods._log_level),
    "save": (SaveParams, Methods._save),
    "stop": (NoParams, Methods._stop),
}

READ_ONLY = frozenset(
    {
        "hello",
        "ping",
        "version",
        "settings",
        "ports",
        "port",
        "stats",
        "event_loop",
        "workers",
        "networks",
        "network",
        "links",
        "fdb",
        "subscribe",
        "unsubscribe",
    }
)
"""What those may call whom the socket lets in as neither its owner nor a member of its group."""
