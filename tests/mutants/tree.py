"""A copy of the tree with all chosen mutants in one build, one of them on at a time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.mutants.operators import Mutant
from tests.mutants.sites import FLOW

HERE = Path(__file__).parent
HEADER = HERE / "mutant.h"
FOLDER = Path("vswitch/fastpath/sys")
DECLARATION = '''"""The switch for mutants."""

cdef extern from "mutant.h" nogil:
    bint vs_mutated(int number)
'''
IMPORT = "from vswitch.fastpath.sys.mutant cimport vs_mutated\n"


def instrumented(source: str, chosen: Sequence[tuple[int, Mutant]]) -> str:
    """A file with these mutants in it, by number; at most one a statement."""
    lines = source.splitlines(keepends=True)
    for number, mutant in sorted(chosen, key=lambda one: one[1].statement.first, reverse=True):
        statement = mutant.statement
        lines[statement.first - 1 : statement.last] = _switched(number, mutant)
    first = next(
        i for i, line in enumerate(lines) if line.startswith(("from ", "cimport ", "import "))
    )
    return "".join([*lines[:first], IMPORT, *lines[first:]])


def _switched(number: int, mutant: Mutant) -> list[str]:
    statement = mutant.statement
    indent, words, text = statement.indent, statement.tokens, statement.text
    asked = f"vs_mutated({number})"
    if words[0] in FLOW:
        other = mutant.text.removeprefix(words[0]).removesuffix(":").strip()
        old = text.removeprefix(words[0]).removesuffix(":").strip()
        # Not as a conditional expression, for which both would need one type.
        return [f"{indent}{words[0]} ({asked} and ({other})) or (not {asked} and ({old})):\n"]
    if words[0] == "cdef":
        head, _, old = text.partition(" = ")
        other = mutant.text.partition(" = ")[2]
        return [f"{indent}{head} = ({other}) if {asked} else ({old})\n"]
    inner = indent + "    "
    return [
        f"{indent}if {asked}:\n",
        f"{inner}{mutant.text or 'pass'}\n",
        f"{indent}else:\n",
        f"{inner}{text}\n",
    ]


def write(root: Path, tree: Path, chosen: Iterable[tuple[int, Mutant]]) -> None:
    """Copy what git knows of `root` to `tree`, with the mutants in it. What is right stays so."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
    ).stdout
    by_file: defaultdict[Path, list[tuple[int, Mutant]]] = defaultdict(list)
    for number, mutant in chosen:
        by_file[mutant.statement.path].append((number, mutant))
    for name in filter(None, listed.decode().split("\0")):
        source, target = root / name, tree / name
        if not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.unlink(missing_ok=True)
            target.symlink_to(source.readlink())
            continue
        content = source.read_bytes()
        if mutants := by_file.get(source):
            content = instrumented(content.decode(), mutants).encode()
        if not target.exists() or target.read_bytes() != content:
            target.write_bytes(content)
            shutil.copymode(source, target)
    for name, text in (("mutant.h", HEADER.read_text()), ("mutant.pxd", DECLARATION)):
        target = tree / FOLDER / name
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


def refused(tree: Path, python: Path) -> set[int]:
    """Numbers of mutants that Cython does not take, of one or a few; call it until there is none.

    Raises RuntimeError when it refuses something else.
    """
    for module in sorted((tree / "vswitch/fastpath").rglob("*.pyx")):
        with tempfile.TemporaryDirectory() as directory:
            done = subprocess.run(
                [
                    *(python, "-m", "cython", "-3", module.relative_to(tree)),
                    *("-o", str(Path(directory, "module.c"))),
                ],
                cwd=tree,
                capture_output=True,
                text=True,
            )
        if done.returncode:
            found = {_at(tree / path, int(line)) for path, line in _ERROR.findall(done.stderr)}
            if not found or None in found:
                raise RuntimeError(f"{module} does not compile:\n{done.stderr}")
            return {number for number in found if number is not None}
    return set()


_ERROR = re.compile(r"^(vswitch/\S+):(\d+):\d+: ", re.MULTILINE)
_NUMBER = re.compile(r"vs_mutated\((\d+)\)")


def _at(path: Path, line: int) -> int | None:
    """The mutant that a line belongs to: it is asked for there, or right above."""
    lines = path.read_text().splitlines()
    for text in reversed(lines[max(0, line - 4) : line]):
        if match := _NUMBER.search(text):
            return int(match[1])
    return None


def build(tree: Path) -> None:
    """Raises CalledProcessError when it does not build."""
    if not (tree / ".git").exists():  # tests ask git which files there are
        subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    subprocess.run(["git", "add", "-A"], cwd=tree, check=True)
    subprocess.run(
        ["make", "--no-print-directory", "setup"],
        cwd=tree,
        check=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
    )
