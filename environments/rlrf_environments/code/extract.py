"""The program in a completion: found, located, and complained about when it is not there."""

from __future__ import annotations

import ast
import difflib
import re
from dataclasses import dataclass
from typing import Literal

from rlrf import Segment

Take = Literal["longest", "last"]

_FENCE_LINE = re.compile(r"[ \t]*(`{3,}|~{3,})([^\n]*)\n?")


@dataclass(frozen=True)
class Attempt:
    """The program in a completion.

    Attributes:
        code: the source.
        start: where it begins in the completion, in characters.
        blocks: how many code blocks the completion has.
    """

    code: str
    start: int = 0
    blocks: int = 1

    def line(self, number: int | None) -> str | None:
        """Line ``number`` (from 1), without its end; None if there is none."""
        lines = self.code.splitlines()
        return lines[number - 1] if number is not None and 1 <= number <= len(lines) else None

    def line_span(self, number: int | None) -> tuple[int, int] | None:
        """The characters of the completion that are line ``number``, indentation apart."""
        if number is None or self.line(number) is None:
            return None
        lines = self.code.splitlines(keepends=True)
        before = sum(map(len, lines[: number - 1]))
        text = lines[number - 1].rstrip()
        indent = len(text) - len(text.lstrip())
        return self.start + before + indent, self.start + before + len(text)


def extract(completion: str, take: Take = "longest") -> Attempt | Segment:
    """The code block of a completion that is its program.

    Args:
        completion: the policy's reply.
        take: ``longest`` block, as the official SDPO grader has it, or the ``last``, as
            LiveCodeBench has it.

    Returns:
        The program, or the segment that says why there is none.
    """
    blocks: list[tuple[int, int]] = []
    fence, opened, start, position = "", 0, 0, 0
    for line in completion.splitlines(keepends=True):  # one pass: an attempt may be huge
        found = _FENCE_LINE.fullmatch(line)
        if found and not fence and not (found[1][0] == "`" and "`" in found[2]):
            fence, opened, start = found[1], position, position + len(line)
        elif found and fence and found[1].startswith(fence) and not found[2].strip():
            blocks.append((start, position))
            fence = ""
        position += len(line)
    if blocks:
        start, end = blocks[-1] if take == "last" else max(blocks, key=lambda b: b[1] - b[0])
        return Attempt(completion[start:end], start, len(blocks))
    if fence:
        return Segment(
            "truncated_attempt",
            "The code block is never closed: the reply was cut off, or the closing ``` is "
            "missing. Reply with one complete code block.",
            source="extractor",
            span=(opened, len(completion)),
            priority=3,
        )
    return Segment(
        "format_error",
        "There is no code block in the reply. Put the whole program into one block fenced by "
        "```python and ```.",
        source="extractor",
        span=(0, len(completion)) if completion else None,
        priority=3,
    )


def missing_entry(attempt: Attempt, entry: str | None) -> Segment | None:
    """The fault of a program that does not define what it was asked for; None if it may.

    Args:
        attempt: the program.
        entry: ``"f"``, ``"Solution.f"``, or None where nothing has to be defined.
    """
    if entry is None:
        return None
    try:
        tree = ast.parse(attempt.code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # the compiler will say it better
    holder, _, name = entry.rpartition(".")
    if not holder:
        return _undefined(attempt, tree, name, "function", (ast.FunctionDef, ast.AsyncFunctionDef))
    loose = _undefined(attempt, tree, holder, "class", (ast.ClassDef,))
    if loose is not None:
        return loose
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == holder]
    if not classes or classes[-1].bases or classes[-1].decorator_list:
        return None  # its methods may come from elsewhere
    return _undefined(attempt, classes[-1], name, f"method of {holder!r}", _FUNCTIONS)


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _undefined(
    attempt: Attempt, tree: ast.AST, name: str, what: str, kinds: tuple[type[ast.AST], ...]
) -> Segment | None:
    """The fault, unless ``name`` is bound anywhere in ``tree`` in a way that may work."""
    defined = {
        n.name: n.lineno
        for n in ast.walk(tree)
        if isinstance(n, (*_FUNCTIONS, ast.ClassDef)) and n is not tree
    }
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    bound |= {
        a.asname or a.name
        for n in ast.walk(tree)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    if name in defined or name in bound or "*" in bound:
        return None
    alike = {
        n.name: n.lineno
        for n in ast.walk(tree)
        if isinstance(n, (*_FUNCTIONS, ast.ClassDef)) and isinstance(n, kinds) and n is not tree
    }
    nearest = difflib.get_close_matches(name, alike, n=1, cutoff=0.0)
    word = what.partition(" ")[0]
    there = f" There is a {word} {nearest[0]!r}; rename it." if nearest else ""
    return Segment(
        "format_error",
        f"The program does not define the {what.replace(word, f'{word} {name!r}', 1)}.{there}",
        source="extractor",
        span=attempt.line_span(alike[nearest[0]]) if nearest else None,
        priority=3,
        untrusted=bool(nearest),
    )
