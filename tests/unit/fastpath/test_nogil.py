"""The loop of a worker has no Python in it: looked up in the C that Cython makes of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from Cython.Compiler.Main import compile_single
from Cython.Compiler.Options import CompilationOptions, get_directive_defaults

ROOT = Path(__file__).parents[3]
LOOPS = {
    "vswitch/fastpath/main/worker.pyx": "vswitch_8fastpath",
    "vswitch/lab/load/load.pyx": "vswitch_3lab",
}
PYTHON = re.compile(
    r"\b(PyGILState_Ensure|__Pyx_PyGILState_Ensure|__Pyx_WriteUnraisable|__Pyx_Raise\w*|PyErr_\w+"
    r"|Py_(?:X?INCREF|X?DECREF)|PyObject_\w+|__Pyx_AddTraceback)\b"
)


def functions(source: str, package: str) -> dict[str, str]:
    """Bodies of the C functions that come from a package's .pxd files."""
    start = re.compile(
        rf"^static CYTHON_INLINE .*?__pyx_f_7{package}\w*?_(?P<name>[a-z]\w*)\(.*\) {{$",
        re.MULTILINE,
    )
    found = {}
    for match in start.finditer(source):
        end = source.index("\n}", match.end())
        found[match["name"]] = source[match.end() : end]
    return found


@pytest.mark.parametrize("module", LOOPS)
def test_no_python_in_the_loop(module: str, tmp_path: Path) -> None:
    directives = get_directive_defaults() | {
        "boundscheck": False,
        "wraparound": False,
        "cdivision": True,
        "initializedcheck": False,
    }
    options = CompilationOptions(
        compiler_directives=directives,
        output_file=str(tmp_path / "module.c"),
        include_path=[str(ROOT)],
        language_level=3,
    )
    result = compile_single(str(ROOT / module), options, full_module_name=None)
    assert result.num_errors == 0
    bodies = functions(Path(result.c_file).read_text(), LOOPS[module])
    offenders = {
        name: found.group() for name, body in bodies.items() if (found := PYTHON.search(body))
    }
    assert offenders == {}
    if module.startswith("vswitch/fastpath"):
        # What the search looked at is the loop, all of it.
        assert {"worker_loop", "poll_transmitq", "forward_burst", "classify"} <= bodies.keys()
        assert {"deliver_locked", "walk_chain", "fdb_learn", "tap_send"} <= bodies.keys()
