"""What a value has to be besides being of its type, in the words that people get to read."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from pydantic import ValidationInfo
from pydantic_core import PydanticCustomError

from vswitch.bounds import SUN_PATH_LEN_MAX
from vswitch.config import feature_names
from vswitch.config.keys import OFFLOADS, OffloadSetting
from vswitch.host.accounts import find_gid, find_uid

INTERFACE_NAME_LEN_MAX = 15
"""Bytes of an interface's name: IFNAMSIZ is 16 with the terminating NUL."""
CPU_MAX = 1023

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_OCTAL = re.compile(r"0?[0-7]{3}")
MAC = r"[0-9A-Fa-f]{2}(?:[:-][0-9A-Fa-f]{2}){5}"
"""A pattern of addresses as people may write them."""
VLAN_MAX = 4094
_STATIC_MAC = re.compile(rf"({MAC})(?: vlan (\d{{1,4}}))?")


def bad(reason: str) -> PydanticCustomError:
    """What a check raises; `reason` goes on after the name of the key."""
    # A brace in the text would be taken for a placeholder.
    return PydanticCustomError("vswitch", reason.replace("{", "(").replace("}", ")"))


def check_name(value: str) -> str:
    """A port's, uplink's or switch's name: 1 to 32 of letters, digits, `_`, `.` and `-`."""
    if not value:
        raise bad("must not be empty")
    if len(value) > 32:
        raise bad(f"has {len(value)} characters, 32 are allowed")
    if not _NAME.fullmatch(value):
        raise bad("may contain only letters, digits, '_', '.' and '-'")
    return value


def check_interface_name(value: str) -> str:
    """A network interface's name as the kernel takes it, without its `%d` patterns."""
    check_name(value)
    if len(value) > INTERFACE_NAME_LEN_MAX:
        raise bad(
            f"has {len(value)} characters, an interface name has at most {INTERFACE_NAME_LEN_MAX}"
        )
    if value in (".", ".."):
        raise bad("is not a possible interface name")
    return value


def socket_path(value: object, info: ValidationInfo) -> Path:
    """Resolve a socket path against the context's `base` directory and check its length."""
    if not isinstance(value, (str, Path)):
        raise bad("must be a path in quotes")
    text = str(value)
    if not text:
        raise bad("must not be empty")
    if "\0" in text:
        raise bad("contains a NUL byte")
    path = Path(text)
    if not path.is_absolute():
        base = (info.context or {}).get("base")
        if base is None:
            raise bad("must be an absolute path")
        path = Path(base) / path
    try:
        len_bytes = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise bad("contains characters that a path cannot have") from None
    if len_bytes > SUN_PATH_LEN_MAX:
        whole = "" if text == str(path) else f" as '{path}'"
        raise bad(
            f"is {len_bytes} bytes long{whole}, a Unix socket path has at most {SUN_PATH_LEN_MAX}"
        )
    return path


def check_permissions(value: str) -> str:
    """An octal mode such as "0660"; no more than the nine permission bits."""
    if not _OCTAL.fullmatch(value):
        raise bad('must be three octal digits in quotes such as "0660"')
    return value


def check_owner(value: str) -> str:
    """A user of this machine, by name or number."""
    if find_uid(value) is None:
        raise bad("no such user on this machine")
    return value


def check_group(value: str) -> str:
    """A group of this machine, by name or number."""
    if find_gid(value) is None:
        raise bad("no such group on this machine")
    return value


def check_cpu(value: int) -> int:
    """A number that a CPU can have."""
    if not 0 <= value <= CPU_MAX:
        raise bad(f"must be a CPU number from 0 to {CPU_MAX}")
    return value


def check_offloads(value: object) -> OffloadSetting:
    """All, none, or a list of names in which nothing is missing that another rests on."""
    names = ", ".join(f'"{name}"' for name in OFFLOADS)
    if isinstance(value, bool):
        return value
    if not isinstance(value, list):
        raise bad(f"must be true, false or a list of {names}")
    for name in value:
        if name not in OFFLOADS:
            raise bad(f"names no offload with {name!r}; there are {names}")
    if len(set(value)) != len(value):
        raise bad("names an offload twice")
    if value and "csum" not in value:
        raise bad(f'must have "csum" as well: {value[0]} is not possible without')
    return value


def spelled_mac(text: str) -> str:
    """An address as everybody here writes it, from one that MAC matches."""
    return text.lower().replace("-", ":")


def why_no_station(mac: str) -> str | None:
    """Why nothing can be behind a port with this address; None: something can."""
    if int(mac[:2], 16) & 1:
        return "is a group address, which is flooded and belongs to no port"
    return "is no address of a station" if mac == "00:00:00:00:00:00" else None


def static_mac(text: str) -> tuple[str, int]:
    """Address and VLAN of an element of `static_macs`; raises if it is none."""
    found = _STATIC_MAC.fullmatch(text)
    if found is None:
        raise bad(f'has {text!r}: write "52:54:00:12:34:56" or "52:54:00:12:34:56 vlan 10"')
    mac, vlan = spelled_mac(found[1]), int(found[2] or 0)
    if (why := why_no_station(mac)) is not None:
        raise bad(f"has {mac}, which {why}")
    if vlan > VLAN_MAX:
        raise bad(f"has VLAN {vlan}, which is above {VLAN_MAX}")
    return mac, vlan


def written_mac(mac: str, vlan: int) -> str:
    """An element of `static_macs`, as it is written."""
    return f"{mac} vlan {vlan}" if vlan else mac


def check_static_macs(value: list[str]) -> list[str]:
    """Addresses in one spelling, none of them twice."""
    found = [written_mac(*static_mac(text)) for text in value]
    if len(set(found)) != len(found):
        raise bad("names an address twice")
    return found


def check_features(words: object, info: ValidationInfo) -> list[str]:
    """Names of features, behind a `-` or not, that can be withheld, or offered, as they say."""
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise bad('must be a list of features such as "-CTRL_VQ"')
    for word in words:
        name = word.removeprefix("-")
        known = (*feature_names.OFFERED, *feature_names.NEVER_OFFERED)
        if name not in known:
            close = difflib.get_close_matches(name.upper(), known, n=1)
            raise bad(
                f"names no feature with {word!r}"
                + (f" (did you mean {word[: -len(name)] + close[0]!r}?)" if close else "")
                + "; docs/compatibility.md has them all"
            )
        if word == name and name in feature_names.NEVER_OFFERED:
            raise bad(f"{name} is not offered by any port")
        if word == name and name in feature_names.OF_OFFLOADS:
            raise bad(f"{name} is for `offloads` to offer; only -{name} can stand here")
    names = [word.removeprefix("-") for word in words]
    if len(set(names)) != len(names):
        raise bad("names a feature twice")
    gone = feature_names.withheld(info.data.get("frontend"), words)
    for name in gone.intersection(words):
        raise bad(f"{name} rests on {feature_names.missing(name, gone)}, which is not offered")
    return words
