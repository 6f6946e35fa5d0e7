"""TAP interfaces, in a network namespace of their own: set-up, and every way it can fail."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.frames import ETHERTYPE_TEST
from tests.support.otheruser import NOBODY, as_nobody
from vswitch import ethertypes
from vswitch.errors import UplinkError
from vswitch.host import tap
from vswitch.host.tap import VNET_HDR_LEN, Tap, open_tap

pytestmark = pytest.mark.root("makes network namespaces")

DEADLINE_S = 60.0

CLONE_NEWNET = 0x40000000


def unshare_network() -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")


def setns(fd: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """An empty network namespace for this thread, and for what it starts."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    unshare_network()
    try:
        yield
    finally:
        setns(before)
        os.close(before)


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def failure(name: str, **options: object) -> UplinkError:
    with pytest.raises(UplinkError) as caught:
        open_tap(name, **options)  # type: ignore[arg-type]
    assert caught.value.message.startswith(f'uplink "{name}": ')
    assert caught.value.hint
    return caught.value


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_new_tap_is_set_up_and_goes_away() -> None:
    before = open_fds()
    with open_tap("t0", mtu=9000) as opened:
        assert isinstance(opened, Tap)
        assert (opened.name, opened.mtu, opened.created, opened.warning) == ("t0", 9000, True, None)
        assert opened.ifindex == socket.if_nametoindex("t0")
        link = ip("link", "show", "t0")
        assert opened.mac in link
        assert "mtu 9000" in link
        assert ",UP" in link
        assert not os.get_blocking(opened.fd)
        assert not os.get_inheritable(opened.fd)
    opened.close()
    with pytest.raises(OSError, match="no interface with this name"):
        socket.if_nametoindex("t0")
    assert open_fds() == before


def test_frames_cross_behind_a_header_of_twelve_bytes() -> None:
    with open_tap("t0") as opened:
        frame = b"\xff" * 6 + bytes.fromhex("020000000001") + ETHERTYPE_TEST + bytes(range(50))
        with socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertypes.EXPERIMENT)
        ) as raw:
            raw.bind(("t0", ethertypes.EXPERIMENT))
            raw.settimeout(DEADLINE_S)
            os.write(opened.fd, bytes(VNET_HDR_LEN) + frame)
            assert raw.recv(2000) == frame
            raw.send(frame[::-1])
        poller = select.poll()
        poller.register(opened.fd, select.POLLIN)
        received = b""
        while not received.endswith(frame[::-1]):  # the kernel's own IPv6 frames come as well
            assert poller.poll(1000 * DEADLINE_S), "the frame did not arrive"
            received = os.read(opened.fd, 2000)
        assert len(received) == VNET_HDR_LEN + len(frame)


def test_offloads_are_passed_on() -> None:
    TUN_F_CSUM = 0x01
    with open_tap("t0", offloads=TUN_F_CSUM) as opened:
        assert opened.offloads == TUN_F_CSUM
    assert "offloads 0x8000 are not possible" in failure("t0", offloads=0x8000).message


def test_an_older_kernel_knows_no_uso(monkeypatch: pytest.MonkeyPatch) -> None:
    ioctl = fcntl.ioctl

    def older(fd: int, request: int, argument: Any) -> object:
        if request == tap.TUNSETOFFLOAD and argument & 0x60:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return ioctl(fd, request, argument)

    monkeypatch.setattr(fcntl, "ioctl", older)
    with open_tap("t0", offloads=0x7F) as opened:
        assert opened.offloads == 0x1F


def test_it_joins_a_bridge() -> None:
    ip("link", "add", "br0", "type", "bridge")
    ip("link", "add", "br1", "type", "bridge")
    with open_tap("t0", bridge="br0"):
        assert "master br0" in ip("link", "show", "t0")
    ip("tuntap", "add", "dev", "p0", "mode", "tap")
    ip("link", "set", "p0", "master", "br0")
    with open_tap("p0", bridge="br0") as opened:
        assert not opened.created
    assert "belongs to another bridge" in failure("p0", bridge="br1").message
    assert 'there is no bridge "nope"' in failure("t0", bridge="nope").message
    assert '"p0" exists and is not a Linux bridge' in failure("t0", bridge="p0").message


def test_a_failure_leaves_neither_interface_nor_descriptor() -> None:
    before = open_fds()
    failure("t0", bridge="nope")
    failure("t0", mtu=65535)
    assert open_fds() == before
    assert "t0" not in ip("link")


def test_an_interface_that_is_no_tap() -> None:
    ip("link", "add", "v0", "type", "veth", "peer", "name", "v1")
    ip("tuntap", "add", "dev", "tun0", "mode", "tun")
    assert 'exists and is not a TAP but of kind "veth"' in failure("v0").message
    assert "exists and is not a TAP but a layer 3 TUN" in failure("tun0").message
    assert failure("lo").message.endswith("exists and is not a TAP")
    assert "v0: <BROADCAST" in ip("link", "show", "v0").replace("@v1", "")


def test_a_multi_queue_tap_has_other_properties() -> None:
    ip("tuntap", "add", "dev", "mq0", "mode", "tap", "multi_queue")
    assert "exists with other properties" in failure("mq0").message


def test_an_interface_that_another_process_holds() -> None:
    with open_tap("t0"):
        assert "another process holds the interface" in failure("t0").message


def test_no_rights() -> None:
    text = as_nobody(open_tap, "t0")
    assert f"uid {NOBODY} may not create a TAP (CAP_NET_ADMIN is missing)" in text
    assert "ip tuntap add dev t0 mode tap user $USER" in text
    ip("tuntap", "add", "dev", "p0", "mode", "tap", "user", "1")
    text = as_nobody(open_tap, "p0")
    assert f"the TAP exists and belongs to another user than uid {NOBODY}" in text


def test_a_tap_of_the_user_needs_no_rights() -> None:
    ip("link", "add", "br0", "type", "bridge")
    ip("tuntap", "add", "dev", "p0", "mode", "tap", "user", str(NOBODY))
    ip("link", "set", "p0", "master", "br0", "up", "mtu", "1400")
    text = as_nobody(open_tap, "p0", mtu=1400, bridge="br0")
    assert text.startswith("Tap(fd=")
    assert "created=False, offloads=0, warning=None" in text
    text = as_nobody(open_tap, "p0", mtu=1500)
    assert 'uplink "p0": cannot set mtu 1500' in text
    assert "ip link set p0 mtu 1500" in text


def test_a_tap_of_the_user_that_is_down_is_a_warning() -> None:
    ip("tuntap", "add", "dev", "p0", "mode", "tap", "user", str(NOBODY))
    text = as_nobody(open_tap, "p0")
    assert "the interface is down; bring it up as root: ip link set p0 up" in text
    ip("link", "add", "br0", "type", "bridge")
    text = as_nobody(open_tap, "p0", bridge="br0")
    assert 'cannot join bridge "br0": not permitted' in text


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "TUN_DEVICE", tmp_path / "none")
    error = failure("t0")
    assert f"cannot open {tmp_path}/none: {os.strerror(errno.ENOENT)}" in error.message
    assert "modprobe tun" in error.hint
