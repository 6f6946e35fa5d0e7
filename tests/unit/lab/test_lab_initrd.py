"""The guests' initrd: what is in the archive, which modules in which order."""

from __future__ import annotations

import gzip
import lzma
import subprocess
from pathlib import Path

import pytest

from vswitch.lab.errors import LabError
from vswitch.lab.qemu import initrd


def module(depends: str = "") -> bytes:
    """What of a kernel module the lab reads: the dependencies in its .modinfo section."""
    return b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


@pytest.fixture
def modules_dir(tmp_path: Path) -> Path:
    for path, content in {
        "kernel/net/virtio_net.ko": module("net-failover,virtio"),
        "kernel/net/net_failover.ko.xz": lzma.compress(module("failover")),
        "kernel/net/failover.ko.gz": gzip.compress(module()),
        "kernel/virtio/virtio.ko": module("virtio_ring"),
        "kernel/virtio/virtio_ring.ko": module(),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    (tmp_path / "modules.builtin").write_text("kernel/net/8021q.ko\n")
    return tmp_path


def test_modules_come_after_what_they_depend_on(modules_dir: Path) -> None:
    order = initrd.load_order(modules_dir, ["virtio_net"])
    assert list(order) == ["failover", "net_failover", "virtio_ring", "virtio", "virtio_net"]
    assert order["net_failover"] == module("failover")
    assert order["failover"] == module()


def test_modules_that_are_built_in_are_left_out(modules_dir: Path) -> None:
    assert initrd.load_order(modules_dir, ["8021q"]) == {}


def test_a_module_that_is_missing_is_named(modules_dir: Path) -> None:
    (modules_dir / "kernel/virtio/virtio_ring.ko").unlink()
    with pytest.raises(LabError, match="virtio_ring, which virtio needs, is not under") as caught:
        initrd.load_order(modules_dir, ["virtio_net"])
    assert "VSWITCH_KERNEL" in caught.value.hint


def test_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    data = initrd.build(b"busybox", {"virtio": b"module"}, {"/usr/sbin/tool": b"tool"})
    subprocess.run(
        ["busybox", "cpio", "-i", "-d", "-m"],
        input=gzip.decompress(data),
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "init").read_bytes() == initrd.init_script()
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "bin/busybox").read_bytes() == b"busybox"
    assert (tmp_path / "bin/sh").readlink() == Path("busybox")
    assert (tmp_path / "modules/00-virtio.ko").read_bytes() == b"module"
    assert (tmp_path / "usr/sbin/tool").read_bytes() == b"tool"


def test_same_input_same_initrd() -> None:
    first, second = (initrd.build(b"b", {"m": b"m"}, {}) for _ in range(2))
    assert first == second
    assert initrd.digest(b"ab", b"c") != initrd.digest(b"a", b"bc")


def test_static_and_dynamic_programs_are_told_apart() -> None:
    assert initrd.is_static(Path("/bin/busybox"))
    assert not initrd.is_static(Path("/bin/bash"))
    assert not initrd.is_static(Path(__file__))
