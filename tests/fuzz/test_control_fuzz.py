"""The control socket of a running switch against clients that hypothesis makes up.

Whatever comes, a bystander's request is answered, every answer is a message of the protocol, none
is an error inside the switch, and at the end the process has no descriptor more than before.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vswitch import Client
from vswitch.control.methods import METHODS
from vswitch.control.protocol import REQUEST_LEN_MAX

# `stop` would end the switch, `save` and `add_uplink` leave their marks on this machine.
HARMLESS = sorted(set(METHODS) - {"stop", "save", "add_uplink"})
DEADLINE_S = 60.0
RSS_GROWTH_MAX = 64 << 20

few = settings(
    derandomize=True,
    max_examples=int(os.environ.get("VSWITCH_FUZZ_EXAMPLES", "300")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Target:
    """A switch, a client that keeps the protocol, and a directory for what the others make up."""

    def __init__(self, directory: Path) -> None:
        self.control = directory / "control.sock"
        config = directory / "ports.toml"
        config.write_text(
            f'[switch]\ncontrol = "{self.control}"\nlog_level = "debug"\n'
            f'[[port]]\nname = "vm0"\nsocket = "{directory}/vm0.sock"\n'
        )
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vswitch", "start", "--config", str(config)],
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
        )
        ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(ready,), daemon=True)
        self._reader.start()
        assert ready.wait(DEADLINE_S), "".join(self.log)
        self.bystander = Client(self.control, timeout=DEADLINE_S)

    def _read(self, ready: threading.Event) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if line.startswith("vswitch: ready"):
                ready.set()

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def files(self) -> list[str]:
        directory = Path(f"/proc/{self.process.pid}/fd")
        return sorted(str(path.readlink()) for path in directory.iterdir())

    @property
    def resident(self) -> int:
        """Bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def attack(self, pieces: list[bytes], *, read: bool) -> None:
        """Send the pieces on a connection of their own; judge the answers if they are read."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.control))
            client.settimeout(DEADLINE_S if read else 0.05)
            with contextlib.suppress(ConnectionError, TimeoutError):
                for piece in pieces:
                    client.sendall(piece)
                if read:
                    client.shutdown(socket.SHUT_WR)
                    for answer in _answers(client):
                        _judge(answer)
        assert self.bystander.ping() > 0


def _answers(client: socket.socket) -> Iterator[Any]:
    unpacker = msgpack.Unpacker(strict_map_key=False)
    while data := client.recv(1 << 16):
        unpacker.feed(data)
        yield from unpacker


def _judge(answer: Any) -> None:
    kind, *rest = answer
    if kind == 2:
        assert rest[0] in ("event", "lost")
        return
    msgid, error, _ = rest
    assert kind == 1
    assert msgid is None or 0 <= msgid < 2**32
    if error is not None:
        assert set(error) == {"code", "message", "hint"}
        assert error["code"] != "internal", error
        assert len(error["message"]) < 4 * REQUEST_LEN_MAX


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with tempfile.TemporaryDirectory(prefix="vswitch-") as directory:
        running = Target(Path(directory))
        before = running.descriptors
        resident = running.resident
        try:
            yield running
            for port in running.bystander.ports():
                if port["name"] != "vm0":
                    running.bystander.del_port(port["name"])
            # Those who left without a word are noticed in their turn.
            deadline = time.monotonic() + DEADLINE_S
            while running.descriptors > before:
                assert time.monotonic() < deadline, running.files()
                time.sleep(0.01)  # between two looks
            assert running.resident < resident + RSS_GROWTH_MAX
            running.bystander.stop()
            assert running.process.wait(DEADLINE_S) == 0
            assert "Traceback" not in "".join(running.log), "".join(running.log)
        finally:
            running.process.kill()
            running.process.wait()
            running.bystander.close()


# What a client may be made to send: values, requests that are nearly right, and bytes.


def _deep(value: object, levels: int = 300) -> object:
    for _ in range(levels):
        value = [value]
    return value


texts = st.text(max_size=40) | st.sampled_from(["vm0", "vm1", "", "x" * 5000, "\0", "\ud7ff"])
# What MessagePack can say. Hypothesis takes numbers that it finds in the code that is loaded, and
# those go beyond.
whole_numbers = st.integers(-(2**63), 2**64 - 1)
atoms = (
    st.none()
    | st.booleans()
    | whole_numbers
    | st.floats()
    | texts
    | st.binary(max_size=40)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20))
    | st.datetimes().map(lambda _: msgpack.Timestamp(0, 1))
)
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(texts | st.integers(-5, 5), inner, max_size=6)
    ),
    max_leaves=12,
) | atoms.map(_deep)

names = st.sampled_from(["vm0", "vm1", "vm2", "no.such", "", "-", "a b", "x" * 33, "\x1b[2J"])
macs = st.sampled_from(["52:54:00:00:00:01", "52-54-00-00-00-02", "01:00:5e:00:00:01", "0", ":"])
good_params: dict[str, st.SearchStrategy[Any]] = {
    "name": names,
    "port": names,
    "mac": macs,
    "vlan": st.integers(-1, 4096),
    "mode": st.sampled_from(["server", "client", "both"]),
    "queues": st.integers(-1, 130),
    "mtu": st.integers(60, 70000),
    "offloads": st.booleans() | st.lists(st.sampled_from(["csum", "tso4", "x"]), max_size=3),
    "permissions": st.sampled_from(["0660", "660", "0999", "rwx"]),
    "owner": st.sampled_from(["root", "no.such.user", "0", "-1", "4294967295"]),
    "worker": st.integers(-1, 65),
    "up": st.booleans(),
    "events": st.lists(st.sampled_from(["port-added", "mac-moved", "x"]), max_size=300),
    "level": st.sampled_from(["debug", "info", "loud"]),
    "protocol": st.integers(0, 3),
    "client": texts,
}


@st.composite
def requests(draw: st.DrawFn, directory: Path) -> Any:
    """Nearly right: a method with its own parameters, some of them made up, others left out."""
    method = draw(st.sampled_from(HARMLESS))
    sockets = st.sampled_from(
        [f"{directory}/{name}" for name in ("a", "b", "vm0.sock", "none/c", "x" * 120)]
        + ["rel", ""]
    )
    params: dict[Any, Any] = {}
    for key in METHODS[method][0].model_fields:
        chance = draw(st.integers(0, 9))
        if chance < 7:
            likely = sockets if key == "socket" else good_params.get(key, values)
            params[key] = draw(likely)
        elif chance < 8 and key != "socket":
            params[key] = draw(values)
    if draw(st.integers(0, 9)) == 0:
        params[draw(texts | whole_numbers)] = draw(values)
    msgid = draw(st.integers(0, 2**32 - 1) | atoms)
    shape = draw(st.integers(0, 12))
    if shape == 0:
        return draw(values)
    if shape == 1:
        return [draw(atoms), msgid, method, [params], *draw(st.lists(atoms, max_size=2))]
    return [0, msgid, draw(values) if shape == 2 else method, [params]]


@st.composite
def mangled(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes overwritten, cut out or put in, lengths blown up."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 3)):
            case 0:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                del data[at : at + draw(st.integers(1, 20))]
            case 2:
                data[at:at] = draw(st.binary(max_size=20))
            case _:
                # A length that is a lie: str, bin, ext, array or map of 32 bits.
                kind = draw(st.sampled_from(b"\xdb\xc6\xc9\xdd\xdf\xdc\xde"))
                data[at:at] = bytes([kind]) + draw(st.sampled_from([b"\xff" * 4, b"\0\0\1\0"]))
    return bytes(data)


def _pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    borders = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(borders) if a < b]


@few
@given(data=st.data())
def test_requests_that_are_nearly_right(target: Target, data: st.DataObject) -> None:
    directory = target.control.parent
    stream = b"".join(
        msgpack.packb(data.draw(requests(directory))) for _ in range(data.draw(st.integers(1, 4)))
    )
    cuts = data.draw(st.lists(st.integers(0, 1 << 16), max_size=4))
    target.attack(_pieces(stream, cuts), read=data.draw(st.booleans()))


@few
@given(data=st.data())
def test_mangled_bytes(target: Target, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(["ping", "ports", "subscribe", "stats", "fdb", "hello"]))
    whole = msgpack.packb([0, 1, method, [{"protocol": 1, "events": ["x"], "client": "y" * 40}]])
    stream = data.draw(mangled(whole)) + data.draw(mangled(whole * 3))
    cuts = data.draw(st.lists(st.integers(0, 400), max_size=6))
    target.attack(_pieces(stream, cuts), read=data.draw(st.booleans()))


@few
@given(data=st.binary(max_size=2000), read=st.booleans())
def test_any_bytes(target: Target, data: bytes, read: bool) -> None:
    target.attack([data], read=read)


@pytest.mark.parametrize(
    "unit",
    [b"\x90", b"\x80", b"\xa0", b"\xc4\x00", b"\xca\x00\x00\x00\x00", b"\xd4\x05\x00", b"\xc0"],
    ids=["array", "map", "str", "bin", "float", "ext", "nil"],
)
def test_a_message_without_an_end_takes_no_memory(target: Target, unit: bytes) -> None:
    """Arrays of arrays, each as long as they may be; the client would go on for ever."""
    before = target.resident
    clients = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    for client in clients:
        client.connect(str(target.control))
        with contextlib.suppress(ConnectionError):
            client.sendall(b"\xdc\x01\x00" * 4)
            for _ in range(64):
                client.sendall(b"\xdc\x01\x00" + unit * 256)
    assert target.bystander.ping() > 0
    assert target.resident < before + RSS_GROWTH_MAX
    for client in clients:
        client.close()
