"""This host as a station on the lab network: its address on the TAP interface, its pings."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path

from vswitch.lab import requirements
from vswitch.lab.errors import LabError

_CAP_NET_ADMIN = 12
_ECHO_REQUEST = 8
_ECHO_REPLY = 0


def tap_obstacle() -> str | None:
    """Why this process cannot use a TAP interface, or None if it seems it can."""
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun here"
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    if found is None or not int(found[1], 16) >> _CAP_NET_ADMIN & 1:
        return "a TAP interface takes root (CAP_NET_ADMIN)"
    if shutil.which("ip") is None:
        return f"`ip` is not installed ({requirements.installing('iproute2')})"
    return None


def free_interface(wanted: str) -> str:
    """`wanted`, or if an interface has that name, the same with another number at its end."""
    taken = {name for _, name in socket.if_nameindex()}
    stem = wanted.rstrip("0123456789")[:12]
    names = [wanted, *(f"{stem}{number}" for number in range(1000))]
    return next(name for name in names if name not in taken)


def free_network() -> ipaddress.IPv4Network:
    """A /24 that overlaps none of this host's addresses and routes, the default route aside."""
    used: list[ipaddress.IPv4Network] = []
    if shutil.which("ip"):
        routes = json.loads(ip("-json", "-4", "route", "show", "table", "all") or "[]")
        for route in routes:
            if route["dst"] != "default":
                used.append(ipaddress.IPv4Network(route["dst"], strict=False))
    for third in range(256):
        network = ipaddress.IPv4Network((f"10.77.{third}.0", 24))
        if not any(network.overlaps(other) for other in used):
            return network
    raise LabError("all of 10.77.0.0/16 is in use on this host; no network left for the guests")


def ip(*arguments: str) -> str:
    """Run `ip` (iproute2) and return what it printed; raises LabError with what it complained."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise LabError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


def ping_ms(address: str, timeout_s: float = 3.0) -> float | None:
    """Round trip of one ICMP echo request in milliseconds, None without an answer.

    Takes CAP_NET_RAW, so that no `ping` program is needed. A lost request is repeated.
    """
    ident, deadline = os.getpid() & 0xFFFF, time.monotonic() + timeout_s
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        sequence = 0
        while time.monotonic() < deadline:
            sequence += 1
            sent = time.monotonic()
            try:
                raw.sendto(_echo_request(ident, sequence), (address, 0))
            except OSError:
                return None
            until = min(deadline, sent + 1.0)
            while select.select([raw], [], [], max(0.0, until - time.monotonic()))[0]:
                packet, (source, _) = raw.recvfrom(2048)
                icmp = packet[(packet[0] & 15) * 4 :]
                if source != address or icmp[:1] != bytes([_ECHO_REPLY]):
                    continue
                if struct.unpack_from("!HH", icmp, 4) == (ident, sequence):
                    return (time.monotonic() - sent) * 1000
    return None


def _echo_request(ident: int, sequence: int) -> bytes:
    body = struct.pack("!BBHHH", _ECHO_REQUEST, 0, 0, ident, sequence) + b"vswitch " * 7
    total = sum(struct.unpack(f"!{len(body) // 2}H", body))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return body[:2] + struct.pack("!H", checksum) + body[4:]
