"""TAP interfaces: opening one, setting it up and joining it to a bridge.

All of it by ioctl: a netlink library that brings its own asyncio loop cannot be used from a
coroutine, and the few requests made here are stable kernel ABI (linux/if_tun.h, linux/sockios.h).
The requests act in the network namespace of the calling thread.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from vswitch.errors import UplinkError

TUN_DEVICE = Path("/dev/net/tun")

VNET_HDR_LEN = 12
"""Bytes before each frame: virtio_net_hdr_v1, with num_buffers (VIRTIO 1.2 section 5.1.6)."""

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUN_F_USO = 0x60
"""TUN_F_USO4 and TUN_F_USO6, which kernels before 6.2 do not know."""
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCGIFMTU = 0x8921
SIOCSIFMTU = 0x8922
SIOCGIFHWADDR = 0x8927
SIOCETHTOOL = 0x8946
SIOCBRADDIF = 0x89A2
SIOCDEVPRIVATE = 0x89F0
ETHTOOL_GDRVINFO = 0x3
BRCTL_GET_PORT_LIST = 7
BRIDGE_PORTS_MAX = 1024

IFF_UP = 0x1

_IFREQ_LEN = 40
_DRVINFO_LEN = 196


@dataclass
class Tap:
    """An open TAP interface; whoever holds it closes it.

    `fd` is non-blocking. `mtu` is in bytes, `mac` is that of the host's side, `warning` what a user
    should know although the interface is open. `created` says that closing removes the interface.
    `offloads` has the TUN_F_* bits that the kernel granted.
    """

    fd: int
    name: str
    ifindex: int
    mtu: int
    mac: str
    created: bool
    offloads: int
    warning: str | None = None

    def close(self) -> None:
        """Close the descriptor, once; an interface that did not exist before then goes away."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def open_tap(
    name: str, *, mtu: int | None = None, bridge: str | None = None, offloads: int = 0
) -> Tap:
    """Open the TAP interface `name`, creating it if need be, and bring it up.

    Frames on the descriptor follow a virtio_net_hdr of VNET_HDR_LEN bytes. `offloads` has the
    TUN_F_* bits of what may be left to us in frames from the host (TUNSETOFFLOAD), USO only where
    the kernel knows it. What is already as it should be is left alone, so that a persistent TAP
    that belongs to the user needs no privilege. Raises UplinkError.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        existed = _check_kind(control, name)
        fd = _attach(name, existed)
        try:
            try:
                fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", VNET_HDR_LEN))
                offloads = _set_offloads(fd, offloads)
            except OSError as exc:
                raise UplinkError(
                    f'uplink "{name}": offloads {offloads:#x} are not possible: {exc.strerror}',
                    hint="a newer kernel may know them",
                ) from exc
            if mtu is not None:
                _set_mtu(control, name, mtu)
            if bridge is not None:
                _join_bridge(control, name, bridge)
            warning = _bring_up(control, name)
            return Tap(
                fd=fd,
                name=name,
                ifindex=socket.if_nametoindex(name),
                mtu=_get_int(control, name, SIOCGIFMTU),
                mac=_mac(control, name),
                created=not existed,
                offloads=offloads,
                warning=warning,
            )
        except OSError as exc:
            os.close(fd)
            raise UplinkError(f'uplink "{name}": {exc.strerror}') from exc
        except BaseException:
            os.close(fd)
            raise


def link_state(name: str) -> tuple[bool, int] | None:
    """Whether an interface is up and its MTU in bytes, as they are now; None if it is gone."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        try:
            flags = struct.unpack("=H", _ioctl(control, name, SIOCGIFFLAGS, b"\0\0")[:2])[0]
            return bool(flags & IFF_UP), _get_int(control, name, SIOCGIFMTU)
        except OSError:
            return None


