"""MessagePack-RPC as the control socket speaks it; shared by server and client.

Requests are `[0, msgid, method, params]`, responses `[1, msgid, error, result]`, notifications
`[2, method, params]`, one after the other without any framing around them. `params` is empty or
has one map with named parameters. docs/control-protocol.md has the whole of it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from vswitch.errors import (
    ConfigError,
    ExistsError,
    NotFoundError,
    ProtocolError,
    SocketError,
    UplinkError,
    VswitchError,
    shorten,
)

PROTOCOL_VERSION = 1
"""Raised when a change breaks existing clients; added methods, keys and events do not count."""

SYSTEM_DIRECTORY = Path("/run/vswitch")
"""Of the control socket of a switch that root runs, or the system."""

REQUEST, RESPONSE, NOTIFICATION = 0, 1, 2

REQUEST_LEN_MAX = 1 << 15
"""Bytes of a request; a longer one costs its sender the connection."""
RESPONSE_LEN_MAX = 256 << 20
"""Bytes of a response that a client accepts: a full FDB of a million entries has some 60 MB if it
is not asked for in pages."""

FEED_LEN_MAX = 1 << 16
"""Bytes that a Decoder takes at a time."""

# A declared length is allocated before its elements arrive, at each of up to 1024 levels, so a
# request may not declare much.
REQUEST_ELEMENTS_MAX = 256


class ControlError(VswitchError):
    """The control connection itself failed, or the switch cannot be asked; see `code`.

    `unreachable`: nobody answers on the socket. `disconnected`: the switch went away. `timeout`: no
    answer in time. `unsupported-version`, `permission-denied`, `busy`, `unknown-method`,
    `invalid-params`, `invalid-request` and `internal` come from the switch.
    """

    code = "internal"


class Request(NamedTuple):
    """A call; `params` as they came, not looked into yet."""

    msgid: int
    method: str
    params: dict[str, Any]


class Response(NamedTuple):
    """An answer: `error` is None or a map with code, message and hint.

    `msgid` is None for an error that belongs to the connection and not to a request.
    """

    msgid: int | None
    error: dict[str, Any] | None
    result: Any


class Notification(NamedTuple):
    """Sent by the switch on its own: `event` and `lost`."""

    method: str
    params: dict[str, Any]


Message = Request | Response | Notification


class InvalidRequestError(ProtocolError):
    """A whole message that is none of ours; answerable, and no reason to end, if it has a msgid."""

    code = "invalid-request"

    def __init__(self, message: str, *, hint: str = "", msgid: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.msgid = msgid


def default_socket_paths(uid: int | None = None) -> list[Path]:
    """Where a switch of this user may have its control socket, unless told otherwise; best first.

    A switch takes the first, a client goes through all of them. Of a user it is in
    `$XDG_RUNTIME_DIR/vswitch` or `/run/user/UID/vswitch`, else, as in a shell that is no session of
    its own, in `/tmp/vswitch-UID`. The last one is that of a switch that root or the system runs.
    """
    uid = os.geteuid() if uid is None else uid
    found = []
    if uid:
        runtime = [Path(os.environ.get("XDG_RUNTIME_DIR", "")), Path(f"/run/user/{uid}")]
        # `su` may leave us the directory of somebody else.
        found = [one / "vswitch" for one in runtime if one.is_absolute() and is_own(one, uid)]
        found.append(temporary_directory(uid))
    return [one / "control.sock" for one in dict.fromkeys([*found, SYSTEM_DIRECTORY])]


def temporary_directory(uid: int) -> Path:
    """Where a user without a runtime directory has the control socket.

    Anybody can make it first: it has to be looked at (`is_own`) before it is used.
    """
    return Path(f"/tmp/vswitch-{uid}")  # noqa: S108


def is_own(directory: Path, uid: int) -> bool:
    """Whether it is a directory, no link to one, of this user, and nobody else may write to it."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == uid and not found.st_mode & 0o022


def pack_request(msgid: int, method: str, params: Mapping[str, Any]) -> bytes:
    """A request as bytes."""
    return pack([REQUEST, msgid, method, [dict(params)] if params else []])


def pack_response(msgid: int | None, error: VswitchError | None, result: object = None) -> bytes:
    """A response as bytes; `result` counts only without `error`."""
    if error is not None:
        return pack([RESPONSE, msgid, error_to_map(error), None])
    return pack([RESPONSE, msgid, None, result])


class Packed(NamedTuple):
    """A value that is MessagePack already, in pieces: a long one is not made in one go."""

    parts: list[bytes]

    @classmethod
    def array(cls, n_elements: int, parts: list[bytes]) -> Packed:
        """An array of so many elements, which are in `parts`."""
        return cls([msgpack.Packer().pack_array_header(n_elements), *parts])

    @classmethod
    def map(cls, members: Mapping[str, object]) -> Packed:
        """A map; members may themselves be Packed."""
        parts = [msgpack.Packer().pack_map_header(len(members))]
        for key, value in members.items():
            parts.append(pack(key))
            parts += value.parts if isinstance(value, Packed) else [pack(value)]
        return cls(parts)


