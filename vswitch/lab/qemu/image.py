"""Kernel and initrd for the lab's guests, kept in a cache directory.

The kernel is a distribution's own: its package is downloaded and unpacked, never installed, so no
root is needed. `VSWITCH_KERNEL` names another one (a vmlinuz whose modules are in
`lib/modules/RELEASE` or `usr/lib/modules/RELEASE` of the running system or beside it).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vswitch.lab import programs
from vswitch.lab.errors import LabError
from vswitch.lab.qemu import initrd
from vswitch.lab.qemu.distribution import PROGRAM as QEMU
from vswitch.lab.qemu.distribution import Distribution
from vswitch.lab.qemu.packages import Packages, has_apt

KERNEL_PACKAGES = (
    "linux-image-cloud-amd64",  # Debian: small, boots fastest
    "linux-image-virtual",  # Ubuntu
    "linux-image-kvm",
    "linux-image-amd64",
    "linux-image-generic",
)

_VERSIONED = re.compile(r"^linux-(image|modules|binary)(-unsigned)?-\d")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What QEMU's `-kernel` and `-initrd` want, and the QEMU to boot it with."""

    kernel: Path
    initrd: Path
    name: str
    qemu: str = QEMU


@dataclass(frozen=True, slots=True)
class _Kernel:
    name: str
    vmlinuz: Path
    modules: Path


def cache_dir() -> Path:
    """`$VSWITCH_CACHE`, else `$XDG_CACHE_HOME/vswitch`, else `~/.cache/vswitch`."""
    if chosen := os.environ.get("VSWITCH_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vswitch"


def ensure_image(
    progress: Progress = lambda _: None, distribution: Distribution | None = None
) -> GuestImage:
    """The guests' kernel and initrd, obtained and built where the cache does not have them yet.

    With `distribution`, kernel and QEMU are of that one, and not the system's. `progress` is told
    in a few words what takes time. Raises LabError where something cannot be had.
    """
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        if distribution is None:
            kernel, qemu = _find_kernel(cache, progress), QEMU
        else:
            kernel = _kernel_of(distribution, cache, progress)
            qemu = str(distribution.qemu(cache, progress))
        return GuestImage(kernel.vmlinuz, _initrd(cache, kernel, progress), kernel.name, qemu)


def _initrd(cache: Path, kernel: _Kernel, progress: Progress) -> Path:
    busybox = _find_busybox(cache, progress).read_bytes()
    ethtool = programs.find("ethtool")
    extras = initrd.program_with_libraries(Path(ethtool)) if ethtool else {}
    parts = [busybox, initrd.init_script(), *(extras[path] for path in sorted(extras))]
    parts += [name.encode() for name in initrd.WANTED_MODULES]
    image = cache / "initrd" / f"{kernel.name}-{initrd.digest(*parts)}.gz"
    if not image.exists():
        progress("building the guests' initrd")
        modules = initrd.load_order(kernel.modules, initrd.WANTED_MODULES)
        _write_atomically(image, initrd.build(busybox, modules, extras))
    return image


def _kernel_of(distribution: Distribution, cache: Path, progress: Progress) -> _Kernel:
    kernels = cache / distribution.codename / "kernels"
    if cached := sorted(kernels.glob("linux-*")):
        return _unpacked(cached[-1])
    return _packaged_kernel(kernels, distribution.packages(cache), progress)


def _find_kernel(cache: Path, progress: Progress) -> _Kernel:
    if chosen := os.environ.get("VSWITCH_KERNEL"):
        return _chosen_kernel(Path(chosen))
    if cached := sorted((cache / "kernels").glob("linux-*")):
        return _unpacked(cached[-1])
    reasons = []
    if has_apt():
        try:
            return _packaged_kernel(cache / "kernels", Packages(), progress)
        except LabError as error:
            reasons.append(error.message)
    running = os.uname().release
    vmlinuz, modules = Path(f"/boot/vmlinuz-{running}"), Path(f"/lib/modules/{running}")
    if os.access(vmlinuz, os.R_OK) and modules.is_dir():
        return _Kernel(f"host-{running}", vmlinuz, modules)
    reasons.append(f"the running kernel's {vmlinuz} is not there or not readable")
    raise LabError(
        f"no kernel for the guests: {'; '.join(reasons)}",
        hint="run `apt-get update` as root if apt's package lists are empty, or set "
        "VSWITCH_KERNEL=/path/to/vmlinuz-RELEASE, with its modules in lib/modules/RELEASE",
    )


def _chosen_kernel(vmlinuz: Path) -> _Kernel:
    release = vmlinuz.name.partition("-")[2]
    for root in (vmlinuz.parent.parent, vmlinuz.parent, Path("/")):
        for modules in (root / lib / "modules" / release for lib in ("lib", "usr/lib")):
            if release and vmlinuz.is_file() and modules.is_dir():
                size, changed = vmlinuz.stat().st_size, vmlinuz.stat().st_mtime_ns
                return _Kernel(f"own-{release}-{size:x}-{changed:x}", vmlinuz, modules)
    raise LabError(
        f"VSWITCH_KERNEL={vmlinuz}: no such kernel, or it has no lib/modules/{release}",
        hint="name a file vmlinuz-RELEASE in DIR/boot whose modules are in DIR/lib/modules/RELEASE "
        "or DIR/usr/lib/modules/RELEASE",
    )


def _packaged_kernel(kernels: Path, packages: Packages, progress: Progress) -> _Kernel:
    """The kernel the distribution offers now, downloaded into the cache."""
    names = _kernel_packages(packages)
    if not names:
        raise LabError("apt knows none of " + ", ".join(KERNEL_PACKAGES), hint=packages.hint)
    progress(f"downloading the guests' kernel ({names[0]})")
    kernels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kernels, prefix=".new-") as scratch:
        root = Path(scratch) / "root"
        archives = packages.download(names, Path(scratch))
        for archive in archives:
            progress(f"unpacking {archive.name}")
            packages.unpack(archive, root)
        # One thing under its final name, all at once: a later run must never see half a kernel.
        target = kernels / archives[0].stem
        root.rename(target)
    return _unpacked(target)


