"""The bytes on the control socket: what is a message, what is not, and how much is taken in."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswitch import errors
from vswitch.control.protocol import (
    REQUEST_LEN_MAX,
    ControlError,
    Decoder,
    InvalidRequestError,
    Notification,
    Request,
    Response,
    default_socket_paths,
    error_from_map,
    error_to_map,
    pack_notification,
    pack_request,
    pack_response,
)
from vswitch.errors import ConfigError, NotFoundError, ProtocolError, VswitchError


def test_messages_cross_whatever_the_pieces() -> None:
    stream = (
        pack_request(7, "port", {"name": "vm1"})
        + pack_request(8, "ping", {})
        + pack_response(7, None, {"id": 1})
        + pack_response(8, NotFoundError("no such port", hint="look"))
        + pack_notification("event", {"event": "port-ready"})
    )
    expected = [
        Request(7, "port", {"name": "vm1"}),
        Request(8, "ping", {}),
        Response(7, None, {"id": 1}),
        Response(8, {"code": "not-found", "message": "no such port", "hint": "look"}, None),
        Notification("event", {"event": "port-ready"}),
    ]
    for step in (1, 3, 1000):
        decoder = Decoder(trusted=False)
        got = [
            message
            for at in range(0, len(stream), step)
            for message in decoder.feed(stream[at : at + step])
        ]
        assert got == expected


@pytest.mark.parametrize(
    ("value", "msgid"),
    [
        (1, None),
        ("GET / HTTP/1.1", None),
        (None, None),
        ([], None),
        ({}, None),
        ([3, 1, "ping", []], None),
        ([0, 1, "ping"], 1),
        ([0, 1, "ping", [], 5], 1),
        ([0, 1, 2, []], 1),
        ([0, 1, b"ping", []], 1),
        ([0, "1", "ping", []], None),
        ([0, True, "ping", []], None),
        ([0, -1, "ping", []], None),
        ([0, 2**32, "ping", []], None),
        ([0, 5, "ping", {}], 5),
        ([0, 5, "ping", [1, 2]], 5),
        ([0, 5, "ping", [{1: 2}]], 5),
        ([0, 5, "ping", None], 5),
        ([2, "event", [3]], None),
    ],
)
def test_what_is_no_message_is_reported_and_the_next_one_read(value: object, msgid: int) -> None:
    decoder = Decoder(trusted=False)
    stream = msgpack.packb(value) + pack_request(9, "ping", {})
    with pytest.raises(InvalidRequestError) as caught:
        list(decoder.feed(stream))
    assert caught.value.msgid == msgid
    assert list(decoder.feed(b"")) == [Request(9, "ping", {})]


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",  # never used in MessagePack
        b"\x81\x90\x01",  # an array as the key of a map
        b"\xa2\xff\xfe",  # not UTF-8
        b"\x91" * 5000 + b"\x01",  # nested too deeply
        b"\xdd\x7f\xff\xff\xff",  # an array of two thousand million elements
        b"\xdf\x00\x01\x00\x00",  # a map of 65,536 elements
    ],
)
def test_a_stream_that_cannot_go_on(data: bytes) -> None:
    decoder = Decoder(trusted=False)
    with pytest.raises(ProtocolError) as caught:
        list(decoder.feed(data))
    assert not isinstance(caught.value, InvalidRequestError)


@pytest.mark.parametrize(
    "start",
    [
        b"\xc6\x7f\xff\xff\xff",  # two gigabytes of binary data
        b"\xdb\x00\x20\x00\x00",  # two megabytes of text
        b"\xc9\x7f\xff\xff\xff\x05",  # two gigabytes of an extension
    ],
)
def test_a_request_that_is_too_long_ends_at_the_limit(start: bytes) -> None:
    decoder = Decoder(trusted=False)
    n_fed = 0

    def feed_on() -> None:
        nonlocal n_fed
        assert list(decoder.feed(start)) == []
        while n_fed < 4 * REQUEST_LEN_MAX:
            assert list(decoder.feed(b"x" * 65536)) == []
            n_fed += 65536

    with pytest.raises(ProtocolError, match=r"longer than|beyond the limits"):
        feed_on()
    assert n_fed <= REQUEST_LEN_MAX


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_any_bytes_are_messages_or_a_protocol_error(chunks: list[bytes]) -> None:
    decoder = Decoder(trusted=False)
    with contextlib.suppress(ProtocolError):
        for chunk in chunks:
            for message in decoder.feed(chunk):
                assert isinstance(message, (Request, Response, Notification))


@pytest.mark.parametrize(
    "name", ["ConfigError", "NotFoundError", "ExistsError", "SocketError", "UplinkError"]
)
def test_errors_keep_their_class(name: str) -> None:
    cls = getattr(errors, name)
    error = error_from_map(error_to_map(cls("what", hint="do")))
    assert type(error) is cls
    assert (error.message, error.hint, error.code) == ("what", "do", cls.code)


def test_unknown_error_codes_are_control_errors() -> None:
    error = error_from_map({"code": "from-the-future", "message": "what"})
    assert isinstance(error, ControlError)
    assert error.code == "from-the-future"
    assert isinstance(error_from_map({}), VswitchError)
    assert isinstance(error_from_map({"code": "invalid-params"}), ConfigError)


def test_the_usual_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, uid = Path("/run/vswitch/control.sock"), os.geteuid() or 77
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_socket_paths(0) == [system]
    os.chown(tmp_path, uid, -1)
    tmp_path.chmod(0o700)
    own, temporary = tmp_path / "vswitch/control.sock", Path(f"/tmp/vswitch-{uid}/control.sock")
    assert default_socket_paths(uid)[0] == own
    assert default_socket_paths(uid)[-2:] == [temporary, system]
    # What is another's, or what others may change, is no runtime directory of this user.
    tmp_path.chmod(0o770)
    assert own not in default_socket_paths(uid)
    tmp_path.chmod(0o700)
    assert own in default_socket_paths(uid)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert own not in default_socket_paths(uid)
    assert default_socket_paths(2**31 - 5) == [
        Path(f"/tmp/vswitch-{2**31 - 5}/control.sock"),
        system,
    ]
