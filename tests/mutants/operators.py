"""What is changed in a statement to make a mutant of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.mutants.sites import FENCES, FLOW, HINTS, Statement

SWAPS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "+": "-",
    "-": "+",
    "<<": ">>",
    ">>": "<<",
    "&": "|",
    "|": "&",
    "^": "|",
    "and": "or",
    "or": "and",
    "+=": "-=",
    "-=": "+=",
    "|=": "&=",
    "&=": "|=",
    "^=": "|=",
    "True": "False",
    "False": "True",
}
ASSIGNMENTS = {"=", "+=", "-=", "*=", "|=", "&=", "^=", ">>=", "<<="}
NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+|\d+)([uUlL]*)")
KEPT = {
    "raise",
    "import",
    "from",
    "global",
    "with",
    "for",
    "else",
    "try",
    "finally",
    "except",
    "pass",
    "assert",
}
"""First words of statements that no operator is for."""

NO_MEMORY = "MAP_FAILED"
"""What a test would have to be lucky to see."""


@dataclass(frozen=True)
class Mutant:
    statement: Statement
    operator: str
    text: str
    """The whole statement as it is then; empty where it is left out."""

    @property
    def where(self) -> str:
        return f"{'/'.join(self.statement.path.parts[-2:])} {self.statement.function}"

    @property
    def name(self) -> str:
        """What stays the same when lines move."""
        return f"{self.where}: {self.statement.text}  =>  {self.text or '(nothing)'}"


def mutants(statement: Statement) -> list[Mutant]:
    """All mutants of a statement, each once."""
    found = {mutant.text: mutant for mutant in _mutants(statement)}
    found.pop(statement.text, None)
    return list(found.values())


def _mutants(statement: Statement) -> Iterator[Mutant]:
    words = statement.tokens
    if (
        words[0] in KEPT
        or NO_MEMORY in words
        or any(part in word for word in words for part in (*FENCES, *HINTS))
    ):
        return
    start, end = _expression(words)
    for at in range(start, end):
        for operator, changed in _changes(words, at):
            yield Mutant(statement, operator, statement.with_token(at, changed))
    if words[0] in FLOW:
        for value in ("True", "False"):
            if (words[0], value) != ("while", "True"):  # which would not end
                yield Mutant(statement, f"condition {value}", f"{words[0]} {value}:")
    elif words[0] not in {"cdef", "return"} and not _sets_a_local(words):
        yield Mutant(statement, "left out", "")


def _sets_a_local(words: tuple[str, ...]) -> bool:
    """Without which a variable of C would hold anything: no mutant behaves twice alike then."""
    return len(words) > 1 and words[1] == "="


def _expression(words: tuple[str, ...]) -> tuple[int, int]:
    """Where the operators may change something: [start, end)."""
    if words[0] == "cdef":
        # Of several declarations in one statement none can have two values.
        return (
            (0, 0)
            if words.count("=") > 1 or _top_level_comma(words)
            else (words.index("=") + 1, len(words))
        )
    if words[0] in FLOW:
        return 1, len(words) - 1
    if words[0] == "return":
        return 1, len(words)
    return 0, len(words)


def _top_level_comma(words: tuple[str, ...]) -> bool:
    depth = 0
    for word in words:
        depth += (word in "([") - (word in ")]")
        if word == "," and depth == 0:
            return True
    return False


def _changes(words: tuple[str, ...], at: int) -> Iterator[tuple[str, str]]:
    word = words[at]
    before = words[at - 1] if at else ""
    if _is_cast(words, at):
        return
    if word == "not" and (at + 1 == len(words) or words[at + 1] != "in"):
        yield "not dropped", ""
    elif word in SWAPS and not (word in "+-&" and not _binary(before)):
        yield f"{word} to {SWAPS[word]}", SWAPS[word]
    elif (number := NUMBER.fullmatch(word)) and before != ".":
        value = int(number[1], 0)
        if value >= 1 << 16 or (value == 0 and before == "["):
            return  # a hash's multiplier; what a pointer points to
        yield f"{word} to {value + 1}", f"{value + 1}{number[2]}"
        if value > 1:
            yield f"{word} to {value - 1}", f"{value - 1}{number[2]}"


def _binary(before: str) -> bool:
    """Whether an operator behind this one has something on its left."""
    return (
        before in {")", "]"}
        or (
            before.isidentifier()
            and before not in {"return", "and", "or", "not", "if", "else", "in"}
        )
        or before[:1].isdigit()
    )


def _is_cast(words: tuple[str, ...], at: int) -> bool:
    """Whether `<` or `>` is one of Cython's casts: `<uint32_t>x`, `<const char *>x`."""
    if words[at] == "<":
        rest = words[at + 1 : at + 5]
        return not _binary(words[at - 1] if at else "") and ">" in rest
    if words[at] == ">":
        opened = [i for i in range(max(0, at - 4), at) if words[i] == "<"]
        return any(_is_cast(words, i) for i in opened)
    return False
