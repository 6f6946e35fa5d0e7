"""Builds the guests' initrd: busybox, the virtio modules, /init, and ethtool where the host has it.

The archive is a gzip'ed cpio in the "newc" format (kernel Documentation:
driver-api/early-userspace/buffer-format).
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vswitch.lab import requirements
from vswitch.lab.errors import LabError

WANTED_MODULES = ("virtio_pci", "virtio_net", "8021q")
"""Modules every guest loads, with what they depend on; kernels that have them built in are fine."""

_MODULE_SUFFIX = re.compile(r"\.ko(\.xz|\.zst|\.gz)?$")


@dataclass
class CpioArchive:
    """Collects files, directories, symbolic links and devices; `data()` gives the archive."""

    _entries: list[bytes] = field(default_factory=list)
    _directories: set[str] = field(default_factory=set)

    def add_file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file; `path` is absolute, missing parents are made."""
        self._add(path, stat.S_IFREG | mode, content)

    def add_symlink(self, path: str, target: str) -> None:
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def add_character_device(self, path: str, major: int, minor: int) -> None:
        self._add(path, stat.S_IFCHR | 0o600, b"", device=(major, minor))

    def data(self) -> bytes:
        """The whole archive, uncompressed, with its trailer."""
        return b"".join(self._entries) + self._header("TRAILER!!!", 0, b"", (0, 0), 0)

    def _add(self, path: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        name = path.lstrip("/")
        parent = name.rpartition("/")[0]
        if parent and parent not in self._directories:
            self._directories.add(parent)
            self._add(parent, stat.S_IFDIR | 0o755, b"")
        self._entries.append(self._header(name, mode, content, device, len(self._entries) + 1))

    @staticmethod
    def _header(name: str, mode: int, content: bytes, device: tuple[int, int], inode: int) -> bytes:
        encoded = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
        return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def read_module(path: Path) -> bytes:
    """The ELF image of a kernel module, decompressed where the distribution ships it compressed."""
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".zst":
        if not shutil.which("zstd"):
            raise LabError(
                f"kernel module {path.name} is compressed with zstd and `zstd` is not installed",
                hint=requirements.installing("zstd"),
            )
        return subprocess.run(
            ["zstd", "-dcq", str(path)], check=True, capture_output=True, timeout=60
        ).stdout
    return path.read_bytes()


def module_dependencies(image: bytes) -> list[str]:
    """Names after `depends=` in a module's .modinfo section: what modules.dep is made from."""
    found = re.search(rb"\0depends=([\w,-]*)\0", image)
    names = found.group(1).decode() if found else ""
    return [_canonical(name) for name in names.split(",") if name]


def load_order(modules_dir: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Modules to insert for `wanted`, dependencies first: name -> ELF image.

    `modules_dir` is a `lib/modules/RELEASE` tree; modules.dep is not needed, because packages that
    were only unpacked do not have one. Modules built into the kernel are left out.
    """
    files = {
        _canonical(_MODULE_SUFFIX.sub("", path.name)): path
        for path in modules_dir.rglob("*.ko*")
        if _MODULE_SUFFIX.search(path.name)
    }
    listing = modules_dir / "modules.builtin"
    built_in = {
        _canonical(Path(line).stem)
        for line in (listing.read_text().split() if listing.exists() else ())
    }
    ordered: dict[str, bytes] = {}

    def visit(name: str, wanted_by: str) -> None:
        if name in ordered or name in built_in:
            return
        if name not in files:
            raise LabError(
                f"kernel module {name}, which {wanted_by} needs, is not under {modules_dir}",
                hint="clear the cache directory, or choose another kernel with VSWITCH_KERNEL",
            )
        image = read_module(files[name])
        for dependency in module_dependencies(image):
            visit(dependency, name)
        ordered[name] = image

    for name in wanted:
        visit(_canonical(name), "the lab")
    return ordered


def _canonical(name: str) -> str:
    return name.replace("-", "_")


def is_static(program: Path) -> bool:
    """Whether an ELF program names no interpreter, and so runs without any library."""
    head = program.read_bytes()
    if head[:4] != b"\x7fELF":
        return False
    table = int.from_bytes(head[32:40], "little")
    entry_len = int.from_bytes(head[54:56], "little")
    count = int.from_bytes(head[56:58], "little")
    types = (int.from_bytes(head[table + i * entry_len :][:4], "little") for i in range(count))
    return 3 not in types  # PT_INTERP


def program_with_libraries(program: Path) -> dict[str, bytes]:
    """Guest path -> content of a program of the host and the libraries it is linked with."""
    listed = subprocess.run(
        ["ldd", str(program)], capture_output=True, text=True, timeout=20, check=False
    ).stdout
    libraries = re.findall(r"(/\S+) \(0x", listed)
    return {path: Path(path).read_bytes() for path in libraries} | {
        f"/usr/sbin/{program.name}": program.read_bytes()
    }


def build(busybox: bytes, modules: Mapping[str, bytes], extras: Mapping[str, bytes]) -> bytes:
    """The initrd, compressed. `modules` in insertion order; `extras`: guest path -> executable."""
    archive = CpioArchive()
    archive.add_file("/init", init_script(), 0o755)
    archive.add_file("/bin/busybox", busybox, 0o755)
    archive.add_symlink("/bin/sh", "busybox")
    # Before devtmpfs is mounted /init needs somewhere to complain to.
    archive.add_character_device("/dev/console", 5, 1)
    for number, (name, image) in enumerate(modules.items()):
        archive.add_file(f"/modules/{number:02d}-{name}.ko", image)
    for path, content in extras.items():
        archive.add_file(path, content, 0o755)
    return gzip.compress(archive.data(), compresslevel=6, mtime=0)


def init_script() -> bytes:
    return Path(__file__).with_name("init.sh").read_bytes()


def digest(*parts: bytes) -> str:
    """A short name for what an initrd was built from."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()[:16]
