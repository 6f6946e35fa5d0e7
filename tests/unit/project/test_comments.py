"""What comments name is there: the partners of fences, and what the fast path speaks of."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "vswitch"
SOURCES = sorted(
    path
    for suffix in ("py", "pyx", "pxd", "h")
    for path in PACKAGE.rglob(f"*.{suffix}")
    if path.name != "_version.py"
)
FASTPATH = [path for path in SOURCES if "fastpath" in path.parts]

OTHERS = re.compile(r"\b(driver|device|kernel)('s|\b)")
"""Who is on the other side of a fence that no code of ours is on."""
ORDERS = {
    "fence": r"vs_fence|atomic_thread_fence",
    "acquire": r"acquire|ACQUIRE|ACQ_REL|vs_cas\w*|vs_exchange\w*|vs_trylock|vs_fence",
    "release": r"release|RELEASE|ACQ_REL|vs_cas\w*|vs_exchange\w*|vs_unlock|vs_set_bit|vs_fence",
}
"""What a partner's code has in it, by what a comment calls it."""
NAME = re.compile(r"\b(?:[A-Z]\w+\.)?_?[a-z]\w*_\w+\b(?!\.\w)|\b[A-Z]\w+\._?[a-z]\w+\b")
"""A function's, field's or method's name: with an underscore in it, or behind a class's."""
OUTSIDE = frozenset(
    # Names of VIRTIO, the kernel and libuv.
    {
        "avail_event",
        "used_event",
        "num_buffers",
        "virtio_net_hdr",
        "hdr_len",
        "gso_size",
        "gso_type",
        "csum_start",
        "csum_offset",
        "frag_off",
        "io_uring",
        "io_uring_enter",
        "io_uring_disabled",
        "uv_prepare_t",
    }
)


@dataclass
class Source:
    """One file: its comments, and its code without them."""

    path: Path
    comments: list[tuple[int, str]] = field(default_factory=list)
    """(line, text) of each comment, lines that follow each other joined; docstrings too."""
    code: str = ""


def read(path: Path) -> Source:
    text = path.read_text()
    return _read_c(path, text) if path.suffix == ".h" else _read_python(path, text)


def _read_c(path: Path, text: str) -> Source:
    source = Source(path)
    for match in re.finditer(r"/\*.*?\*/|//[^\n]*", text, re.DOTALL):
        words = re.sub(r"\n\s*\*?", " ", match[0]).strip("/* ")
        source.comments.append((text.count("\n", 0, match.start()) + 1, words))
    source.code = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    return source


def _read_python(path: Path, text: str) -> Source:
    """Cython has Python's comments and strings, which is all that matters here."""
    source = Source(path)
    code: list[str] = []
    last = -2
    lines: list[str] = []
    start = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row = token.start[0]
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            if alone and row == last + 1 and lines:
                lines.append(token.string.lstrip("# "))
                source.comments[-1] = (source.comments[-1][0], " ".join(lines))
            else:
                lines = [token.string.lstrip("# ")]
                source.comments.append((row, lines[0]))
            last = row
        elif token.type == tokenize.STRING and start and token.string.lstrip("rf")[:3] == '"""':
            source.comments.append((row, " ".join(token.string.strip('rf"').split())))
            # C in a string is code, and so are its comments' lines for what follows.
            if "#define" in token.string or "#include" in token.string:
                code.append(token.string)
        elif token.type in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            start = start or token.type != tokenize.NL
            code.append(token.string if token.type != tokenize.DEDENT else "")
            continue
        else:
            code.append(" " + token.string)
        start = token.type == tokenize.COMMENT and start
    source.code = "".join(code)
    return source