def _check_kind(control: socket.socket, name: str) -> bool:
    """Whether the interface exists; UplinkError if it does and is no TAP."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    info = array.array("B", struct.pack("=I", ETHTOOL_GDRVINFO).ljust(_DRVINFO_LEN, b"\0"))
    request = struct.pack("16sQ", name.encode(), info.buffer_info()[0]).ljust(_IFREQ_LEN, b"\0")
    driver, bus = "", ""
    with contextlib.suppress(OSError):
        fcntl.ioctl(control, SIOCETHTOOL, request)
        driver, bus = (_text(info.tobytes()[at : at + 32]) for at in (4, 100))
    if (driver, bus) != ("tun", "tap"):
        what = {"": "", "tun": " but a layer 3 TUN"}.get(driver, f' but of kind "{driver}"')
        raise UplinkError(
            f'uplink "{name}": an interface of this name exists and is not a TAP{what}',
            hint="choose another name; to reach a physical interface, put it and the TAP into a "
            'bridge (bridge = "NAME")',
        )
    return True


def _attach(name: str, existed: bool) -> int:
    try:
        fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        hints = {
            errno.ENOENT: "load the driver (`modprobe tun`); in a container, pass the device in "
            f"(--device {TUN_DEVICE})",
            errno.EACCES: f"give this user rights on {TUN_DEVICE}, or run as root",
        }
        hints[errno.ENODEV] = hints[errno.ENXIO] = hints[errno.ENOENT]
        hints[errno.EPERM] = hints[errno.EACCES]
        raise UplinkError(
            f'uplink "{name}": cannot open {TUN_DEVICE}: {exc.strerror}',
            hint=hints.get(exc.errno or 0, ""),
        ) from exc
    try:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(
            fd, TUNSETIFF, struct.pack("16sH", name.encode(), flags).ljust(_IFREQ_LEN, b"\0")
        )
    except OSError as exc:
        os.close(fd)
        raise _attach_error(name, existed, exc) from exc
    return fd


def _set_offloads(fd: int, offloads: int) -> int:
    """Returns what the kernel took."""
    try:
        fcntl.ioctl(fd, TUNSETOFFLOAD, offloads)
    except OSError:
        if not offloads & TUN_F_USO:
            raise
        offloads &= ~TUN_F_USO
        fcntl.ioctl(fd, TUNSETOFFLOAD, offloads)
    return offloads


def _attach_error(name: str, existed: bool, exc: OSError) -> UplinkError:
    match exc.errno:
        case errno.EPERM | errno.EACCES if existed:
            what = f"the TAP exists and belongs to another user than uid {os.geteuid()}"
            hint = f"`ip link del {name}` and `ip tuntap add dev {name} mode tap user $USER` "
            hint += "as root, or run as root"
        case errno.EPERM | errno.EACCES:
            what = f"uid {os.geteuid()} may not create a TAP (CAP_NET_ADMIN is missing)"
            hint = f"create it once as root, `ip tuntap add dev {name} mode tap user $USER && "
            hint += f"ip link set {name} up`, or run as root"
        case errno.EBUSY:
            what = "another process holds the interface"
            hint = "stop that process or choose another name"
        case errno.EINVAL if existed:
            what = "the TAP exists with other properties (multi_queue?)"
            hint = f"recreate it: `ip link del {name}; ip tuntap add dev {name} mode tap`"
        case _:
            what, hint = f"cannot be opened: {exc.strerror}", ""
    return UplinkError(f'uplink "{name}": {what}', hint=hint)


def _set_mtu(control: socket.socket, name: str, mtu: int) -> None:
    if _get_int(control, name, SIOCGIFMTU) == mtu:
        return
    try:
        _ioctl(control, name, SIOCSIFMTU, struct.pack("=i", mtu))
    except OSError as exc:
        hint = "choose a smaller mtu"
        if exc.errno in (errno.EPERM, errno.EACCES):
            hint = f"as root: `ip link set {name} mtu {mtu}`"
        raise UplinkError(
            f'uplink "{name}": cannot set mtu {mtu}: {exc.strerror}', hint=hint
        ) from exc


def _join_bridge(control: socket.socket, name: str, bridge: str) -> None:
    ifindex = socket.if_nametoindex(name)
    try:
        socket.if_nametoindex(bridge)
    except OSError as exc:
        raise UplinkError(
            f'uplink "{name}": there is no bridge "{bridge}"',
            hint=f"as root: `ip link add {bridge} type bridge && ip link set {bridge} up`",
        ) from exc
    if ifindex in _bridge_ports(control, name, bridge):
        return
    try:
        _ioctl(control, bridge, SIOCBRADDIF, struct.pack("=i", ifindex))
    except OSError as exc:
        match exc.errno:
            case errno.EPERM | errno.EACCES:
                what, hint = "not permitted", f"as root: `ip link set {name} master {bridge}`"
            case errno.EBUSY:
                what = "it belongs to another bridge or bond already"
                hint = f"as root: `ip link set {name} nomaster`"
            case _:
                what, hint = exc.strerror or str(exc), ""
        raise UplinkError(
            f'uplink "{name}": cannot join bridge "{bridge}": {what}', hint=hint
        ) from exc


def _bridge_ports(control: socket.socket, name: str, bridge: str) -> list[int]:
    """The interface indices of a bridge's ports; UplinkError if it is no bridge."""
    ports = array.array("i", [0] * BRIDGE_PORTS_MAX)
    arguments = array.array("L", [BRCTL_GET_PORT_LIST, ports.buffer_info()[0], len(ports), 0])
    request = struct.pack("16sQ", bridge.encode(), arguments.buffer_info()[0])
    try:
        fcntl.ioctl(control, SIOCDEVPRIVATE, request.ljust(_IFREQ_LEN, b"\0"))
    except OSError as exc:
        raise UplinkError(
            f'uplink "{name}": "{bridge}" exists and is not a Linux bridge',
            hint="name an interface made with `ip link add NAME type bridge`",
        ) from exc
    return list(ports)


def _bring_up(control: socket.socket, name: str) -> str | None:
    """Set the interface up; a warning where that takes rights we lack."""
    flags = struct.unpack("=H", _ioctl(control, name, SIOCGIFFLAGS, b"\0\0")[:2])[0]
    if flags & IFF_UP:
        return None
    try:
        _ioctl(control, name, SIOCSIFFLAGS, struct.pack("=H", flags | IFF_UP))
    except PermissionError:
        return f"the interface is down; bring it up as root: ip link set {name} up"
    return None


def _get_int(control: socket.socket, name: str, request: int) -> int:
    return int(struct.unpack("=i", _ioctl(control, name, request, b"\0" * 4)[:4])[0])


def _mac(control: socket.socket, name: str) -> str:
    # A struct sockaddr: two bytes of family, then the address.
    return _ioctl(control, name, SIOCGIFHWADDR, b"\0" * 16)[2:8].hex(":")


def _ioctl(control: socket.socket, name: str, request: int, argument: bytes) -> bytes:
    """An ioctl that takes a struct ifreq; returns the union behind the interface's name."""
    ifreq = struct.pack("16s", name.encode()) + argument
    return fcntl.ioctl(control, request, ifreq.ljust(_IFREQ_LEN, b"\0"))[16:]


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode(errors="replace")
