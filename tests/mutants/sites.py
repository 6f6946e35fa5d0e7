"""Where a mutant may be: the statements of the fast path's functions, as tokens."""

from __future__ import annotations

import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

FENCES = ("fence", "barrier", "acquire", "release")
"""In a name: what it orders is for the models (tests/model); an x86 does it of its own accord."""
HINTS = ("prefetch",)
"""In a name: makes it faster and nothing else."""
FLOW = {"if", "elif", "while"}
FREEING = "__dealloc__"
"""A leak is found by the sanitizers' build and by the soak test, which look for them."""


@dataclass(frozen=True)
class Statement:
    """One logical line of a function."""

    path: Path
    function: str
    """With its class, as in `Port.start`."""
    first: int
    last: int
    """Lines, counted from 1."""
    indent: str
    tokens: tuple[str, ...]
    spaces: tuple[str, ...]
    """What is before each token, line breaks being spaces."""

    @property
    def text(self) -> str:
        return self.with_token(0, self.tokens[0])

    def with_token(self, at: int, token: str) -> str:
        """The statement in one line, with another token in the place of one."""
        words = (*self.tokens[:at], token, *self.tokens[at + 1 :])
        return "".join(space + word for space, word in zip(self.spaces, words, strict=True))


def statements(path: Path) -> Iterator[Statement]:
    """All statements in functions, but for declarations without a value and docstrings."""
    scopes: list[tuple[int, str]] = []
    functions: list[tuple[int, str]] = []
    for tokens in _logical_lines(path.read_text()):
        words = tuple(token.string for token in tokens)
        column = tokens[0].start[1]
        scopes = [scope for scope in scopes if scope[0] < column]
        functions = [function for function in functions if function[0] < column]
        if words[0] in {"cdef", "cpdef", "def", "class"} and words[-1] == ":":
            name = _opened(words)
            if words[0] != "class" and "class" not in words[:2] and "(" in words:
                functions.append((column, ".".join([*(scope[1] for scope in scopes), name])))
            else:
                scopes.append((column, name))
            continue
        if not functions or functions[-1][1].endswith(FREEING):
            continue
        if len(words) == 1 and tokens[0].type == tokenize.STRING:
            continue
        if words[0] == "@" or (words[0] == "cdef" and "=" not in words):
            continue
        yield Statement(
            path,
            functions[-1][1],
            tokens[0].start[0],
            tokens[-1].end[0],
            " " * column,
            words,
            _spaces(tokens),
        )


def _spaces(tokens: list[tokenize.TokenInfo]) -> tuple[str, ...]:
    found = [""]
    for before, token in pairwise(tokens):
        if before.end[0] == token.start[0]:
            found.append(" " * (token.start[1] - before.end[1]))
        else:  # no space at the inner side of brackets
            found.append("" if before.string in "([" or token.string in ")]" else " ")
    return tuple(found)


def _opened(words: tuple[str, ...]) -> str:
    """The name of the class or function whose first line this is."""
    if "(" in words:
        return words[words.index("(") - 1]
    return words[-2]


def _logical_lines(source: str) -> Iterator[list[tokenize.TokenInfo]]:
    line: list[tokenize.TokenInfo] = []
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            if line:
                yield line
            line = []
        elif token.type not in skipped:
            line.append(token)