def _unpacked(root: Path) -> _Kernel:
    vmlinuz = sorted((root / "boot").glob("vmlinuz-*"))
    trees = [*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")]
    if not vmlinuz or not trees:
        raise LabError(
            f"{root} holds no kernel with modules",
            hint=f"delete {root} and try again, or choose another kernel with VSWITCH_KERNEL",
        )
    return _Kernel(root.name, vmlinuz[-1], trees[0])


def _kernel_packages(packages: Packages) -> list[str]:
    """The image package behind the first meta package apt knows, then those it is split into."""
    for meta in KERNEL_PACKAGES:
        found: list[str] = []
        waiting = [meta]
        while waiting:
            for name in packages.dependencies(waiting.pop()):
                if _VERSIONED.match(name) and name not in found:
                    found.append(name)
                    waiting.append(name)
        if found:
            return found
    return []


def _find_busybox(cache: Path, progress: Progress) -> Path:
    for name in ("busybox", "busybox-static"):
        installed = shutil.which(name)
        if installed and initrd.is_static(Path(installed)):
            return Path(installed)
    kept = cache / "busybox"
    if not kept.exists():
        if not has_apt():
            raise LabError(
                "no statically linked busybox for the guests",
                hint="install your distribution's static busybox so that `busybox` is on PATH",
            )
        progress("downloading busybox for the guests")
        with tempfile.TemporaryDirectory(dir=cache, prefix=".new-") as scratch:
            (package,) = Packages().download(["busybox-static"], Path(scratch))
            Packages().unpack(package, Path(scratch))
            found = [path for path in Path(scratch).glob("**/bin/busybox") if path.is_file()]
            _write_atomically(kept, found[0].read_bytes(), 0o755)
    return kept


def _write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(content)
    scratch.chmod(mode)
    scratch.replace(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time fills the cache; the others find what it left there."""
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
