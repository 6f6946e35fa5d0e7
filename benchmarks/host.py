"""Frames between a guest and this host: vswitch's TAP beside uplinks of OVS-DPDK."""

from __future__ import annotations

import socket
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.generators import WARM_UP, SoftwareGenerator
from benchmarks.guests import (
    MACS,
    QUEUE_SIZE,
    RX_BUF_LEN,
    TSO_BUF_LEN,
    TSO_RX_QUEUE_SIZE,
    ethernet,
    frames_under_way,
    guest,
    tso_frame,
)
from benchmarks.interfaces import interface_up, ip, remove_interface
from benchmarks.native.host_load import from_host
from benchmarks.ovs import OvsDpdk
from benchmarks.samples import Case, Reading
from vswitch.lab.guest.packets import BROADCAST, parse_mac
from vswitch.lab.load.load import Flow, Load
from vswitch.lab.qemu.process import Deadline

HOST_MAC = "52:54:00:00:00:99"
_FIRST_FRAME_S = 5.0
_AGAIN_S = 0.05
_VNET_HDR_LEN = 10
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_QDISC_BYPASS = 263, 15, 20
_ETH_P_ALL = 3


class HostGenerator(SoftwareGenerator):
    """A software guest on one port, and the host's end of the switch's uplink.

    To the host, what counts is what the kernel has received on the interface, and nobody takes it
    from there. From the host, frames come from a packet socket in this thread, several at a time.
    """

    name = "host"
    title = "a software guest and the host"
    kinds = frozenset({"tap-out", "tap-in"})

    def connect(self) -> None:
        interface_up(self.switch.host_interface)

    def arrange(self, case: Case) -> None:
        self.close()
        self._guests = (guest(MACS[0], case, case.frame_len),)
        self.switch.connect(self._guests)
        (one,) = self._guests
        host = parse_mac(HOST_MAC)
        receiveq = one.receiveqs[0]
        # Both ends are known from the first frame on.
        one.send([ethernet(BROADCAST, one.mac, 64)])
        deadline = Deadline(_FIRST_FRAME_S)
        with self._socket() as sender:
            # A switch may take a moment until it sends to a guest that has just come.
            while True:
                sender.send(ethernet(BROADCAST, host, 64))
                if one.recv(1, _AGAIN_S):
                    break
                if deadline.passed():
                    raise BenchmarkError(f"no frame comes from {self.switch.host_interface}")
        make = tso_frame if case.whole else lambda dst, src: (
            ethernet(dst, src, case.frame_len), bytes(_VNET_HDR_LEN)
        )  # fmt: skip
        if case.kind == "tap-out":
            frame, header = make(host, one.mac)
            self._flows = [Flow(one.transmitqs[0], None, [frame], header=header)]
        else:
            frame, header = make(one.mac, host)
            self._flows = [Flow(None, receiveq, [frame])]
            self._frame = header[:_VNET_HDR_LEN] + frame

    def measure(self, case: Case, seconds: float) -> Reading:
        if case.kind == "tap-out":
            load = Load(self._flows)
            load.run(seconds * WARM_UP, settle_s=1.0)
            before = self._received()
            (result,) = load.run(seconds)
            return Reading((self._received() - before) / result.seconds)
        (flow,) = self._flows
        buffers = (TSO_BUF_LEN, TSO_RX_QUEUE_SIZE) if case.whole else (RX_BUF_LEN, QUEUE_SIZE)
        window = frames_under_way(case.frame_len, *buffers)
        with self._socket(vnet_header=True) as sender:
            from_host(flow, sender.fileno(), self._frame, seconds * WARM_UP, window)
            rate, _, _ = from_host(flow, sender.fileno(), self._frame, seconds, window)
        return Reading(rate)

    def _received(self) -> int:
        """Frames that the kernel has received on the interface so far."""
        folder = Path("/sys/class/net", self.switch.host_interface, "statistics")
        return int((folder / "rx_packets").read_text())

    def _socket(self, *, vnet_header: bool = False) -> socket.socket:
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            packets.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
            packets.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, int(vnet_header))
            packets.bind((self.switch.host_interface, _ETH_P_ALL))
        except BaseException:
            packets.close()
            raise
        return packets


class HostBesideAfPacket(HostGenerator):
    """The same again: only one OVS with a userspace datapath can run at a time."""

    name = "host-afp"
    title = "a software guest and the host, beside AF_PACKET"


class OvsTap(OvsDpdk):
    """OVS-DPDK with a TAP, which its main thread serves."""

    name = "ovs-tap"
    title = "OVS-DPDK, TAP"
    kinds = frozenset({"tap-out", "tap-in"})
    host_interface = "vsb-ovs"

    @classmethod
    def can(cls, case: Case) -> bool:
        return super().can(case) and case.generator == HostGenerator.name

    def more_ports(self) -> list[str]:
        name = self.host_interface
        return ["--", "add-port", self.bridge, name, "--", "set", "Interface", name, "type=tap"]

    def close(self) -> None:
        super().close()
        # OVS with DPDK makes its TAPs stay.
        remove_interface(self.host_interface)


class OvsAfPacket(OvsDpdk):
    """OVS-DPDK with DPDK's AF_PACKET port on one end of a veth pair, polled as any DPDK port."""

    name = "ovs-afp"
    title = "OVS-DPDK, AF_PACKET"
    kinds = frozenset({"tap-out", "tap-in"})
    host_interface = "vsb-afp1"
    _near_end = "vsb-afp0"

    @classmethod
    def can(cls, case: Case) -> bool:
        """Not with whole segments: this port does not take them."""
        return super().can(case) and case.generator == HostBesideAfPacket.name and not case.whole

    def start(self) -> None:
        ip("link", "add", self._near_end, "type", "veth", "peer", "name", self.host_interface)
        interface_up(self._near_end)
        interface_up(self.host_interface)
        super().start()

    def more_ports(self) -> list[str]:
        port = ["--", "add-port", self.bridge, "afp", "--", "set", "Interface", "afp", "type=dpdk"]
        return [*port, f"options:dpdk-devargs=eth_af_packet_vsb,iface={self._near_end}"]

    def close(self) -> None:
        super().close()
        remove_interface(self._near_end)
