"""A switch has ports of any kind that is registered, and knows none by its name."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast, get_args

import pytest

from tests.support.frames import ETHERTYPE_TEST
from vswitch.api import Changes, Event, PortInfo
from vswitch.config import kind_names
from vswitch.config.settings import PortSettings, Settings, SwitchSettings, UplinkSettings
from vswitch.dataplane.events import WorkerEvent
from vswitch.errors import ExistsError, NotFoundError, SocketError
from vswitch.fastpath.main.port import Port
from vswitch.ports import kinds, limits
from vswitch.ports.every_kind import guest, tap
from vswitch.ports.kinds import Parts, SwitchPort
from vswitch.relay.process import Relay
from vswitch.switch import Switch

ROOT = Path(__file__).parents[3]
VNET_HDR_LEN = 12
SHARE = 4
A, B = b"\x02\0\0\0\0\x0a", b"\x02\0\0\0\0\x0b"
BROADCAST = b"\xff" * 6


class MadeUp(PortSettings):
    """A `[[port]]` of a kind that nobody has heard of."""

    refuses: bool = False

    @property
    def kind(self) -> Any:
        return "made-up"


class MadeUpPort:
    """Frames come and go through `far`, each behind a virtio_net_hdr, as a TAP has them."""

    def __init__(self, settings: MadeUp, near: socket.socket, fast: Port, parts: Parts) -> None:
        self.settings: PortSettings = settings
        self.fast = fast
        self.near = near
        self.parts = parts
        self.refuses = settings.refuses
        self.called: list[tuple[Any, ...]] = []
        """Everything but `info`, with whether workers might know it still."""

    @property
    def name(self) -> str:
        return self.settings.name

    def note(self, *what: object) -> None:
        self.called.append((*what, not self.fast.removed))

    def info(self) -> PortInfo:
        # Of what others have it has no more than this.
        return cast(PortInfo, {"name": self.name, "kind": "made-up", "rings": [], "memory": []})

    async def open(self) -> None:
        self.note("open")
        if self.refuses:
            raise SocketError("it does not want to")
        await self.parts.handover.settle()

    async def close(self) -> None:
        self.note("close")

    def free(self) -> None:
        self.note("free")
        self.near.close()

    def forget(self) -> None:
        self.note("forget")

    def check(self) -> None:
        """How often depends on how long a test takes."""

    def check_memory(self) -> None:
        self.note("check_memory")

    def hear(self, event: str, value: int) -> None:
        self.note("hear", event, value)

    def change(self, changes: Changes) -> None:
        self.note("change", changes)

    async def set_link(self, up: bool) -> bool:
        self.note("set_link", up)
        return not up


class Bench:
    """A running switch, and the far ends of its made-up ports."""

    def __init__(self, switch: Switch, made: list[MadeUpPort], far: list[socket.socket]) -> None:
        self.switch = switch
        self.made = made
        self._far = far
        self.events: list[Event] = []
        switch.subscribe(self.events.append)

    async def send(self, port: int, frame: bytes) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._far[port], bytes(VNET_HDR_LEN) + frame)

    async def receive(self, port: int) -> bytes:
        loop = asyncio.get_running_loop()
        return (await loop.sock_recv(self._far[port], 2000))[VNET_HDR_LEN:]

    def known(self) -> dict[str, str]:
        """Addresses that the switch knows, and their ports."""
        found: dict[str, str] = {}
        after: int | None = 0
        while after is not None:
            page = self.switch.fdb(after=after)
            found |= {entry["mac"]: entry["port"] for entry in page.items}
            after = page.next
        return found


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Any], list[Any]]]:
    """The kind, registered for one test; the ports that were made of it, and their far ends."""
    monkeypatch.setattr(kinds, "_kinds", dict(kinds._kinds))
    made: list[MadeUpPort] = []
    ends: list[socket.socket] = []

    @kinds.register("made-up", fdb_share=SHARE)
    def make(settings: MadeUp, parts: Parts) -> SwitchPort:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        far.setblocking(False)
        made.append(MadeUpPort(settings, near, parts.join(settings, near.fileno()), parts))
        ends.append(far)
        return made[-1]

    yield made, ends
    for far in ends:
        far.close()


Made = tuple[list[MadeUpPort], list[socket.socket]]


def on_a_switch(made: Made, test: Callable[[Bench], Awaitable[None]]) -> None:
    async def run() -> None:
        relay = await Relay.start()
        try:
            settings = Settings(switch=SwitchSettings(control=Path("/nowhere/control")))
            switch = await Switch.create(settings, relay)
            try:
                async with asyncio.timeout(60):
                    await test(Bench(switch, *made))
            finally:
                await switch.close()
        finally:
            await relay.close()

    asyncio.run(run())


def settings(name: str, **more: Any) -> MadeUp:
    return MadeUp(name=name, socket=Path("/nowhere", name), **more)


def frame(dst: bytes, src: bytes) -> bytes:
    return (dst + src + ETHERTYPE_TEST).ljust(60, b"\0")


def test_every_kind_that_can_be_told_is_registered() -> None:
    assert kinds.names() == {*get_args(kind_names.PortKind)}
    port = PortSettings(name="vm", socket=Path("/nowhere/vm"))
    assert kinds.kind_of(port).make is guest.make
    assert kinds.kind_of(UplinkSettings(name="tap0")).make is tap.make


def test_two_kinds_have_two_names() -> None:
    with pytest.raises(AssertionError, match="two kinds tap"):
        kinds.register("tap", fdb_share=1)(lambda *_: cast(SwitchPort, None))


def test_nobody_asks_what_kind_a_port_is_of() -> None:
    """A switch that does would not have the next one."""
    words = "|".join(get_args(kind_names.PortKind))
    asks = re.compile(
        r"isinstance\([^)]*\b(\w+Port|PortSettings|UplinkSettings)\b"
        rf'|[=!]= "({words})"|"({words})" [=!]='
    )
    named = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "vswitch").rglob("*.py")
        for line in path.read_text().splitlines()
        if asks.search(line)
    }
    assert named == set()


def test_a_kind_that_nobody_knew_forwards_frames(made_up: Made) -> None:
    async def test(bench: Bench) -> None:
        switch = bench.switch
        await switch.add_port(settings("a"))
        await switch.add_port(settings("b"))
        assert [info["name"] for info in switch.ports().items] == ["a", "b"]
        assert switch.n_ports == (2, 0)
        assert [one.kind for one in switch.settings.ports] == ["made-up", "made-up"]
        await bench.send(0, frame(BROADCAST, A))
        assert await bench.receive(1) == frame(BROADCAST, A)
        await bench.send(1, frame(A, B))
        assert await bench.receive(0) == frame(A, B)
        assert bench.known() == {A.hex(":"): "a", B.hex(":"): "b"}
        assert [stats["ingress_frames"] for stats in switch.stats().items] == [1, 1]

    on_a_switch(made_up, test)


def test_it_is_opened_closed_freed_and_forgotten_in_this_order(made_up: Made) -> None:
    async def test(bench: Bench) -> None:
        await bench.switch.add_port(settings("a"))
        await bench.switch.add_port(settings("b"))
        assert bench.made[0].called == [("open", True)]
        await bench.switch.del_port("a")
        assert bench.made[0].called[1:] == [("close", True), ("free", False), ("forget", False)]
        assert [(event["event"], event["port"]) for event in bench.events] == [
            ("port-added", "a"), ("port-added", "b"), ("port-removed", "a"),
        ]  # fmt: skip

    on_a_switch(made_up, test)
    # The end of the switch is not the port's: what is kept for a successor stays.
    assert made_up[0][1].called == [("open", True), ("close", True), ("free", False)]


def test_one_that_cannot_be_opened_leaves_nothing(made_up: Made) -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(SocketError, match="does not want to"):
            await bench.switch.add_port(settings("a", refuses=True))
        assert bench.made[0].called == [("open", True), ("close", True), ("free", False)]
        assert bench.switch.ports().items == []
        assert bench.events == []
        await bench.switch.add_port(settings("a"))
        assert bench.made[1].fast.id == bench.made[0].fast.id

    on_a_switch(made_up, test)


def test_what_concerns_a_port_goes_to_its_own_methods(made_up: Made) -> None:
    async def test(bench: Bench) -> None:
        switch = bench.switch
        await switch.add_port(settings("a"))
        await switch.add_port(settings("b"))
        port, other = bench.made
        del port.called[:], bench.events[:]
        switch._events.hear(WorkerEvent("iotlb-miss", port.fast.id, 3, 0))
        switch._events.hear(WorkerEvent("tap-lost", 200, 0, 0))  # nobody's
        switch._check_memory()
        await switch.set_port("a", {"max_macs": 5})
        await switch.worker_pin("a", 0)
        await switch.set_link("a", True)
        await switch.set_link("a", False)
        assert port.called == [
            ("hear", "iotlb-miss", 3, True),
            ("check_memory", True),
            ("change", {"max_macs": 5}, True),
            ("change", {"worker": 0}, True),
            ("set_link", True, True),
            ("set_link", False, True),
        ]
        assert other.called == [("open", True), ("check_memory", True)]
        # The first was no news to the port.
        assert [(event["event"], event.get("link")) for event in bench.events] == [
            ("port-link", "down")
        ]

    on_a_switch(made_up, test)


def test_its_share_of_the_fdb_is_the_kinds(made_up: Made) -> None:
    async def test(bench: Bench) -> None:
        await bench.switch.add_port(settings("a"))
        port = bench.made[0]
        fdb = port.parts.engine.fdb
        assert limits.max_macs(port.settings, fdb) == fdb.size // SHARE
        assert limits.max_macs(settings("b", max_macs=3), fdb) == 3

    on_a_switch(made_up, test)


@pytest.mark.parametrize(
    ("name", "socket", "message"),
    [
        ("a", "/nowhere/z", 'there is a port or uplink "a" already'),
        ("b", "/nowhere/a", 'port "b": socket /nowhere/a is already the socket of port "a"'),
        ("b", "/nowhere/control", 'port "b": socket /nowhere/control is already the socket of '
         "switch.control"),
    ],
)  # fmt: skip
def test_names_and_sockets_are_whose_they_are(
    made_up: Made, name: str, socket: str, message: str
) -> None:
    async def test(bench: Bench) -> None:
        await bench.switch.add_port(settings("a"))
        with pytest.raises(ExistsError) as caught:
            await bench.switch.add_port(MadeUp(name=name, socket=Path(socket)))
        assert caught.value.message == message

    on_a_switch(made_up, test)


def test_a_port_is_deleted_as_what_it_was_added_as(made_up: Made) -> None:
    async def test(bench: Bench) -> None:
        await bench.switch.add_port(settings("a"))
        with pytest.raises(NotFoundError, match='"a" is a port, not an uplink'):
            await bench.switch.del_uplink("a")
        with pytest.raises(NotFoundError, match='no port or uplink "b"'):
            await bench.switch.del_port("b")
        assert [info["name"] for info in bench.switch.ports().items] == ["a"]

    on_a_switch(made_up, test)