def functions(path: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each function of a file, methods as Class.name."""
    text = path.read_text()
    if path.suffix == ".h":
        for match in re.finditer(
            r"^static [^\n;]*?\b(\w+)\([^;{]*\) \{(.*?)(?:^\}|\}$)", text, re.M | re.S
        ):
            yield match[1], match[2]
        return
    owner = ""
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if named := re.match(r"(?:cdef )?class (\w+)", line):
            owner = named[1] + "."
        elif re.match(r"\S", line) and not line.startswith((")", "#", "@")):
            owner = "" if not line.startswith(("cdef class", "class")) else owner
        if not (
            head := re.match(r"(\s*)(?:async )?(?:cdef|cpdef|def) (?:[^=(]*?[ *])?(\w+)\(", line)
        ):
            continue
        body = []
        for following in lines[at + 1 :]:
            indent = len(following) - len(following.lstrip())
            if following.strip() and indent <= len(head[1]) and following.strip()[0] not in ")":
                break
            body.append(following)
        yield (owner if head[1] else "") + head[2], "\n".join(body)


READ = {path: read(path) for path in SOURCES}
FUNCTIONS: dict[str, list[str]] = {}
for _path in SOURCES:
    for _name, _body in functions(_path):
        for _key in {_name, _name.rpartition(".")[2]}:
            FUNCTIONS.setdefault(_key, []).append(_body)
WORDS = {word for source in READ.values() for word in re.findall(r"\w+", source.code)}
CLASSES = {
    name
    for path in SOURCES
    for name in re.findall(r"^(?:cdef )?class (\w+)", path.read_text(), re.MULTILINE)
}


def pairs() -> Iterator[tuple[str, str]]:
    """(place, what it says of its partner) of each fence that names one."""
    for path, source in READ.items():
        for line, text in source.comments:
            for match in re.finditer(
                r"\bpairs? with (.*?)(?:[.;)](?:\s|$)|$)", text, re.IGNORECASE
            ):
                yield f"{path.relative_to(ROOT)}:{line}", match[1]


def missing(said: str) -> list[str]:
    """What is wrong with the partners that a fence names."""
    said = re.sub(r"\b\w+\.(?:py|pyx|pxd|h)\b", "", said)
    ours = not OTHERS.search(said)
    names = NAME.findall(said)
    unknown = [n for n in names if n not in FUNCTIONS and (ours or not {n} & (WORDS | OUTSIDE))]
    if unknown:
        return [f"there is no function {name}" for name in unknown]
    if not ours:
        return []
    plain = re.findall(r"(?:^|\bin |\band )(\w+)", said)
    named = [name for name in {*names, *plain} if name in FUNCTIONS]
    if not named:
        return ["it names no function, nor driver, device or kernel"]
    order = next((kind for kind in ORDERS if kind in said), None)
    pattern = ORDERS[order] if order else "|".join(ORDERS.values())
    return [
        f"{name} has no {order or 'fence'} in it"
        for name in named
        if not any(re.search(pattern, body) for body in FUNCTIONS[name])
    ]


def test_fences_are_found() -> None:
    """That the others here look at something."""
    assert len(list(pairs())) > 40
    assert {"Engine.publish", "publish", "vs_find_region", "worker_loop"} <= FUNCTIONS.keys()
    assert "vs_fence" in FUNCTIONS["Engine.publish"][0]


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("the fence in Engine.publish", []),
        ("the driver's write barrier", []),
        ("the fence in Engine._wake", ["there is no function Engine._wake"]),
        ("the acquire in Worker.take_events", ["there is no function Worker.take_events"]),
        ("the fence in fdb_insert", ["fdb_insert has no fence in it"]),
        ("the acquire load in port.pyx", ["it names no function, nor driver, device or kernel"]),
    ],
)
def test_a_wrong_partner_is_seen(said: str, wrong: list[str]) -> None:
    assert missing(said) == wrong


def test_partners_of_fences_are_there() -> None:
    wrong = [f"{place}: {text}" for place, said in pairs() for text in missing(said)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FASTPATH, ids=lambda path: path.name)
def test_each_full_fence_names_its_partner(path: Path) -> None:
    lines = path.read_text().splitlines()
    silent = [
        f"{path.name}:{at + 1}"
        for at, line in enumerate(lines)
        if re.search(r"^\s+(vs_fence\(\)|__atomic_thread_fence\()", line)
        and not re.search(r"[Pp]airs with", " ".join(lines[max(0, at - 6) : at]))
    ]
    assert not silent


def test_methods_that_are_named_are_there() -> None:
    wrong = []
    for path, source in READ.items():
        for line, text in source.comments:
            for owner, name in re.findall(r"\b([A-Z]\w+)\.([a-z_]\w*)\b", text):
                if owner in CLASSES and name not in WORDS:
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {owner}.{name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FASTPATH, ids=lambda path: path.name)
def test_names_in_comments_of_the_fast_path_are_there(path: Path) -> None:
    wrong = [
        f"{path.name}:{line}: {name}"
        for line, text in READ[path].comments
        for name in NAME.findall(text) + re.findall(r"`(\w+)`", text)
        if not {*name.split(".")} <= WORDS | CLASSES and name not in OUTSIDE
    ]
    assert not wrong, "\n".join(wrong)
