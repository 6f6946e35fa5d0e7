"""What a guest is made of, and QEMU's command line for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vswitch.lab.qemu.accel import Accelerator, qemu_version
from vswitch.lab.qemu.image import GuestImage

MemoryBackend = Literal["memfd", "shm", "posix-shm", "hugetlb", "hugetlbfs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSettings:
    """What to boot. Sizes of rings are entries, `memory_mib` is MiB."""

    name: str
    socket: Path
    mac: str
    ip: str | None = None
    """Address and prefix length of eth0, such as 10.77.0.1/24; None leaves it without one."""
    listen: bool = False
    """QEMU creates the vhost-user socket and the switch connects to it, not the other way round."""
    memory_mib: int = 192
    memory_backend: MemoryBackend = "memfd"
    """A memfd, with huge pages (of 2 MiB) for hugetlb, or a file in a file system; posix-shm is
    memory-backend-shm, which QEMU has from 9.1 on."""
    hugetlbfs: Path = Path("/dev/hugepages")
    """Where the file system for `hugetlbfs` is mounted."""
    share: bool = True
    """False maps guest memory privately: what a careless command line does."""
    cpus: int = 1
    queues: int = 1
    queue_size: int = 256
    """Of the receiveqs; QEMU's transmitqs have 256 entries."""
    tx_queue_size: int | None = None
    mtu: int | None = None
    """What QEMU tells guest and switch (`host_mtu`)."""
    mrg_rxbuf: bool = True
    packed: bool = False
    event_idx: bool = True
    modern: bool = True
    """False leaves the legacy (virtio 0.9) interface only."""
    incoming: bool = False
    """Do not boot: wait for a guest that moves here, see `Guest.migrate_to`."""
    max_memory_mib: int | None = None
    """With this, `Guest.plug_memory` can add memory up to it."""
    iommu: bool = False
    """Put the network card behind a virtual IOMMU (Intel's), which the guest's kernel then uses."""
    device_options: str = ""
    """More properties of virtio-net-pci, as on QEMU's command line: `csum=off,guest_tso4=off`."""


def command_line(
    one: GuestSettings,
    image: GuestImage,
    accel: Accelerator,
    console_log: Path,
    fds: tuple[int, int],
) -> list[str]:
    """QEMU's, with `fds` for the guest's shell and for the monitor, sockets that it inherits."""
    shell_fd, qmp_fd = fds
    version = qemu_version(image.qemu)
    words = [f"lab.name={one.name}"]
    # An emulated timer is late on a busy host. The kernel counts its ticks while it boots, and
    # takes too few for broken wiring: "IO-APIC + timer doesn't work!", a panic.
    words += ["no_timer_check"] if accel == "tcg" else []
    words += [f"lab.ip={one.ip}"] if one.ip else []
    # Strict: a mapping is taken back with its buffer, not with many others some time later.
    words += ["intel_iommu=on", "iommu.strict=1"] if one.iommu else []
    iommu = ["-device", "intel-iommu,intremap=off,device-iotlb=on"] if one.iommu else []
    # A guest tells the card of what it unmapped by ATS, which is PCI Express's; QEMU's cards on
    # the root bus are conventional ones.
    iommu += ["-device", "pcie-root-port,id=root1,chassis=1"] if one.iommu else []
    return [
        image.qemu, "-name", one.name, "-accel", accel,
        "-cpu", "host" if accel == "kvm" else "max",
        "-smp", str(one.cpus), "-m", _memory_size(one),
        "-nodefaults", "-no-user-config", "-display", "none",
        "-object", _memory_object(one),
        "-machine", f"{'q35' if one.iommu else 'pc'},memory-backend=mem", *iommu,
        "-chardev", f"file,id=console,path={console_log}", "-serial", "chardev:console",
        "-chardev", f"socket,id=shell,fd={shell_fd}", "-serial", "chardev:shell",
        "-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control",
        *_netdev(one, version),
        "-device", _network_card(one, accel, version),
        "-kernel", str(image.kernel), "-initrd", str(image.initrd),
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off " + " ".join(words),
        *(["-incoming", "defer"] if one.incoming else []),
    ]  # fmt: skip


def _memory_size(one: GuestSettings) -> str:
    if one.max_memory_mib is None:
        return str(one.memory_mib)
    return f"size={one.memory_mib}M,slots=4,maxmem={one.max_memory_mib}M"


def _memory_object(one: GuestSettings) -> str:
    common = f"id=mem,size={one.memory_mib}M,share={_on_off(one.share)}"
    match one.memory_backend:
        case "memfd":
            return f"memory-backend-memfd,{common}"
        case "shm":
            return f"memory-backend-file,{common},mem-path=/dev/shm"
        case "posix-shm":
            return f"memory-backend-shm,{common}"
        case "hugetlb":
            return f"memory-backend-memfd,{common},hugetlb=on,hugetlbsize=2M"
        case "hugetlbfs":
            return f"memory-backend-file,{common},mem-path={one.hugetlbfs}"


def _netdev(one: GuestSettings, version: tuple[int, int]) -> list[str]:
    netdev = f"vhost-user,id=net,chardev=vhost,queues={one.queues}"
    return ["-chardev", _socket_chardev(one, version), "-netdev", netdev]


def _socket_chardev(one: GuestSettings, version: tuple[int, int]) -> str:
    common = f"socket,id=vhost,path={one.socket}"
    if one.listen:
        return f"{common},server=on,wait=off"
    # QEMU 9.2 renamed the option.
    return f"{common},reconnect-ms=1000" if version >= (9, 2) else f"{common},reconnect=1"


def _network_card(one: GuestSettings, accel: Accelerator, version: tuple[int, int]) -> str:
    card = (
        f"virtio-net-pci,netdev=net,mac={one.mac},romfile=,"
        f"rx_queue_size={one.queue_size},mrg_rxbuf={_on_off(one.mrg_rxbuf)},"
        f"packed={_on_off(one.packed)},event_idx={_on_off(one.event_idx)},"
        f"disable-modern={_on_off(not one.modern)},disable-legacy={_on_off(one.iommu)}"
    )
    if one.iommu:
        card += ",bus=root1,iommu_platform=on,ats=on"
    if one.tx_queue_size is not None:
        card += f",tx_queue_size={one.tx_queue_size}"
    if one.queues > 1:
        card += ",mq=on"
    if one.mtu:
        card += f",host_mtu={one.mtu}"
    if accel == "tcg" and version < (8, 0):
        # Debian 12's QEMU 7.2 crashes with vhost-user and MSI-X under TCG.
        card += ",vectors=0"
    elif one.queues > 1:
        card += f",vectors={2 * one.queues + 2}"
    return f"{card},{one.device_options}" if one.device_options else card


def _on_off(value: bool) -> str:
    return "on" if value else "off"
