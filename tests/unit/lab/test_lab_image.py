"""Where the guests' kernel and QEMU come from, and what is said where they cannot be had."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from vswitch.lab.errors import LabError
from vswitch.lab.qemu import distribution, image
from vswitch.lab.qemu.distribution import DEBIAN_13

RELEASE = "6.12.1-lab"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("VSWITCH_CACHE", str(cache))
    monkeypatch.delenv("VSWITCH_DEBIAN_MIRROR", raising=False)
    return cache


@pytest.mark.parametrize("lib", ["lib", "usr/lib"])
@pytest.mark.parametrize("folder", ["boot", "."])
def test_a_kernel_of_ones_own(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lib: str, folder: str
) -> None:
    """With its modules in either place: packages of today have them below usr/."""
    root = tmp_path / "root"
    modules = root / lib / "modules" / RELEASE
    modules.mkdir(parents=True)
    (modules / "modules.builtin").write_text("a/virtio_pci.ko\nb/8021q.ko\n")
    (modules / "virtio_net.ko").write_bytes(b"\x7fELF of this one")
    vmlinuz = root / folder / f"vmlinuz-{RELEASE}"
    vmlinuz.parent.mkdir(exist_ok=True)
    vmlinuz.write_bytes(b"kernel")
    monkeypatch.setenv("VSWITCH_KERNEL", str(vmlinuz))
    found = image.ensure_image()
    assert found.kernel == vmlinuz
    assert found.qemu == "qemu-system-x86_64"
    assert b"ELF of this one" in gzip.decompress(found.initrd.read_bytes())


def test_a_kernel_without_modules(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmlinuz = tmp_path / f"vmlinuz-{RELEASE}"
    vmlinuz.write_bytes(b"kernel")
    monkeypatch.setenv("VSWITCH_KERNEL", str(vmlinuz))
    with pytest.raises(LabError, match=f"no lib/modules/{RELEASE}") as caught:
        image.ensure_image()
    assert "DIR/usr/lib/modules/RELEASE" in caught.value.hint


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put an apt of our own on PATH, which writes its configuration down and runs a script."""

    def create(script: str) -> Path:
        folder, calls = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir()
        for name in ("apt-get", "apt-cache", "dpkg-deb"):
            program = folder / name
            program.write_text(f'#!/bin/sh\necho "{name} $APT_CONFIG $*" >>{calls}\n{script}\n')
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        keyring = tmp_path / "keyring.gpg"
        keyring.touch()
        monkeypatch.setattr(distribution, "KEYRING", keyring)
        return calls

    return create


def test_another_release_without_its_keys(
    cache: Path, apt: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    apt("exit 0")
    monkeypatch.setattr(distribution, "KEYRING", tmp_path / "none")
    with pytest.raises(LabError, match="is not there to check them with") as caught:
        image.ensure_image(distribution=DEBIAN_13)
    assert "debian-archive-keyring" in caught.value.hint


def test_another_release_whose_mirror_is_away(
    cache: Path, apt: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure says what to do, and nothing half done is taken for the whole next time."""
    calls = apt('echo "E: cannot reach it" >&2; exit 100')
    monkeypatch.setenv("VSWITCH_DEBIAN_MIRROR", "http://mirror.test/debian/")
    for _ in range(2):
        with pytest.raises(LabError, match="cannot reach it") as caught:
            image.ensure_image(distribution=DEBIAN_13)
        assert "VSWITCH_DEBIAN_MIRROR=URL" in caught.value.hint
    config = cache / "trixie" / "apt" / "apt.conf"
    assert calls.read_text().count(f"apt-get {config} ") == 2
    sources = (config.parent / "etc" / "debian.sources").read_text()
    assert "URIs: http://mirror.test/debian\nSuites: trixie trixie-updates\n" in sources
    assert "URIs: http://mirror.test/debian-security\nSuites: trixie-security\n" in sources
    assert sources.count(f"Signed-By: {distribution.KEYRING}\n") == 2


def test_another_release_without_apt(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match="there is no apt here"):
        image.ensure_image(distribution=DEBIAN_13)