def pack_packed_response(msgid: int, result: Packed) -> list[bytes]:
    """A response as bytes, in pieces."""
    return [pack([RESPONSE, msgid, None, None])[:-1], *result.parts]  # without the last nil


def pack_notification(method: str, params: Mapping[str, Any]) -> bytes:
    """A notification as bytes."""
    return pack([NOTIFICATION, method, [dict(params)]])


def pack(value: object) -> bytes:
    """A value as MessagePack."""
    packed = msgpack.packb(value, use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


class Decoder:
    """Cuts a byte stream into messages; holds no more than one message of the allowed length."""

    def __init__(self, *, trusted: bool) -> None:
        """`trusted` is how a client sees its switch; a switch trusts nobody."""
        limit = RESPONSE_LEN_MAX if trusted else REQUEST_LEN_MAX
        elements = limit if trusted else REQUEST_ELEMENTS_MAX
        self._limit = limit
        # The unpacker builds values as their bytes come and forgets these, so the size of its
        # buffer bounds no message: what was fed since the message began does.
        self._fed = 0
        self.begun = 0
        """Where in the stream the message begins that is not complete yet, in bytes."""
        self._unpacker = msgpack.Unpacker(
            raw=False,
            strict_map_key=False,
            max_buffer_size=limit + FEED_LEN_MAX,
            max_array_len=elements,
            max_map_len=elements,
        )

    @property
    def pending(self) -> bool:
        """Whether a message has begun and is not complete."""
        return self._fed > self.begun

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take in up to FEED_LEN_MAX bytes and yield the messages they complete.

        Raises ProtocolError for what is no MessagePack or too long: the stream cannot go on. Raises
        InvalidRequestError for MessagePack that is no message: call again with b"" to go on.
        """
        if data:
            self._unpacker.feed(data)
            self._fed += len(data)
        while True:
            try:
                value = next(self._unpacker)
            except StopIteration:
                self._check_len(self._fed)
                return
            except (ValueError, RecursionError, TypeError) as exc:
                # All that msgpack raises for bad input; a bad UTF-8 sequence is one of them.
                detail = str(exc) or type(exc).__name__
                raise ProtocolError(
                    f"the stream is not MessagePack or beyond the limits: {detail}",
                    hint="docs/control-protocol.md says what the control socket understands",
                ) from exc
            end = self._unpacker.tell()
            self._check_len(end)
            self.begun = end
            yield _message(value)

    def _check_len(self, end: int) -> None:
        if end - self.begun > self._limit:
            raise ProtocolError(
                f"a message is longer than the {self._limit} bytes allowed",
                hint="send shorter messages",
            )


def _message(value: object) -> Message:
    match value:
        case [0, int() as msgid, str() as method, params] if _is_msgid(msgid):
            return Request(msgid, method, _params(params, msgid))
        case [1, None | int() as msgid, None | dict() as error, result]:
            return Response(msgid, error, result)
        case [2, str() as method, params]:
            return Notification(method, _params(params, None))
        case [0, int() as msgid, *_] if _is_msgid(msgid):
            raise InvalidRequestError(
                "a request is [0, msgid, method, params] with the method's name as text",
                msgid=msgid,
            )
        case _:
            raise InvalidRequestError(
                f"a message is an array that starts with 0, 1 or 2, not {shorten(value)}",
                hint="docs/control-protocol.md has an example",
            )


def _is_msgid(value: int) -> bool:
    return not isinstance(value, bool) and 0 <= value < 2**32


def _params(params: object, msgid: int | None) -> dict[str, Any]:
    match params:
        case []:
            return {}
        case [dict() as named] if all(isinstance(key, str) for key in named):
            return named
        case _:
            raise InvalidRequestError(
                "params is an empty array, or an array with one map of named parameters, "
                f"not {shorten(params)}",
                msgid=msgid,
            )


_CLASSES: dict[str, type[VswitchError]] = {
    cls.code: cls
    for cls in (
        ConfigError,
        NotFoundError,
        ExistsError,
        SocketError,
        UplinkError,
        ProtocolError,
        VswitchError,
    )
} | {"invalid-params": ConfigError, "changed": ConfigError}


def error_to_map(error: VswitchError) -> dict[str, str]:
    """What of an error travels over the socket."""
    return {"code": error.code, "message": error.message, "hint": error.hint}


def error_from_map(error: Mapping[str, Any]) -> VswitchError:
    """The error a switch reported, of the class that its code stands for."""
    code = str(error.get("code", "internal"))
    cls = _CLASSES.get(code, ControlError)
    message = str(error.get("message", "the switch reports an error"))
    return cls(message, hint=str(error.get("hint", "")), code=code)
