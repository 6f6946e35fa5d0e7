"""Imports run one way: who may know whom, checked on the source of every module.

Python files are parsed; Cython files are searched for `import` and `cimport` lines.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "vswitch"

BASE = ("vswitch._version", "vswitch.bounds", "vswitch.errors", "vswitch.ethertypes")
CLIENT = (
    "vswitch.control.client",
    "vswitch.control.channel",
    "vswitch.api",
    "vswitch.control.protocol",
)
LAB = ("vswitch.lab.errors", "vswitch.lab.programs", "vswitch.lab.requirements")

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "vswitch": (*BASE, "vswitch.control.client"),
    "vswitch.__main__": ("vswitch.cli",),
    "vswitch._version": (),
    "vswitch.bounds": (),
    "vswitch.ethertypes": (),
    "vswitch.errors": (),
    "vswitch.host": BASE,
    # What clients know as well: plain Python.
    "vswitch.config.feature_names": (),
    "vswitch.config.kind_names": (),
    "vswitch.config.keys": (
        "vswitch.bounds",
        "vswitch.config.feature_names",
        "vswitch.config.kind_names",
    ),
    "vswitch.config": (*BASE, "vswitch.host.accounts"),
    "vswitch.api": ("vswitch.bounds", "vswitch.config.kind_names", "vswitch.config.settings"),
    # The client and what it shares with the server: a program that only talks to a switch.
    "vswitch.control.protocol": BASE,
    "vswitch.control.channel": (
        *BASE,
        "vswitch.api",
        "vswitch.control.protocol",
        "vswitch.host.unixsocket",
    ),
    "vswitch.control.client": (*BASE, *CLIENT),
    # The server: the switch reaches it as a SwitchApi, never as an import.
    "vswitch.control": (
        *BASE,
        "vswitch.api",
        "vswitch.config",
        "vswitch.relay",
        "vswitch.host.unixsocket",
    ),
    # Who runs what, from the bottom: structures, rings, the workers' stages, the main thread.
    "vswitch.fastpath.sys": (),
    "vswitch.fastpath.shared": ("vswitch.fastpath.sys",),
    "vswitch.fastpath.ring": ("vswitch.fastpath.shared", "vswitch.fastpath.sys"),
    "vswitch.fastpath.worker": (
        "vswitch.fastpath.ring",
        "vswitch.fastpath.shared",
        "vswitch.fastpath.sys",
    ),
    "vswitch.fastpath": (),
    # Knows bytes and descriptors, and nothing of what they mean.
    "vswitch.relay": ("vswitch.errors", "vswitch.host.unixsocket"),
    "vswitch.vhost_user": (*BASE, "vswitch.relay", "vswitch.host.unixsocket"),
    "vswitch.dataplane": (*BASE, "vswitch.api", "vswitch.fastpath", "vswitch.host.privileges"),
    "vswitch.ports": (
        *BASE,
        "vswitch.api",
        "vswitch.config.settings",
        "vswitch.config.checks",
        "vswitch.config.keys",
        "vswitch.config.relations",
        "vswitch.config.feature_names",
        "vswitch.dataplane",
        "vswitch.fastpath",
        "vswitch.host.tap",
        "vswitch.relay",
        "vswitch.vhost_user",
    ),
    # A process of its own that knows nothing, and who starts it.
    "vswitch.ports.fault_helper": (),
    "vswitch.ports.fault_process": ("vswitch.ports.fault_helper",),
    # Puts the parts together.
    "vswitch.switch": (
        *BASE,
        "vswitch.api",
        "vswitch.config.settings",
        "vswitch.dataplane",
        "vswitch.fastpath",
        "vswitch.ports",
        "vswitch.relay",
    ),
    "vswitch.daemon.log": (),
    "vswitch.daemon.outlet": ("vswitch.fastpath.main.pump",),
    "vswitch.daemon.supervisor": (),
    "vswitch.daemon.heartbeat": ("vswitch.daemon.supervisor",),
    "vswitch.daemon": (
        *BASE,
        "vswitch.api",
        "vswitch.config.settings",
        "vswitch.control",
        "vswitch.fastpath.shared.turns",
        "vswitch.host",
        "vswitch.relay",
        "vswitch.switch",
    ),
    "vswitch.cli": (*BASE, *CLIENT, "vswitch.config", "vswitch.daemon"),
    "vswitch.lab": (*BASE,),
    # A second implementation of the other side: it must not share the switch's view of the rings.
    "vswitch.lab.guest": (*BASE, "vswitch.vhost_user.protocol"),
    "vswitch.lab.load": (*BASE, *LAB, "vswitch.lab.guest", "vswitch.vhost_user.protocol"),
    "vswitch.lab.qemu": (*BASE, *CLIENT, *LAB, "vswitch.lab.guest"),
}
"""For a module or package (the longest prefix counts): what it may import besides itself."""

SOURCES = sorted(
    path
    for path in PACKAGE.rglob("*")
    if path.suffix in {".py", ".pyi", ".pyx", ".pxd"} and "__pycache__" not in path.parts
)

_CYTHON_FROM = re.compile(r"^\s*from\s+(\.*[\w.]*)\s+c?import\s+\(?([^#)\n]*)", re.MULTILINE)
_CYTHON_IMPORT = re.compile(r"^\s*c?import\s+([\w.]+(?:\s*,\s*[\w.]+)*)", re.MULTILINE)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    base = ROOT / name.replace(".", "/")
    return base.is_dir() or any(
        base.with_name(base.name + suffix).exists() for suffix in (".py", ".pyi", ".pyx", ".pxd")
    )


def imports_of(path: Path) -> Iterator[str]:
    """Full names of everything of vswitch that a file imports, modules where they are modules."""
    for module, names in _import_statements(path):
        assert not module.startswith("."), f"{path}: relative import of {module}"
        for name in names:
            inner = f"{module}.{name}"
            found = inner if is_module(inner) else module
            if found == "vswitch" and name == "Client":
                found = "vswitch.control.client"  # what the lazy attribute stands for
            if found == "vswitch" or found.startswith("vswitch."):
                yield found
        if not names and (module == "vswitch" or module.startswith("vswitch.")):
            yield module


def _import_statements(path: Path) -> Iterator[tuple[str, list[str]]]:
    text = path.read_text()
    if path.suffix in {".py", ".pyi"}:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                yield from ((alias.name, []) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield (
                    "." * node.level + (node.module or ""),
                    [alias.name for alias in node.names],
                )
        return
    for match in _CYTHON_FROM.finditer(text):
        names = [word.split(" as ")[0].strip() for word in match[2].split(",") if word.strip()]
        yield match[1], names
    for match in _CYTHON_IMPORT.finditer(text):
        yield from ((word.strip(), []) for word in match[1].split(","))


def longest_prefix(name: str, known: Iterator[str] | dict[str, tuple[str, ...]]) -> str | None:
    fitting = [area for area in known if name == area or name.startswith(area + ".")]
    return max(fitting, key=len, default=None)


def area_of(module: str) -> str:
    """The entry of MAY_IMPORT that speaks for a module."""
    area = longest_prefix(module, {name: () for name in MAY_IMPORT if name != "vswitch"})
    if area is None and module == "vswitch":
        return "vswitch"
    assert area is not None, f"{module} is new: say in MAY_IMPORT what it may import"
    return area


def violations(path: Path) -> list[str]:
    module = module_name(path)
    area = area_of(module)
    return [
        f"{module} imports {name}, which {area} may not know"
        for name in imports_of(path)
        if longest_prefix(name, iter((area, *MAY_IMPORT[area]))) is None
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    assert violations(path) == []


def test_rules_name_nothing_that_is_gone() -> None:
    named = set(MAY_IMPORT).union(*MAY_IMPORT.values())
    assert [name for name in sorted(named) if not is_module(name)] == []


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("vhost_user/x.py", "from vswitch.fastpath.main.engine import Engine", "vswitch.fastpath"),
        ("vhost_user/x.py", "def f():\n    import vswitch.switch", "vswitch.switch"),
        ("vhost_user/x.py", "from vswitch import fastpath", "vswitch.fastpath"),
        ("fastpath/worker/x.pyx", "from vswitch.errors import VswitchError", "vswitch.errors"),
        ("fastpath/worker/x.pxd", "from vswitch.lab.guest.split cimport Desc", "vswitch.lab.guest"),
        ("fastpath/worker/x.pyx", "cimport vswitch.lab.guest.split", "vswitch.lab.guest"),
        ("lab/guest/x.py", "from vswitch.vhost_user.backend import Backend", "vswitch.vhost_user"),
        ("control/client.py", "from vswitch.config.read import load", "vswitch.config"),
        ("lab/qemu/x.py", "from vswitch.switch import Switch", "vswitch.switch"),
        ("cli/x.py", "from vswitch import switch", "vswitch.switch"),
    ],
)
def test_a_forbidden_import_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, wanted: str
) -> None:
    # The real rules and the real tree decide what is a module; only the offending file is made up.
    source = tmp_path / "vswitch" / name
    source.parent.mkdir(parents=True)
    source.write_text(text + "\n")
    module = "vswitch." + name.rpartition(".")[0].replace("/", ".")
    monkeypatch.setitem(globals(), "module_name", lambda _path: module)
    found = violations(source)
    assert len(found) == 1
    assert f"imports {wanted}" in found[0]


def test_nothing_is_found_by_an_edited_path() -> None:
    """Tests and benchmarks are packages: what they import is named in full."""
    edits = re.compile(r"^\s*sys\.path(\[|\.(insert|append|extend)\b)", re.MULTILINE)
    programs = [path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    assert [path for path in programs if edits.search(path.read_text())] == []


def test_every_part_is_on_the_map() -> None:
    """The first table of docs/architecture.md has a row for each folder and module, no other."""
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| folder |")[2]
    rows = table.partition("\n\n")[0].splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`([\w.]+)/?`", row.split("|")[1])]
    parts = {
        path.name
        for path in PACKAGE.iterdir()
        if (path.is_dir() or path.suffix == ".py") and not path.name.startswith("_")
    }
    assert sorted(named) == sorted(parts)
